"""`lightning-prune measure`: models before and after pruning, in tables that fit."""

from __future__ import annotations

import io
import re

import pytest
import torch
from pytorch_lightning import Trainer

import lightning_prune as lp
from lightning_prune.cli import main
from lightning_prune.report.table import TIMES
from lightning_prune.tasks import ClassificationTask
from tests.cli.tiny import MODEL, NET, TinyData, refused, tiny_net

pytestmark = pytest.mark.usefixtures("workplace")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["measure", "no.such.Net"], "No module named 'no'"),
        (["measure", "no.pt"], "there is no file no.pt"),
        (["measure", "a", "b", "c"], "at most two models"),
        (["measure", NET, "--batch-sizes", "1,0"], "at least 1, got '0'"),
        (["measure", NET, "--threads", "x"], "at least 1, got 'x'"),
    ],
)
def test_errors_are_one_line_and_nothing_is_written(capsys, argv, said) -> None:
    assert said in refused(capsys, *argv)


def test_before_and_after_for_every_batch_size_and_number_of_threads(capsys) -> None:
    main(["prune", "dense.pt", *MODEL])
    capsys.readouterr()
    argv = ["measure", NET, "pruned.pt", "--batch-sizes", "1,3", "--threads", "1,2", "--repeats", "2"]
    assert main(argv) == 0  # the input's shape is that of the file
    out = capsys.readouterr().out
    assert re.findall(r"^([13]) +([12]) +[\d.]+ ± [\d.]+ +[\d.]+ ± [\d.]+ +[\d.]+. +\d+ %", out, re.MULTILINE) == [
        ("1", "1"),
        ("1", "2"),
        ("3", "1"),
        ("3", "2"),
    ]
    small = tiny_net()
    lp.load("pruned.pt", small)
    images = torch.rand(1, 3, 8, 8)
    macs = lp.measure.count_flops(tiny_net(), images) / lp.measure.count_flops(small, images)
    assert re.search(rf"times less +[\d.]+{TIMES} +{macs:.2f}{TIMES}", out)


def columns(out: str) -> list[str]:
    """The models whose costs are shown."""
    return re.findall(r"^(\w+) +[\d.]+ +[\d.]+ +[\d.]+ ", out.partition("MACs and FLOPs")[0], re.MULTILINE)


def test_a_pruned_file_is_called_so_wherever_it_stands(capsys) -> None:
    main(["prune", "dense.pt", *MODEL])
    capsys.readouterr()
    for files in (["dense.pt", "pruned.pt"], ["pruned.pt", "dense.pt"]):
        assert main(["measure", *files, *MODEL, "--repeats", "1"]) == 0
        out = capsys.readouterr().out
        assert columns(out) == ["dense", "pruned"]
        assert float(re.search(r"times less +([\d.]+)", out)[1]) > 1


def test_two_of_one_kind_are_called_as_their_files(capsys) -> None:
    main(["prune", "dense.pt", *MODEL])
    main(["prune", "dense.pt", *MODEL, "--ratio", "0.25", "--out", "less.pt"])
    torch.save(tiny_net().state_dict(), "other.pt")
    capsys.readouterr()
    for files in (["dense.pt", "other.pt"], ["pruned.pt", "less.pt"]):
        assert main(["measure", *files, *MODEL, "--layers", "--repeats", "1"]) == 0
        out = capsys.readouterr().out
        names = [file.removesuffix(".pt") for file in files]
        assert columns(out) == names
        assert re.search(rf"^ +channels +{names[0]} +{names[1]} ", out, re.MULTILINE)
        assert f"\n{names[1]}:\n" in out
        assert not re.search(r"\bpruned\b" if "other" in names else r"\bdense\b", out)
    assert "dense.pt is named twice" in refused(capsys, "measure", "dense.pt", "dense.pt", *MODEL)


def test_layers_and_what_sets_the_pace(capsys) -> None:
    main(["prune", "dense.pt", *MODEL])
    capsys.readouterr()
    assert main(["measure", "pruned.pt", *MODEL, "--layers", "--repeats", "2", "--top", "3"]) == 0
    out = capsys.readouterr().out
    assert "5 other layers" in out
    assert "layer by layer, batch size 2, " in out
    assert "between layers" in out
    assert "this machine on" in out
    assert "of what the FLOPs promise" in out
    assert "timers around the layers changed a pass by" in out


