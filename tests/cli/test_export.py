"""`lightning-prune export`: the file computes what the model computes."""

from __future__ import annotations

import re

import onnxruntime
import pytest
import torch

import lightning_prune as lp
from lightning_prune.cli import main
from tests.cli.tiny import MODEL, NET, refused, tiny_net

pytestmark = pytest.mark.usefixtures("workplace")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["export", NET, "--out", "net.pt2"], "must end in .onnx"),
        (["export", NET], "required: --out"),
        (["export", NET, "--out", "dense.pt/net.onnx"], "cannot write dense.pt/net.onnx: Not a directory"),
        (["export", NET, "--out", "net.tflite", "--format", "tflite"], "invalid choice: 'tflite'"),
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
    assert re.search(r"same outputs: max relative error \d\.\de[-+]\d\d at batch size 1 and 2", out)
    assert {"onnx": "ONNX Runtime", "torch_export": "torch.export"}[format] in out


def test_a_recipe_is_exported_too(capsys, trained) -> None:
    argv = ["export", "dense.ckpt", "--config", "task.yaml", "--format", "torch_export", "--out", "task.pt2"]
    assert main([*argv, "--repeats", "1"]) == 0
    images = torch.rand(2, 3, 8, 8)
    program = torch.export.load("task.pt2").module()
    torch.testing.assert_close(program(images[:1]), trained.eval()(images[:1]))
