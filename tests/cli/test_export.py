"""`lightning-prune export`: the file computes what the model computes."""

from __future__ import annotations

import re
from pathlib import Path

import onnxruntime
import pytest
import torch
import yaml

import lightning_prune as lp
from lightning_prune.cli import main
from lightning_prune.export import read_metadata
from lightning_prune.report.table import TIMES
from tests.cli.tiny import MODEL, NET, DescribedData, refused, tiny_net

pytestmark = pytest.mark.usefixtures("workplace")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["export", NET, "--out", "net.pt2"], "must end in .onnx"),
        (["export", NET], "required: --out"),
        (["export", NET, "--out", "dense.pt/net.onnx"], "cannot write dense.pt/net.onnx: Not a directory"),
        (["export", NET, "--out", "net.tflite", "--format", "tflite"], "invalid choice: 'tflite'"),
        (["export", NET, "--out", "net.onnx", "--engine", "eager"], "invalid choice: 'eager'"),
        (["export", NET, "--out", "net.onnx", "--metadata", "acc"], "expected KEY=VALUE, got 'acc'"),
        (["export", NET, "--out", "net.onnx", "--nms", "--input", "1", "3", "8", "8"], "has no boxes to suppress"),
    ],
)
def test_errors_are_one_line_and_nothing_is_written(capsys, argv, said) -> None:
    assert said in refused(capsys, *argv)


@pytest.mark.parametrize(("format", "name"), [("onnx", "net.onnx"), ("torch_export", "net.pt2")])
def test_a_pruned_checkpoint_is_exported(capsys, format, name) -> None:
    main(["prune", "dense.pt", *MODEL])
    capsys.readouterr()
    argv = ["export", "pruned.pt", "--model", NET, "--format", format, "--out", name, "--dynamic-batch"]
    assert main([*argv, "--repeats", "2"]) == 0
    out = capsys.readouterr().out
    small, images = tiny_net(), torch.rand(5, 3, 8, 8)
    lp.load("pruned.pt", small)
    if format == "onnx":
        session = onnxruntime.InferenceSession(name)
        (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    else:
        found = torch.export.load(name).module()(images)
    torch.testing.assert_close(torch.as_tensor(found), small.eval()(images), atol=1e-6, rtol=1e-5)
    assert re.search(r"same outputs, 100.00 % of the classes: max relative error \d\.\de[-+]\d\d", out)
    assert re.search(r"compared on 3\d inputs drawn like the example, at batch size 1 and 2", out)
    assert re.search(rf"input \w+: float32, {TIMES.join(('batch ', ' 3 ', ' 8 ', ' 8'))}", out)
    plan = lp.Plan.from_dict(read_metadata(name)["plan"])
    assert plan == torch_plan("pruned.pt")
    assert {"onnx": "ONNX Runtime", "torch_export": "torch.export"}[format] in out


def test_a_recipe_is_exported_too(capsys, trained) -> None:
    argv = ["export", "dense.ckpt", "--config", "task.yaml", "--format", "torch_export", "--out", "task.pt2"]
    assert main([*argv, "--repeats", "1"]) == 0
    images = torch.rand(2, 3, 8, 8)
    program = torch.export.load("task.pt2").module()
    torch.testing.assert_close(program(images[:1]), trained.eval()(images[:1]))


def test_a_file_says_what_checkpoint_and_data_know_and_is_compared_on_their_images(capsys, trained) -> None:
    recipe = yaml.safe_load(Path("task.yaml").read_text("utf-8"))
    recipe["data"]["class_path"] = f"{DescribedData.__module__}.DescribedData"
    Path("described.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
    content = torch.load("dense.ckpt", weights_only=True)
    content["callbacks"] = {"ModelCheckpoint{}": {"monitor": "val_acc", "current_score": torch.tensor(0.75)}}
    torch.save(content, "dense.ckpt")
    argv = ["export", "dense.ckpt", "--config", "described.yaml", "--out", "net.onnx", "--engine", "openvino"]
    assert main([*argv, "--metadata", "camera=front", "--metadata", "gain=[1, 2]", "--repeats", "1"]) == 0
    found, out = read_metadata("net.onnx"), capsys.readouterr().out
    assert found["metrics"] == {"val_acc": 0.75}
    assert found["classes"] == ["a", "b", "c"]
    assert found["normalisation"] == {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    assert (found["camera"], found["gain"]) == ("front", [1, 2])
    assert "plan" not in found
    assert "compared on 32 images, at batch size 1" in out
    assert "OpenVINO" in out


def torch_plan(path: str) -> lp.Plan:
    return lp.Plan.from_dict(torch.load(path, weights_only=True)["plan"])
