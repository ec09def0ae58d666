"""The worked example of docs/own-criterion.md: short, correct, and usable from Python and from YAML."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import lightning_prune as lp
from lightning_prune.cli.training import run_lightning
from lightning_prune.criteria import criterion_from
from lightning_prune.criteria.scoring import score
from lightning_prune.errors import ScoreError
from tests.cli.test_recipes import TINY
from tests.criteria.helpers import case, close, members

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "own-criterion.md").read_text(encoding="utf-8")
SOURCE = (DOCS / "own_criterion.py").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(python|yaml)\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    return importlib.import_module("own_criterion").ActivationVariance


def test_the_page_shows_the_file_and_it_is_short():
    assert [kind for kind, _ in BLOCKS] == ["python", "python", "yaml"]
    assert BLOCKS[0][1] == SOURCE
    assert len(SOURCE.splitlines()) <= 60


def variance(model, layer, images):
    """Of what enters the first reader, per channel over everything."""
    entered = []
    module = model.get_submodule(layer.reader)
    handle = module.register_forward_pre_hook(lambda _m, args: entered.append(args[0].clone()))
    with torch.no_grad():
        model(images)
    handle.remove()
    (tensor,) = entered
    filters = tensor.movedim(-1 if isinstance(module, torch.nn.Linear) else 1, 0)
    return torch.stack([filters[entries].var(correction=0) for entries in layer.reader_index])


@pytest.mark.parametrize("name", ["Vgg", "Residual", "Grouped", "Dense", "Branches"])
def test_it_is_the_variance_however_samples_are_split(example, name):
    model, graph, images, _ = case(name, batch=6)
    for batches in ([images], images.split(4)):
        found = score(model, graph, example(normalize="none"), batches).layers
        for group, layer in members(graph):
            close(found[group.name][layer.name], variance(model, layer, images), atol=1e-12)


def test_a_constant_channel_goes_first(example):
    model, graph, images, _ = case("Plain")
    model.a.weight.data[3] = 0
    model.a.bias.data[3] = 5.0
    assert score(model, graph, example(), [images])["a"].argmin() == 3


def test_settings_are_checked_shown_and_compared(example):
    assert repr(example()) == "ActivationVariance(normalize='mean')"
    assert example() != example(normalize="max")
    assert criterion_from("activation_variance") == example()
    with pytest.raises(ScoreError, match="normalize must be one of"):
        example(normalize="median")


def test_the_python_of_the_page_runs(example, capsys):
    namespace: dict[str, object] = {}
    exec(compile(BLOCKS[1][1], "own-criterion.md", "exec"), namespace)
    result = namespace["result"]
    assert result.lossless.passed
    assert float(capsys.readouterr().out) == result.lossless.max_rel_error
    assert result.after.params < 0.5 * result.before.params


def test_the_yaml_of_the_page_runs_by_class_path(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own.yaml").write_text(BLOCKS[2][1], encoding="utf-8")
    cli = run_lightning("fit", ["--config", "task/resnet18_digits.yaml", "--config", "own.yaml", *TINY])
    callback = next(c for c in cli.trainer.callbacks if isinstance(c, lp.PruneCallback))
    assert callback.scoring.criterion == example(normalize="max")
    assert sum(p.numel() for p in cli.model.model.parameters()) < 0.6 * 11_173_962


def test_a_wrong_setting_in_yaml_is_answered_with_the_accepted_ones(example, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    content = yaml.safe_load(BLOCKS[2][1])
    content["trainer"]["callbacks+"][0]["init_args"]["criterion"]["init_args"] = {"normalise": "max"}
    Path("own.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(SystemExit):
        run_lightning("fit", ["--config", "task/resnet18_digits.yaml", "--config", "own.yaml", *TINY])
    assert "normalise" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_of_the_page_runs(tmp_path):
    (tmp_path / "own.yaml").write_text(BLOCKS[2][1], encoding="utf-8")
    root = str(DOCS.parent)
    environment = os.environ | {"PYTHONPATH": f"{DOCS}{os.pathsep}{root}"}
    command = [sys.executable, "-m", "lightning_prune.cli", "fit", "--config", "task/resnet18_digits.yaml"]
    command += ["--config", "own.yaml", *TINY]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
