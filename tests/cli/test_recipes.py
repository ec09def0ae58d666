"""Every recipe that ships parses against the real classes and runs, tiny.

The task recipes run two training batches and one validation batch of their own model and optimizer. The recipes on
digits and scenes do so on their own data. CIFAR-10 would have to be downloaded: random images of its shape take
its place, and the data module is only constructed; Pascal VOC is a tiny tree in its format. The prune recipes run on
top of the digits recipe, those that spare a segmentation network's heads on top of the scenes recipe.
"""

from __future__ import annotations

import pytest
import torch
import yaml
from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune.cli.recipes import describe, recipe_paths
from lightning_prune.cli.training import run_lightning
from lightning_prune.data import Scenes, write_voc
from lightning_prune.errors import CallbackError

RECIPES = recipe_paths()
TASKS = [name for name in RECIPES if name.startswith("task/")]
PRUNES = [name for name in RECIPES if name.startswith("prune/")]
BACKBONES = [name for name in PRUNES if name.startswith("prune/backbone")]
TINY = [
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=2",
    "--trainer.limit_val_batches=1",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.log_every_n_steps=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]
TINY_SCENES = ["--data.size=32", "--data.lengths=[4,2,2]", "--data.batch_size=2", "--model.input_size=[3,32,32]"]
TINY_VOC = [
    "--model.input_size=[3,32,32]",
    "--data.root=.",
    "--data.download=false",
    "--data.base=48",
    "--data.crop=32",
    "--data.batch_size=2",
    "--data.num_workers=0",
]


class CifarShaped(LightningDataModule):
    """Random images of CIFAR-10's shape."""

    def __init__(self, batch_size: int = 4):
        super().__init__()

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.rand(8, 3, 32, 32), torch.arange(8)), batch_size=4)

    val_dataloader = train_dataloader


def untrained(tmp_path, name, **options):
    """Arguments that put a network of torchvision in the task, without weights to download."""
    init_args = {"weights": None, "weights_backbone": None, **options}
    model = {"class_path": f"torchvision.models.segmentation.{name}", "init_args": init_args}
    task = {"class_path": "lightning_prune.tasks.SegmentationTask", "init_args": {"model": model}}
    path = tmp_path / "untrained.yaml"
    path.write_text(yaml.safe_dump({"model": task}), encoding="utf-8")
    return ["--config", str(path)]


def test_the_folder_holds_what_the_readme_promises():
    assert len(TASKS) >= 6
    assert len(PRUNES) >= 3


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_starts_with_its_description(name):
    first = RECIPES[name].read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ")
    assert 20 <= len(describe(RECIPES[name])) <= 100


@pytest.mark.parametrize("name", PRUNES)
def test_a_prune_recipe_only_appends_callbacks(name):
    content = yaml.safe_load(RECIPES[name].read_text(encoding="utf-8"))
    assert list(content) == ["trainer"]
    assert list(content["trainer"]) == ["callbacks+"]


@pytest.mark.parametrize("name", [name for name in TASKS if "cifar10" in name])
def test_the_cifar_recipes_have_the_papers_settings(name):
    content = yaml.safe_load(RECIPES[name].read_text(encoding="utf-8"))
    task = content["model"]["init_args"]
    assert content["seed_everything"] == 777
    assert content["trainer"]["max_epochs"] == 200
    assert content["data"]["init_args"]["batch_size"] == 128
    assert task["optimizer"]["init_args"] == {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
    assert task["lr_scheduler"]["init_args"] == {"milestones": [90, 140], "gamma": 0.1}


@pytest.mark.parametrize("name", [name for name in TASKS if "yolo" not in name])  # those: test_detection_recipes.py
def test_a_task_recipe_trains_a_step(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["--config", name, *TINY]
    if "cifar10" in name:
        argv += [f"--data={__name__}.CifarShaped"]
    if "scenes" in name:
        argv += TINY_SCENES
    if "fcn_resnet101_voc" in name:
        for part in ("train", "val"):
            write_voc(Scenes(part, 4, size=48), tmp_path, part)
        argv += [*untrained(tmp_path, "fcn_resnet101", num_classes=21, aux_loss=True), *TINY_VOC]
    cli = run_lightning("fit", argv)
    assert cli.trainer.global_step == 2
    assert cli.trainer.callback_metrics["train_loss"].isfinite()
    assert cli.trainer.callback_metrics["val_acc"] >= 0
    assert (tmp_path / "runs").is_dir()


@pytest.mark.parametrize("name", [name for name in TASKS if "cifar10" in name])
def test_the_data_of_a_cifar_recipe_are_accepted(name):
    from lightning_prune import data

    content = yaml.safe_load(RECIPES[name].read_text(encoding="utf-8"))["data"]
    module, _, kind = content["class_path"].rpartition(".")
    assert module == "lightning_prune.data"
    assert isinstance(getattr(data, kind)(**content["init_args"]), LightningDataModule)


def test_the_published_schedule_of_jre_asks_for_the_epochs_it_needs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["--config", "task/resnet18_digits.yaml", "--config", "prune/jre_paper.yaml", *TINY]
    with pytest.raises(CallbackError, match=r"the 19 steps of .* need max_epochs of at least 361, got 1"):
        run_lightning("fit", argv)


def test_the_published_schedule_of_guo_asks_for_the_epochs_it_needs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["--config", "task/resnet18_digits.yaml", "--config", "prune/guo_paper.yaml", *TINY]
    with pytest.raises(CallbackError, match=r"the 2400 steps of Rounds.channels=1"):
        run_lightning("fit", argv)


EPOCHS = {"prune/fpgm_soft.yaml": 10, "prune/l1_gradual.yaml": 5}


@pytest.mark.parametrize("name", [name for name in PRUNES if "paper" not in name and name not in BACKBONES])
def test_a_prune_recipe_prunes_the_digits_task(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dense = 11_173_962  # ResNet-18 with ten classes
    epochs = f"--trainer.max_epochs={EPOCHS.get(name, 1)}"
    cli = run_lightning("fit", ["--config", "task/resnet18_digits.yaml", "--config", name, *TINY, epochs])
    left = sum(p.numel() for p in cli.model.model.parameters())
    assert left < 0.85 * dense
    assert cli.trainer.callback_metrics["train_loss"].isfinite()


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_recipe_leaves_the_heads_of_a_segmentation_network_whole(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = untrained(tmp_path, "deeplabv3_mobilenet_v3_large", num_classes=11, aux_loss=True)
    argv = ["--config", "task/fcn_resnet50_scenes.yaml", *small, "--config", name, *TINY, *TINY_SCENES]
    net = run_lightning("fit", argv).model.model
    assert (net.classifier[1].out_channels, net.aux_classifier[0].out_channels) == (256, 10)
    backbone = sum(p.numel() for p in net.backbone.parameters())
    assert backbone < 0.8 * 2_971_952  # dense


def test_the_voc_recipe_has_the_papers_settings():
    content = yaml.safe_load(RECIPES["task/fcn_resnet101_voc.yaml"].read_text(encoding="utf-8"))
    task, data = content["model"]["init_args"], content["data"]["init_args"]
    assert content["seed_everything"] == 777
    assert content["trainer"]["max_epochs"] == 100
    assert (data["batch_size"], data["base"], data["crop"]) == (16, 520, 480)
    assert task["optimizer"]["init_args"] == {"lr": 0.001, "momentum": 0.9, "weight_decay": 1e-4}
    assert task["lr_scheduler"]["init_args"] == {"milestones": [50, 70], "gamma": 0.2}
