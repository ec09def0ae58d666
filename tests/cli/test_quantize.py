"""`lightning-prune quantize`: dense and pruned, in float and in 8 bits."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
import yaml
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune.cli import main
from lightning_prune.errors import QuantizationError
from lightning_prune.measure import Latency
from tests.cli.tiny import TinyData, files, refused

pytestmark = pytest.mark.usefixtures("workplace")
CONFIG = ["--config", "task.yaml", "--out", "net.int8.onnx", "--repeats", "1"]


class TestedData(TinyData):
    """With a test part."""

    __test__ = False

    def test_dataloader(self):
        images = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(images, torch.arange(8) % 3), 5)


@pytest.fixture(autouse=True)
def tested(workplace) -> None:
    content = yaml.safe_load(Path("task.yaml").read_text())
    content["data"] = {"class_path": f"{TestedData.__module__}.TestedData"}
    Path("task.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")


def test_four_files_in_one_table(capsys, monkeypatch, trained) -> None:
    main(["prune", "dense.ckpt", "--config", "task.yaml"])
    capsys.readouterr()
    before = files()
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["quantize", "dense.ckpt", "pruned.pt", *CONFIG, "--calibration-batches", "1"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    rows = [line for line in out.splitlines() if line.startswith(("dense, ", "pruned, ")) and "±" in line]
    assert [row[:12].strip() for row in rows] == ["dense, fp32", "dense, int8", "pruned, fp32", "pruned, int8"]
    assert max(map(len, out.splitlines())) <= 80
    assert "acc of the test data" in out
    assert "calibrated on 6 training samples by minmax" in out
    assert "pruned model in 8 bits: net.int8.onnx" in out
    assert files() - before == {"net.int8.onnx"}
    said = refused(capsys, "quantize", "pruned.pt", "dense.ckpt", *CONFIG, "--overwrite")
    assert said == "error: of two checkpoints the first is the dense one, and pruned.pt is pruned\n"
    assert "QuantizeLinear" in {node.op_type for node in onnx.load("net.int8.onnx").graph.node}


@pytest.mark.parametrize("slower", [True, False])
def test_8_bits_that_cost_time_are_called_so(capsys, monkeypatch, trained, slower) -> None:
    def timed(programs, **_):
        return {name: Latency.of([2.0 if ("int8" in name) == slower else 1.0]) for name in programs}

    monkeypatch.setattr("lightning_prune.experiments.quantized.compare_programs", timed)
    assert main(["quantize", "dense.ckpt", *CONFIG]) == 0
    assert ("dense: 8 bits are SLOWER here than float32" in capsys.readouterr().out) is slower


def test_one_checkpoint_has_two_rows_and_settings_reach_the_quantizer(capsys, monkeypatch, trained) -> None:
    def stop(network, example, runs, path, **settings):
        raise QuantizationError(f"{len(runs)} {settings}")

    monkeypatch.setattr("lightning_prune.experiments.quantized.quantize", stop)
    argv = ["--calibration-batches", "2", "--method", "percentile", "--ignore", "0", "--ignore", "7", "--cpu", "arm"]
    said = refused(capsys, "quantize", "dense.ckpt", *CONFIG, *argv)
    assert said == "error: 2 {'method': 'percentile', 'ignore': ('0', '7'), 'cpu': 'arm'}\n"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["dense.ckpt", "--config", "task.yaml"], "required: --out"),
        (["dense.ckpt", "--out", "net.onnx"], "required: --config"),
        (["dense.ckpt", *CONFIG, "--metric", "f1"], "logs no 'test_f1'; it logs test_loss, test_acc"),
        (["dense.ckpt", *CONFIG[:3], "net.int8"], "must end in .onnx, got 'net.int8'"),
        (["dense.ckpt", *CONFIG[:3], "task.yaml/net.onnx"], "cannot write task.yaml/net.onnx: Not a directory"),
        (["dense.ckpt", *CONFIG, "--calibration-batches", "0"], "at least 1, got '0'"),
        (["dense.ckpt", *CONFIG, "--ignore", "tail"], "no layer matches 'tail'"),
        (["dense.ckpt", *CONFIG, "--metod", "minmax"], "Did you mean '--method'?"),
    ],
)
def test_errors_are_one_line_and_nothing_is_written(capsys, trained, argv, said) -> None:
    assert said in refused(capsys, "quantize", *argv)


def test_a_task_without_data_cannot_be_calibrated(capsys, trained) -> None:
    content = yaml.safe_load(Path("task.yaml").read_text())
    del content["data"]
    Path("task.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    assert "has no data: section" in refused(capsys, "quantize", "dense.ckpt", *CONFIG)
