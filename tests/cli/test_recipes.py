"""Every recipe that ships parses against the real classes and runs, tiny.

The task recipes run two training batches and one validation batch of their own model and optimizer, those on digits
and scenes on their own data. CIFAR-10 and Pascal VOC would have to be downloaded: random images of CIFAR's shape take
the place of the one (and the data module is only constructed), a tiny tree in the format of the other; a tiny tree of
classes stands for ImageNet and for one's own images. The prune
recipes run on top of the digits recipe, those that spare a segmentation network's heads on top of the scenes recipe.
The experiments run in tests/experiments/test_orders.py. A recipe without an entry in the tables here fails.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset

import lightning_prune as lp
from lightning_prune.callbacks.loggers import FolderSink
from lightning_prune.cli import main
from lightning_prune.cli.recipes import describe, recipe_paths
from lightning_prune.cli.training import run_lightning
from lightning_prune.data import Scenes, write_voc
from lightning_prune.errors import CallbackError
from tests.data.helpers import write_camvid, write_mnist

RECIPES = recipe_paths()
TASKS = [name for name in RECIPES if name.startswith("task/")]
CIFAR = [name for name in TASKS if "cifar10" in name]
PRUNES = [name for name in RECIPES if name.startswith("prune/")]
TAUGHT = "prune/taught.yaml"  # prunes nothing by itself
BACKBONES = [name for name in PRUNES if name.startswith("prune/backbone")]
# Rounds and epochs as published: what must be said about a fit of one epoch.
SCHEDULES = {
    "prune/jre_paper.yaml": r"the 3 steps of .* need max_epochs of at least 41, got 1",
    "prune/guo_paper.yaml": r"the 344 steps of Rounds.channels=1",
}
EPOCHS = {
    "prune/fpgm_soft.yaml": 10,
    "prune/l1_gradual.yaml": 5,
    "prune/group_sparsity.yaml": 6,
}
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
DIGITS = ["--data.size=8", "--model.input_size=[3,8,8]"]
THIN = ["--model.model=lightning_prune.models.cifar_thin.resnet20", "--model.model.num_classes=10"]  # for ResNet-18
SCENES = ["--data.size=32", "--data.lengths=[4,2,2]", "--data.batch_size=2", "--model.input_size=[3,32,32]"]
NARROW = ["--model.model.width=0.0625", "--model.detector.size=64", "--model.input_size=[3,64,64]"]
BOXES = [*NARROW, "--data.size=64", "--data.lengths=[4,2,2]", "--data.batch_size=2"]
VOC = ["--data.root=.", "--data.batch_size=2", "--data.num_workers=0"]
VOC_PIXELS = [*VOC, "--data.download=false", "--data.base=48", "--data.crop=32", "--model.input_size=[3,32,32]"]
VOC_BOXES = [*VOC, *NARROW, f"--data.classes={[str(number) for number in range(20)]}"]  # scenes know the first ten
FOLDER = ["--data.root=.", "--data.batch_size=2", "--data.num_workers=0"]
CELLS = [  # scenes of digits stand for blood cells
    *("--data.root=VOCdevkit/VOC2012", f"--data.classes={[str(number) for number in range(10)]}", "--data.size=64"),
    *("--model.model.num_classes=10", "--model.num_classes=10", "--model.class_names=[]", *NARROW, *FOLDER[1:]),
]
TINY_TASKS = {
    **{name: [f"--data={__name__}.CifarShaped"] for name in CIFAR},
    "task/resnet18_digits.yaml": DIGITS,
    "task/fcn_resnet50_scenes.yaml": SCENES,
    "task/fcn_resnet101_voc.yaml": ["--config", "untrained.yaml", *VOC_PIXELS],
    "task/yolov3_tiny_scenes.yaml": BOXES,
    "task/yolov3_scenes.yaml": BOXES,
    "task/yolov3_voc.yaml": VOC_BOXES,
    "task/lenet_mnist.yaml": ["--data.root=.", "--data.classes=[even,odd]", "--data.batch_size=2"],
    "task/lraspp_camvid.yaml": [*FOLDER, "--data.base=48", "--data.crop=32", "--model.input_size=[3,32,32]"],
    "task/yolov3_tiny_bccd.yaml": CELLS,
    "task/resnet56_folder.yaml": [*FOLDER, "--data.val_share=0.25"],
    "task/resnet50_imagenet.yaml": [*FOLDER, "--data.size=32", "--model.input_size=[3,32,32]"],
}


class CifarShaped(LightningDataModule):
    """Random images of CIFAR-10's shape."""

    def __init__(self, batch_size: int = 4):
        super().__init__()

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.rand(8, 3, 32, 32), torch.arange(8)), batch_size=4)

    val_dataloader = train_dataloader


