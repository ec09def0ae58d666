"""The whole job from one YAML file: numbers in the report are those of the models that were built."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule
from torch import nn

from lightning_prune.cli import main
from lightning_prune.cli.recipes import recipe_paths
from lightning_prune.criteria import JRE, L1
from lightning_prune.data import DigitsDataModule, Scenes, write_voc
from lightning_prune.data.scenes import CLASS_NAMES
from lightning_prune.errors import CheckpointError, PruningError
from lightning_prune.experiments.orders import OrderSettings, compare_orders
from lightning_prune.measure import count_params
from lightning_prune.reconstruction.checkpoint import load
from lightning_prune.report import DENSE, FINE_TUNED, MASKED, RECONSTRUCTED
from lightning_prune.tasks import ClassificationTask
from tests.data.helpers import write_camvid
from tests.zoo import Residual


def net() -> nn.Module:
    """The zoo's residual net with ten classes."""
    torch.manual_seed(0)
    model = Residual()
    model.head.fc = nn.Linear(12, 10)
    return model


def random_net() -> nn.Module:
    """The same with weights that depend on the seed."""
    model = Residual()
    model.head.fc = nn.Linear(12, 10)
    return model


def task() -> ClassificationTask:
    return ClassificationTask(
        net(), 10, optimizer=lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), input_size=(3, 16, 16)
    )


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("experiment")
    data = DigitsDataModule(batch_size=128, size=16)
    settings = OrderSettings(
        dense_epochs=2, finetune_epochs=2, finetune_lr=0.05, latency_repeats=4, output=str(folder), progress=False
    )
    report = compare_orders(task(), data, JRE(), settings)
    return report, folder, data


def test_stages_are_the_three_states_and_both_orders(outcome) -> None:
    report, _, _ = outcome
    assert [stage.name for stage in report.stages] == [DENSE, MASKED, RECONSTRUCTED, *FINE_TUNED.values()]
    dense, masked, small, first, second = report.stages
    assert dense.params == masked.params == count_params(net())
    assert small.params == first.params == second.params < 0.6 * dense.params
    assert small.flops["paper"] < 0.7 * dense.flops["paper"]
    assert small.size_bytes < dense.size_bytes
    assert all(stage.latency_ms > 0 for stage in report.stages)


def test_masked_and_reconstructed_agree_to_the_last_image(outcome) -> None:
    report, _, _ = outcome
    lossless = report.losslessness
    assert lossless.dtype == "float64"
    assert lossless.max_rel_error <= 1e-10
    assert report.changed_predictions == (0, 360)
    assert report.stage(MASKED).accuracy == report.stage(RECONSTRUCTED).accuracy


def test_the_dense_model_is_validated_for_the_curves(outcome) -> None:
    report, folder, data = outcome
    dense = task()
    dense.load_state_dict(torch.load(folder / "dense.pt", weights_only=True))
    dense.eval()
    hits = [(dense(x).argmax(1) == y).float() for x, y in data.val_dataloader()]
    assert report.dense_validation == pytest.approx(torch.cat(hits).mean().item(), abs=1e-6)
    assert report.dense_validation != report.stage(DENSE).accuracy


def test_both_orders_are_timed_epoch_by_epoch(outcome) -> None:
    timings = {timing.order: timing for timing in outcome[0].timings}
    for order in "AB":
        epochs = timings[order].epochs
        assert [record.epoch for record in epochs] == [0, 1]
        assert all(record.train_seconds > 0 for record in epochs)
        assert epochs[0].elapsed_seconds < epochs[1].elapsed_seconds
    a, b = (timings[order].epochs[-1].accuracy for order in "AB")
    assert a == pytest.approx(b, abs=0.02)  # the same computation up to rounding


def test_the_pruned_checkpoint_is_the_model_of_order_b(outcome) -> None:
    report, folder, data = outcome
    fresh = task()
    plan = load(folder / "pruned.pt", fresh)
    assert count_params(fresh) == report.stage(FINE_TUNED["B"]).params
    assert plan.coupling == "joint"
    fresh.eval()
    right = sum(int((fresh(x).argmax(1) == y).sum()) for x, y in data.test_dataloader())
    assert right / 360 == pytest.approx(report.stage(FINE_TUNED["B"]).accuracy, abs=1e-6)


def test_channels_of_every_layer_are_reported_in_the_networks_order(outcome) -> None:
    report, _, _ = outcome
    assert [layer.layer for layer in report.layers] == [
        "stem.0", "a1.0", "a2.0", "b1.0", "b2.0", "down.0", "head.fc",
    ]  # fmt: skip
    by_name = {layer.layer: layer for layer in report.layers}
    assert by_name["stem.0"].kept == by_name["a2.0"].kept
    assert (by_name["head.fc"].dense, by_name["head.fc"].kept) == (10, 10)