@pytest.mark.parametrize("columns", ["60", "80", "120"])
def test_tables_fit_the_terminal(capsys, monkeypatch, columns) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    main(["prune", "dense.pt", *MODEL])
    capsys.readouterr()
    main(["measure", "dense.pt", "pruned.pt", *MODEL, "--layers", "--repeats", "2"])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= int(columns)
    tables = out.partition("this machine")[0]
    assert all(f"{name} " in tables for name in ("times less", "together", "batch"))  # no word is broken
    assert ("GFLOP/s" in tables) == (columns == "120")


def test_a_log_in_ascii_is_no_reason_to_fail(monkeypatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stream)
    assert main(["measure", NET, "--input", "2", "3", "8", "8", "--layers", "--repeats", "1"]) == 0
    stream.seek(0)
    assert "+-" in stream.read()


def test_one_sample_unless_a_shape_is_asked_for(capsys, trained) -> None:
    def sizes(*argv: str) -> list[str]:
        assert main(["measure", *argv, "--repeats", "1"]) == 0
        return re.findall(r"^(\d+) +\d+ +[\d.]+ ±", capsys.readouterr().out, re.MULTILINE)

    assert sizes("dense.ckpt", "--config", "task.yaml") == ["1"]  # the task's example has 2
    assert sizes("dense.ckpt", "--config", "task.yaml", "--input", "3", "3", "8", "8") == ["3"]


def test_an_engine_times_and_layers_are_timed_in_pytorch_alone(capsys) -> None:
    assert main(["measure", NET, "--engine", "onnxruntime", "--repeats", "1"]) == 0
    assert "latency, engine onnxruntime: median" in capsys.readouterr().out
    assert "onnxruntime runs none" in refused(capsys, "measure", NET, "--engine", "onnxruntime", "--layers")
    assert "lightning-prune[tensorrt]" in refused(capsys, "measure", NET, "--engine", "tensorrt", "--repeats", "1")


def test_small_models_are_counted_in_thousands(capsys) -> None:
    assert main(["measure", NET, "--repeats", "1"]) == 0
    out = capsys.readouterr().out
    assert f"{lp.measure.count_params(tiny_net()) / 1e3:.2f}" in out
    assert re.search(r" k +M +ptflops, M +paper, M ", out)


def test_more_threads_than_cores_is_said(capsys, monkeypatch) -> None:
    monkeypatch.setattr("lightning_prune.cli.cost_table.core_count", lambda: 1)
    for threads, said in (("1", False), ("1,2", True)):
        assert main(["measure", NET, "--input", "1", "3", "8", "8", "--threads", threads, "--repeats", "1"]) == 0
        assert ("more threads than the 1 core of this process" in capsys.readouterr().out) == said


def test_one_model_alone(capsys) -> None:
    assert main(["measure", NET, "--input", "2", "3", "8", "8", "--layers", "--repeats", "1"]) == 0
    out = capsys.readouterr().out
    assert "pruned" not in out
    assert "ReLU" in out
    assert "times" not in out.partition("limit:")[0].partition("of limit")[0]


def test_a_pruned_file_says_what_it_was_made_of(capsys) -> None:
    main(["prune", "dense.pt", *MODEL, "--arg", "classes=3"])
    capsys.readouterr()
    said = refused(capsys, "measure", "pruned.pt")
    assert f"It was pruned with: --model {NET} --arg classes=3" in said


def test_a_checkpoint_of_a_recipe(capsys, trained) -> None:
    assert main(["measure", "dense.ckpt", "--config", "task.yaml", "--repeats", "1"]) == 0
    assert "pruned" not in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no:UserWarning")
def test_a_lightning_checkpoint_of_a_pruned_run_is_compared_with_its_dense_model(capsys) -> None:
    task = ClassificationTask(tiny_net(), num_classes=3, input_size=(3, 8, 8))
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=1, callbacks=[lp.PruneCallback("l1", 0.25)], enable_model_summary=False, **options)
    trainer.fit(task, TinyData())
    trainer.save_checkpoint("run.ckpt")
    capsys.readouterr()
    assert main(["measure", "run.ckpt", "--config", "task.yaml", "--repeats", "1"]) == 0
    macs = lp.measure.count_flops(tiny_net(), torch.rand(1, 3, 8, 8)) / lp.measure.count_flops(
        task, torch.rand(1, 3, 8, 8)
    )
    assert f"{macs:.2f}{TIMES}" in capsys.readouterr().out