@pytest.fixture(autouse=True)
def _workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(FolderSink, "picture", lambda *_: None)  # seconds; drawn in tests/callbacks/test_tracking.py


def untrained(name, **options):
    """Write a configuration that puts a network of torchvision in the task, without weights to download."""
    init_args = {"weights": None, "weights_backbone": None, **options}
    model = {"class_path": f"torchvision.models.segmentation.{name}", "init_args": init_args}
    task = {"class_path": "lightning_prune.tasks.SegmentationTask", "init_args": {"model": model}}
    Path("untrained.yaml").write_text(yaml.safe_dump({"model": task}), encoding="utf-8")


def write_files(name):
    """What a recipe reads that has its data in files."""
    if "voc" in name or "bccd" in name:
        for part in ("train", "val", "test"):
            write_voc(Scenes(part, 4, size=48), Path(), part)
    elif "camvid" in name:
        write_camvid(Path(), {part: Scenes(part, 4, size=48) for part in ("train", "val")})
    elif "mnist" in name:
        write_mnist(Path())
    elif TINY_TASKS[name][: len(FOLDER)] == FOLDER:
        for place in (Path(part, kind) for part in ("train", "val") for kind in ("ant", "bee")):
            place.mkdir(parents=True)
            for index in range(4):
                Image.new("RGB", (40, 32), (50 * index,) * 3).save(place / f"{index}.jpg")


def settings(name):
    return yaml.safe_load(RECIPES[name].read_text(encoding="utf-8"))


def params(model):
    return lp.measure.count_params(model)


def test_every_file_is_a_recipe_of_one_of_three_kinds():
    shipped = Path(str(resources.files("lightning_prune"))) / "conf"
    others = shipped / "reproduce"  # tests/experiments/reproduce
    found = {path for path in shipped.rglob("*") if path.is_file() and others not in path.parents}
    assert set(RECIPES.values()) == found
    assert {name.partition("/")[0] for name in RECIPES} == {"experiment", "prune", "task"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_starts_with_its_description(name):
    first = RECIPES[name].read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ")
    assert 20 <= len(describe(RECIPES[name])) <= 100


@pytest.mark.parametrize("name", PRUNES)
def test_a_prune_recipe_only_appends_callbacks(name):
    content = settings(name)
    assert list(content) == ["trainer"]
    assert list(content["trainer"]) == ["callbacks+"]


# --- they run


LARGE = ("task/fcn_resnet101_voc.yaml", "task/resnet101_cifar10.yaml")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LARGE else []) for name in TASKS]
)
def test_a_task_recipe_trains_a_step(name):
    write_files(name)
    if name == "task/fcn_resnet101_voc.yaml":
        untrained("fcn_resnet101", num_classes=21, aux_loss=True)
    cli = run_lightning("fit", ["--config", name, *TINY, *TINY_TASKS[name]])
    assert cli.trainer.global_step == 2
    assert cli.trainer.callback_metrics["train_loss"].isfinite()
    metric = settings(name)["trainer"]["callbacks"][0]["init_args"]["monitor"]  # what the best checkpoint goes by
    assert cli.trainer.callback_metrics[metric] >= (-1 if "map" in metric else 0)  # -1: no box in the images
    assert Path("runs").is_dir()


@pytest.mark.parametrize("name", CIFAR)
def test_the_data_of_a_cifar_recipe_are_accepted(name):
    from lightning_prune import data

    content = settings(name)["data"]
    module, _, kind = content["class_path"].rpartition(".")
    assert module == "lightning_prune.data"
    assert isinstance(getattr(data, kind)(**content["init_args"]), LightningDataModule)


@pytest.mark.parametrize("name", [name for name in PRUNES if name not in [*BACKBONES, TAUGHT]])
def test_a_prune_recipe_prunes_the_digits_task_or_says_what_its_schedule_needs(name):
    epochs = f"--trainer.max_epochs={EPOCHS.get(name, 1)}"
    argv = ["--config", "task/resnet18_digits.yaml", "--config", name, *TINY, *DIGITS, *THIN, epochs]
    if name in SCHEDULES:
        with pytest.raises(CallbackError, match=SCHEDULES[name]):
            run_lightning("fit", argv)
        return
    cli = run_lightning("fit", argv)
    assert params(cli.model.model) < 0.85 * params(lp.models.cifar_thin.resnet20(num_classes=10))
    assert cli.trainer.callback_metrics["train_loss"].isfinite()