CONFIG = """
title: tiny
dense_epochs: 1
finetune_epochs: 1
latency_repeats: 2
progress: false
output: out
criterion: {class_path: lightning_prune.L1}
task:
  class_path: lightning_prune.tasks.ClassificationTask
  init_args:
    model: {class_path: tests.experiments.test_orders.net}
    num_classes: 10
    input_size: [3, 16, 16]
data:
  class_path: lightning_prune.data.DigitsDataModule
  init_args: {batch_size: 256, size: 16}
"""


def test_the_command_writes_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(CONFIG)
    assert main(["experiment", "--config", "tiny.yaml", "--ratio", "0.3"]) == 0
    out = capsys.readouterr().out
    assert "lossless: max relative error" in out
    assert "fine-tuned (order B)" in out
    written = {path.name for path in Path("out").iterdir()}
    assert {"report.html", "report.json", "pruned.pt", "channels.png", "accuracy_time.png"} <= written
    assert "GlobalRatio(ratio=0.3" in json.loads(Path("out/report.json").read_text())["settings"]["selection"]


def test_the_same_seed_gives_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(CONFIG.replace("test_orders.net", "test_orders.random_net"))
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(states))  # whatever ran before
        assert main(["experiment", "--config", "tiny.yaml", "--orders=[B]", "--seed", str(seed)]) == 0
        folder = f"out-{len(states) + 1}" if states else "out"  # each has one of its own
        states.append(torch.load(f"{folder}/pruned.pt", weights_only=True)["state_dict"]["model.stem.0.weight"])
    assert torch.equal(states[0], states[1])
    assert states[0].shape != states[2].shape or not torch.equal(states[0], states[2])


DETECTION = """
title: boxes
metric: map_50
orders: [B]
dense_epochs: 1
finetune_epochs: 1
latency_repeats: 2
progress: false
output: boxes
criterion: {class_path: lightning_prune.L1}
task:
  class_path: lightning_prune.tasks.DetectionTask
  init_args:
    model: {class_path: lightning_prune.models.YoloV3Tiny, init_args: {num_classes: 10, width: 0.125}}
    num_classes: 10
    detector: {class_path: lightning_prune.tasks.YoloDetector, init_args: {size: 64}}
    input_size: [3, 64, 64]
data:
  class_path: lightning_prune.data.ScenesDetection
  init_args: {batch_size: 8, size: 64, lengths: [16, 6, 6]}
"""


