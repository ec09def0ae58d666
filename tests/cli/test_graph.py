"""`lightning-prune graph`: models by import path and by recipe, pictures, and errors of one line."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
import torch
import yaml
from pytorch_lightning import LightningModule
from torch import nn

from lightning_prune.cli import main
from lightning_prune.graph import trace
from tests.cli.tiny import refused

HERE = f"{__name__}.tiny_net"


def tiny_net(inputs: int = 3, width: int = 8, kind: str = "relu") -> nn.Module:
    middle = {"relu": nn.ReLU, "tanh": nn.Tanh}[kind]()
    return nn.Sequential(nn.Conv2d(inputs, width, 3), middle, nn.Conv2d(width, 5, 1))


def no_net() -> str:
    return "not a module"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_table_is_printed_as_it_stands(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")  # a narrow terminal wraps no line
    assert main(["graph", HERE]) == 0
    assert capsys.readouterr().out == trace(tiny_net(), torch.zeros(1, 3, 224, 224)).describe() + "\n"


def test_arguments_and_input_shape(capsys) -> None:
    argv = [HERE, "--arg", "inputs=1", "--arg", "width=6", "--arg", "kind=tanh", "--input", "2", "1", "9", "9"]
    assert main(["graph", *argv]) == 0
    assert "6 of 11 channels" in capsys.readouterr().out


def test_a_torchvision_model_with_null_weights(capsys) -> None:
    path = "torchvision.models.squeezenet1_1"
    assert main(["graph", path, "--arg", "weights=null", "--input", "1", "3", "64", "64"]) == 0
    assert "groups" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "start"), [("graph.html", "<!DOCTYPE html>"), ("deep/er/graph.svg", "<svg ")])
def test_pictures_are_written_whole(capsys, name, start) -> None:
    assert main(["graph", HERE, "--out", name]) == 0
    assert Path(name).read_text("utf-8").startswith(start)
    assert HERE in Path(name).read_text("utf-8")
    assert [path.name for path in Path(name).parent.iterdir()] == [Path(name).name]  # no draft is left
    assert f"Picture: {name}" in capsys.readouterr().out


def under_a_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 4))


def test_what_is_under_a_statistic_goes_with_loss_where_it_is_asked_for(capsys) -> None:
    asked = ["graph", f"{__name__}.under_a_norm", "--input", "2", "3"]
    assert main(asked) == 0
    assert "0 of 12 channels" in capsys.readouterr().out
    assert main([*asked, "--statistics"]) == 0
    out = capsys.readouterr().out
    assert "8 of 12 channels" in out
    assert "yes, but with loss: enters a statistic over channels" in out


# --- recipes


def test_a_recipe_brings_its_model_and_input(capsys) -> None:
    assert main(["graph", "--config", "task/resnet18_digits", "--out", "net.svg"]) == 0
    out = capsys.readouterr().out
    assert "model.conv1" in out
    assert "12 of 13 groups" in out
    assert "resnet18_digits" in Path("net.svg").read_text("utf-8")
    assert [path.name for path in Path().iterdir()] == ["net.svg"]  # no runs/, no logs


def test_a_prune_recipe_may_follow_and_options_override(capsys) -> None:
    argv = ["--config", "task/resnet18_digits.yaml", "--config=prune/l1.yaml", "--model.num_classes", "7"]
    assert main(["graph", *argv, "--model.model.num_classes", "7", "--input", "1", "3", "16", "16"]) == 0
    assert "2,880 of 2,887 channels" in capsys.readouterr().out


def test_a_task_without_example_input_takes_the_ordinary_image() -> None:
    module = {"class_path": f"{__name__}.BareTask"}
    Path("bare.yaml").write_text(yaml.safe_dump({"model": module}), encoding="utf-8")
    assert main(["graph", "--config", "bare.yaml"]) == 0
    assert BareTask.seen[0] == (1, 3, 224, 224)


class BareTask(LightningModule):
    seen: ClassVar[list[tuple[int, ...]]] = []

    def __init__(self):
        super().__init__()
        self.net = tiny_net()

    def forward(self, x):
        BareTask.seen.append(tuple(x.shape))
        return self.net(x)


def test_a_wrong_key_of_a_recipe_is_answered_as_fit_does(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["graph", "--config", "task/resnet18_digits.yaml", "--model.nam_classes=3"])
    err = capsys.readouterr().err
    assert "'model.nam_classes' is not accepted" in err
    assert "Did you mean 'num_classes'?" in err


# --- errors


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "required: MODEL"),
        ([f"{__name__}.tiny_nt"], "Did you mean 'tiny_net'?"),
        (["no.such.module"], "No module named 'no'"),
        (["resnet19"], "Did you mean 'resnet1"),
        (["math.pi"], "no class or function, but a float"),
        ([f"{__name__}.no_net"], "returns a str, which is no torch.nn.Module"),
        ([HERE, "--arg", "wide=3"], "It takes: inputs, width, kind"),
        ([HERE, "--arg", "kind=elu"], "could not be built: KeyError"),
        ([HERE, "--arg", "width"], "KEY=VALUE, got 'width'"),
        ([HERE, "--input", "1", "4", "8", "8"], "The input was 1 4 8 8; --input names another shape."),
        ([HERE, "--input", "1", "-3", "8", "8"], "at least 1, got '-3'"),
        ([HERE, "--input", "1", "x"], "at least 1, got 'x'"),
        ([HERE, "--out", "graph.png"], ".html or .svg, got 'graph.png'"),
        ([HERE, "--what"], "unrecognized arguments: --what"),
    ],
)
def test_errors_are_one_line(capsys, argv, said) -> None:
    assert said in refused(capsys, "graph", *argv)


def test_a_bad_name_of_the_picture_is_refused_before_the_model_is_built(capsys) -> None:
    assert ".html or .svg" in refused(capsys, "graph", "no.such.Net", "--out", "graph.pdf")


def test_a_picture_that_cannot_be_written(capsys) -> None:
    Path("file").touch()
    assert main(["graph", HERE, "--out", "file/graph.svg"]) == 1
    assert "cannot write file/graph.svg" in capsys.readouterr().err


def test_help_names_both_ways(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["graph", "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "graph MODEL" in out
    assert "--config" in out


def test_short_names_of_torchvision_download_nothing(capsys, monkeypatch) -> None:
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", None)
    assert main(["graph", "lraspp_mobilenet_v3_large", "--input", "1", "3", "64", "64"]) == 0
    assert "channels (" in capsys.readouterr().out


class OwnTask(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.example_input_array = tiny_net(inputs=1), torch.zeros(2, 1, 9, 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def test_a_task_by_import_path_brings_its_input(capsys) -> None:
    assert main(["graph", f"{__name__}.OwnTask"]) == 0
    assert "net.0" in capsys.readouterr().out