def test_the_dense_model_teaches_what_a_sensitivity_has_chosen():
    dense = lp.models.cifar_thin.resnet20(num_classes=10)
    torch.save(dense.state_dict(), "dense.pt")
    task = ["--config", "task/resnet18_digits.yaml", *DIGITS, *THIN]
    measured = ["--criterion=l2", "--metric=loss", "--budget=flops=0.5", "--ratios=0.5,0.75", "--batches=1"]
    assert main(["sensitivity", "dense.pt", *measured, "--out=found", *task]) == 0
    cli = run_lightning("fit", [*task, "--config", TAUGHT, "--config=found/prune.yaml", "--weights=dense.pt", *TINY])
    small, whole = (lp.measure.count_flops(model, torch.zeros(1, 3, 8, 8)) for model in (cli.model.model, dense))
    assert small <= 0.5 * whole
    assert cli.trainer.callback_metrics["distill_loss"].isfinite()


@pytest.mark.parametrize("name", BACKBONES[:1] + [pytest.param(name, marks=pytest.mark.slow) for name in BACKBONES[1:]])
def test_a_backbone_recipe_leaves_the_heads_of_a_segmentation_network_whole(name):
    untrained("deeplabv3_mobilenet_v3_large", num_classes=11, aux_loss=True)
    small = ["--config", "task/fcn_resnet50_scenes.yaml", "--config", "untrained.yaml"]
    net = run_lightning("fit", [*small, "--config", name, *TINY, *SCENES]).model.model
    assert (net.classifier[1].out_channels, net.aux_classifier[0].out_channels) == (256, 10)
    assert params(net.backbone) < 0.8 * 2_971_952  # dense


@pytest.mark.parametrize("name", ["yolov3_tiny_scenes", "yolov3_scenes"])
def test_a_detector_is_pruned_by_a_recipe(name):
    argv = ["--config", f"task/{name}.yaml", "--config", "prune/l1.yaml", *TINY, *BOXES]
    model = run_lightning("fit", argv).model.model
    assert params(model) < 0.8 * params(type(model)(10, width=0.0625))


# --- they say what the papers say


@pytest.mark.parametrize("name", CIFAR)
def test_the_cifar_recipes_have_the_papers_settings(name):
    content = settings(name)
    task = content["model"]["init_args"]
    assert content["seed_everything"] == 777
    assert content["trainer"]["max_epochs"] == 200
    assert content["data"]["init_args"]["batch_size"] == 128
    assert task["optimizer"]["init_args"] == {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
    assert task["lr_scheduler"]["init_args"] == {"milestones": [90, 140], "gamma": 0.1}


def test_the_voc_recipe_of_pixels_has_the_papers_settings():
    content = settings("task/fcn_resnet101_voc.yaml")
    task, data = content["model"]["init_args"], content["data"]["init_args"]
    assert content["seed_everything"] == 777
    assert content["trainer"]["max_epochs"] == 100
    assert (data["batch_size"], data["base"], data["crop"]) == (16, 520, 480)
    assert task["optimizer"]["init_args"] == {"lr": 0.001, "momentum": 0.9, "weight_decay": 1e-4}
    assert task["lr_scheduler"]["init_args"] == {"milestones": [50, 70], "gamma": 0.2}


def test_the_voc_recipe_of_boxes_has_the_papers_settings():
    content = settings("task/yolov3_voc.yaml")
    task = content["model"]["init_args"]
    assert content["trainer"]["max_epochs"] == task["lr_scheduler"]["init_args"]["T_max"] == 150
    assert task["optimizer"]["init_args"] == {"lr": 1e-4, "momentum": 0.9, "weight_decay": 5e-4}
    assert task["lr_scheduler"]["init_args"]["eta_min"] == 1e-5
    assert content["data"]["init_args"]["batch_size"] == 16
    assert task["detector"]["init_args"]["size"] == 416


@pytest.mark.parametrize("name", ["yolov3_tiny_scenes", "yolov3_scenes"])
def test_the_network_of_a_scenes_recipe_sees_scenes_at_their_size(name):
    content = settings(f"task/{name}.yaml")
    task, size = content["model"]["init_args"], content["data"]["init_args"]["size"]
    assert task["detector"]["init_args"]["size"] == size
    assert task["input_size"] == [3, size, size]


@pytest.mark.parametrize("name", ["lraspp_camvid", "yolov3_tiny_bccd"])
def test_an_experiment_on_files_has_the_task_and_data_of_its_recipe(name):
    experiment, task = settings(f"experiment/{name}_jre.yaml"), settings(f"task/{name}.yaml")
    assert experiment["task"] == task["model"]
    assert experiment["data"] == task["data"]
    assert experiment["dense_epochs"] == task["trainer"]["max_epochs"]


def test_the_lenet_recipe_has_guos_settings():
    content = settings("task/lenet_mnist.yaml")
    task, data = content["model"]["init_args"], content["data"]["init_args"]
    assert content["trainer"]["max_epochs"] == 100
    assert task["optimizer"]["init_args"] == {"lr": 0.001, "momentum": 0.9, "weight_decay": 1e-4}
    assert (data["batch_size"], data["padding"]) == (32, 2)
