"""Models by name: values of their arguments."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from torch import nn

from lightning_prune.cli import main
from lightning_prune.cli.build_model import build_model
from lightning_prune.errors import ModelError


@pytest.mark.parametrize(
    ("word", "value"),
    [("3", 3), ("null", None), ("None", None), ("true", True), ("[1, 2]", [1, 2]), ("(1, 2)", (1, 2)), ("a.b", "a.b")],
)
def test_values_of_arguments(word, value) -> None:
    received = build_model(f"{__name__}.Keeper", [f"value={word}"]).value
    assert received == value
    assert type(received) is type(value)


class Keeper(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value


SOURCE = """
from beside_nets import WIDTH
from torch import nn

class Net(nn.Sequential):
    def __init__(self, width=WIDTH):
        super().__init__(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, 2, 1))

    @classmethod
    def wide(cls):
        return cls(16)

def build(width=4):
    return Net(width)

DEPTH = 3
"""


@pytest.fixture
def nets(tmp_path, monkeypatch) -> str:
    """The name of a module of models, in files here, that no other test has imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    name = "own_nets"
    for module in (name, "beside_nets"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    for folder in (tmp_path, tmp_path / "folder"):
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text(SOURCE, encoding="utf-8")
        (folder / "beside_nets.py").write_text("WIDTH = 8\n", encoding="utf-8")
    return name


@pytest.mark.parametrize(
    ("form", "width"),
    [
        ("own_nets.build", 4),
        ("own_nets:build", 4),
        ("own_nets:Net", 8),
        ("own_nets:Net.wide", 16),
        ("own_nets.Net.wide", 16),
        ("own_nets.py:build", 4),
        ("folder/own_nets.py:Net", 8),
    ],
)
def test_models_are_named_in_every_usual_way(nets, form: str, width: int) -> None:
    assert build_model(form)[0].out_channels == width


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ("own_nets", r"'own_nets' is a module; name what builds the model in it: own_nets:Net, own_nets:build$"),
        ("own_nets.py", r"is a module; .*: own_nets.py:Net, own_nets.py:build$"),
        ("folder/own_nets.py:", "is a module; .*: folder/own_nets.py:Net"),
        ("own_nets:buidl", "there is no 'buidl' in own_nets. Did you mean 'build'"),
        ("own_nets.DEPTH", "'own_nets.DEPTH' is no class or function, but a int"),
        ("torch.nn", r"'torch.nn' is a module; name what builds"),
        ("absent:build", "No module named 'absent'. Name it as package.module:name"),
        ("absent.py:build", "there is no file absent.py"),
        ("broken.py:build", r"broken.py fails: SyntaxError"),
        ("leaving:build", r"importing leaving fails: SystemExit: 3"),
        (":build", "No module|there is no|Empty module name"),
        ("own_nets:..", "there is no"),
    ],
)
def test_what_names_no_model_is_told_what_would(nets, form: str, said: str) -> None:
    Path("broken.py").write_text("def build(:\n", encoding="utf-8")
    Path("leaving.py").write_text("raise SystemExit(3)\n", encoding="utf-8")
    with pytest.raises(ModelError, match=said):
        build_model(form)


@pytest.mark.parametrize("form", ["own_nets:build", "folder/own_nets.py:build"])
def test_commands_take_such_names_where_a_file_could_stand(nets, form: str, capsys) -> None:
    assert main(["measure", form, "--input", "1", "3", "8", "8", "--repeats", "1"]) == 0
    assert main(["measure", "own_nets", "--input", "1", "3", "8", "8"]) == 1
    assert "own_nets:Net" in capsys.readouterr().err