def written(folder: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The report of a run, and its stages by name."""
    report = json.loads(Path(folder, "report.json").read_text(encoding="utf-8"))
    return report, {stage["name"]: stage for stage in report["stages"]}


def test_a_detector_is_pruned_reported_and_shown(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("boxes.yaml").write_text(DETECTION)
    assert main(["experiment", "--config", "boxes.yaml"]) == 0
    assert "0 of 6 predictions changed" in capsys.readouterr().out
    report, stages = written("boxes")
    assert list(stages) == [DENSE, MASKED, RECONSTRUCTED, FINE_TUNED["B"]]
    assert stages[MASKED]["accuracy"] == stages[RECONSTRUCTED]["accuracy"]
    assert {stage["metric"] for stage in stages.values()} == {"mAP50"}
    assert report["losslessness"]["max_rel_error"] <= 1e-10
    assert [drawn["name"] for drawn in report["predictions"]] == ["truth", DENSE, RECONSTRUCTED, FINE_TUNED["B"]]
    assert all(len(drawn["images"]) == 4 for drawn in report["predictions"])
    assert base64.b64decode(report["predictions"][0]["images"][0])[:3] == b"\xff\xd8\xff"


def test_weights_of_another_run_replace_dense_training(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(CONFIG.replace("test_orders.net", "test_orders.random_net"))
    assert main(["experiment", "--config", "tiny.yaml", "--output", "one"]) == 0
    assert main(["experiment", "--config", "tiny.yaml", "--output", "two", "--dense", "one/dense.pt", "--seed=5"]) == 0
    (one, stages), (two, again) = written("one"), written("two")
    assert stages[DENSE]["accuracy"] == again[DENSE]["accuracy"]
    assert one["layers"] == two["layers"]
    assert again[DENSE]["epoch_seconds"] is None
    assert one["settings"]["epochs"] == "1 dense, 1 fine-tuning"
    assert two["settings"]["epochs"] == "1 fine-tuning"
    assert not Path("two/dense.pt").exists()


def test_wrong_orders_outputs_and_weights_are_refused_before_training(tmp_path: Path) -> None:
    data = DigitsDataModule(batch_size=128, size=16)
    (tmp_path / "file").touch()
    with pytest.raises(PruningError, match=r"cannot write .*pruned\.pt: Not a directory"):
        compare_orders(task(), data, JRE(), OrderSettings(output=str(tmp_path / "file" / "out")))
    with pytest.raises(PruningError, match=r"orders must be A, B or both, each once, got \['A', 'A'\]"):
        OrderSettings(orders=("A", "A"))
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "foreign.pt")
    settings = OrderSettings(dense=str(tmp_path / "foreign.pt"), output=str(tmp_path), progress=False)
    with pytest.raises(CheckpointError, match=r"foreign\.pt belongs to another model: .* missing"):
        compare_orders(task(), data, JRE(), settings)


class Plain(LightningModule):
    """A user's module: a training step, and a test step that logs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.example_input_array = torch.rand(2, 3, 16, 16)

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        pass

    def test_step(self, batch, batch_idx):
        self.log("test_hits", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_a_module_without_predict_step_is_compared_by_its_outputs(tmp_path: Path) -> None:
    settings = OrderSettings(
        metric="hits", orders=("B",), dense_epochs=1, finetune_epochs=1, latency_repeats=1, output=str(tmp_path),
        progress=False,
    )  # fmt: skip
    report = compare_orders(Plain(), DigitsDataModule(batch_size=128, size=16), L1(), settings)
    assert report.changed_predictions == (0, 360)
    assert report.predictions == ()
    assert report.metric == "hits"


def test_a_wrong_key_names_its_path_and_the_valid_ones(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(CONFIG + "finetune_epoch: 3\n")
    with pytest.raises(SystemExit) as stop:
        main(["experiment", "--config", "tiny.yaml"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "'finetune_epoch' is not accepted. Did you mean 'finetune_epochs'?" in error


SCENES = ["--data.init_args.lengths=[8,2,2]", "--data.init_args.batch_size=2"]
FILES = ["--data.init_args.batch_size=2", "--data.init_args.num_workers=0"]
TINY_RECIPES = {
    "experiment/resnet18_digits_jre.yaml": [  # thinner: `make demo` is the recipe itself
        "--data.init_args.size=8", "--task.init_args.input_size=[3,8,8]",
        "--task.init_args.model=lightning_prune.models.cifar_thin.resnet20",
    ],
    "experiment/fcn_resnet50_scenes_jre.yaml": [
        *SCENES, "--data.init_args.size=32", "--task.init_args.input_size=[3,32,32]"
    ],
    "experiment/yolov3_tiny_scenes_jre.yaml": [*SCENES, "--task.init_args.model.init_args.width=0.125"],
    "experiment/lraspp_camvid_jre.yaml": [
        *FILES, "--data.init_args.root=.", "--data.init_args.base=48", "--data.init_args.crop=32"
    ],
    "experiment/yolov3_tiny_bccd_jre.yaml": [  # scenes of digits stand for blood cells
        *FILES, "--data.init_args.root=VOCdevkit/VOC2012", f"--data.init_args.classes={list(CLASS_NAMES)}",
        "--task.init_args.num_classes=10", "--task.init_args.class_names=[]",
        "--task.init_args.model.init_args.num_classes=10", "--task.init_args.model.init_args.width=0.125",
    ],
}  # fmt: skip


def write_files(name: str) -> None:
    """What a recipe reads that has its data in files."""
    for part, count in (("train", 8), ("val", 2), ("test", 2)):
        if "bccd" in name:
            write_voc(Scenes(part, count, size=64), Path(), part)
        elif "camvid" in name:
            write_camvid(Path(), {part: Scenes(part, count, size=48)})


EXPERIMENTS = [name for name in recipe_paths() if name.startswith("experiment/")]
LARGE = ("experiment/fcn_resnet50_scenes_jre.yaml", "experiment/lraspp_camvid_jre.yaml")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LARGE else []) for name in EXPERIMENTS]
)
def test_an_experiment_recipe_runs(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_files(name)
    options = ["--dense_epochs=1", "--finetune_epochs=1", "--orders=[B]", "--latency_repeats=1", "--progress=false"]
    assert main(["experiment", "--config", name, *options, *TINY_RECIPES[name], "--output=out"]) == 0
    report, stages = written("out")
    assert stages[MASKED]["accuracy"] == stages[RECONSTRUCTED]["accuracy"]
    assert report["losslessness"]["passed"]
    assert report["losslessness"]["changed"] == 0 < report["losslessness"]["total"]
    assert stages[RECONSTRUCTED]["params"] < 0.7 * stages[DENSE]["params"]
