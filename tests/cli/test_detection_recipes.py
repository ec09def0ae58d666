"""The recipes of YOLOv3 run two tiny steps of their own model, optimizer and data, dense and pruned.

Pascal VOC would have to be downloaded: a tiny tree in its format takes its place.
"""

from __future__ import annotations

import pytest
import yaml

import lightning_prune as lp
from lightning_prune.cli.recipes import recipe_paths
from lightning_prune.cli.training import run_lightning
from lightning_prune.data import Scenes, write_voc
from tests.cli.test_recipes import TINY

RECIPES = recipe_paths()
NARROW = ["--model.model.width=0.0625", "--model.detector.size=64", "--model.input_size=[3,64,64]"]
SCENES = ["--data.size=64", "--data.lengths=[4,2,2]", "--data.batch_size=2"]


def settings(name):
    return yaml.safe_load(RECIPES[f"task/{name}.yaml"].read_text(encoding="utf-8"))


def ran(cli):
    assert cli.trainer.global_step == 2
    assert cli.trainer.callback_metrics["train_loss"].isfinite()
    assert "val_map" in cli.trainer.callback_metrics
    return cli


@pytest.mark.parametrize("name", ["yolov3_tiny_scenes", "yolov3_scenes"])
@pytest.mark.parametrize("prune", [[], ["--config", "prune/l1.yaml"]])
def test_the_scenes_recipes_train_and_prune(name, prune, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli = ran(run_lightning("fit", ["--config", f"task/{name}.yaml", *prune, *TINY, *NARROW, *SCENES]))
    kind = type(cli.model.model)
    dense = lp.measure.count_params(kind(10, width=0.0625))
    assert (lp.measure.count_params(cli.model.model) < 0.8 * dense) == bool(prune)


def test_the_voc_recipe_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for part in ("train", "val"):
        write_voc(Scenes(part, 4, size=48), tmp_path, part)
    classes = [str(number) for number in range(20)]  # scenes know the first ten
    data = ["--data.root=.", f"--data.classes={classes}", "--data.batch_size=2", "--data.num_workers=0"]
    ran(run_lightning("fit", ["--config", "task/yolov3_voc.yaml", *TINY, *NARROW, *data]))


def test_the_voc_recipe_has_the_papers_settings():
    content = settings("yolov3_voc")
    task = content["model"]["init_args"]
    assert content["trainer"]["max_epochs"] == task["lr_scheduler"]["init_args"]["T_max"] == 150
    assert task["optimizer"]["init_args"] == {"lr": 1e-4, "momentum": 0.9, "weight_decay": 5e-4}
    assert task["lr_scheduler"]["init_args"]["eta_min"] == 1e-5
    assert content["data"]["init_args"]["batch_size"] == 16
    assert task["detector"]["init_args"]["size"] == 416


@pytest.mark.parametrize("name", ["yolov3_tiny_scenes", "yolov3_scenes"])
def test_the_network_of_a_scenes_recipe_sees_scenes_at_their_size(name):
    content = settings(name)
    task, size = content["model"]["init_args"], content["data"]["init_args"]["size"]
    assert task["detector"]["init_args"]["size"] == size
    assert task["input_size"] == [3, size, size]
