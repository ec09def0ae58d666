"""Files in float and in 8 bits, dense and pruned: what is measured is what the files compute."""

from __future__ import annotations

import pytest
import torch
from pytorch_lightning import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_prune as lp
from lightning_prune.engines import OnnxEngine, OnnxRuntime, Program
from lightning_prune.errors import PruningError, QuantizationError
from lightning_prune.experiments.quantized import QuantizationSettings, compare_quantized
from lightning_prune.experiments.runner import Runner, quiet
from lightning_prune.tasks import ClassificationTask, SegmentationTask
from tests.tasks.helpers import pictures, stacked, yolo_task

CLASSES = 3
QUICK = {"batches": 2, "repeats": 1}


def dataset(count: int, seed: int, masks: bool = False) -> TensorDataset:
    """Images whose brightest colour is their class; or with that class in every pixel."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    images = torch.rand(count, CLASSES, 8, 8, generator=generator)
    images[torch.arange(count), labels] += 0.4
    return TensorDataset(images, labels[:, None, None].expand(-1, 8, 8).contiguous() if masks else labels)


class Colours(LightningDataModule):
    def __init__(self, masks: bool = False) -> None:
        super().__init__()
        self.masks, self.seen_in_setup = masks, []

    def setup(self, stage: str) -> None:
        self.seen_in_setup.append(stage)

    def train_dataloader(self):
        assert "fit" in self.seen_in_setup
        return DataLoader(dataset(20, 0, self.masks), 6, shuffle=True)

    def test_dataloader(self):
        return DataLoader(dataset(11, 1, self.masks), 4)


class OnlyValidation(Colours):
    test_dataloader = LightningDataModule.test_dataloader

    def val_dataloader(self):
        return DataLoader(dataset(7, 2), 4)


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(CLASSES, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES))


@pytest.fixture
def task() -> ClassificationTask:
    return ClassificationTask(network(), CLASSES, input_size=(CLASSES, 8, 8))


def test_files_are_measured_on_the_test_data_by_the_tasks_own_step(task, tmp_path) -> None:
    with quiet():
        Runner(Colours()).fit(task, 6)
        expected = Runner(Colours()).test(task)[0]
    before = {name: value.clone() for name, value in task.state_dict().items()}
    small = lp.prune(task, task.example_input_array, ratio=0.5).model
    out = tmp_path / "net.int8.onnx"
    study = compare_quantized({"dense": task, "pruned": small}, Colours(), out, QuantizationSettings(**QUICK))
    assert (study.metric, study.stage) == ("acc", "test")
    found = {(file.model, file.precision): file for file in study.files}
    assert list(found) == [(name, bits) for name in ("dense", "pruned") for bits in ("fp32", "int8")]
    assert found["dense", "fp32"].value == pytest.approx(expected)
    images, labels = dataset(11, 1).tensors
    program = OnnxRuntime().load(out.read_bytes())
    answers = torch.cat([program.run(image[None])[0].argmax(1) for image in images])
    assert found["pruned", "int8"].value == pytest.approx(float((answers == labels).double().mean()))
    assert found["pruned", "int8"].size_bytes == out.stat().st_size
    assert found["dense", "int8"].report.samples == 12
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())
    assert study.table().rows[0][0] == "dense, fp32"
    assert len(study.table().rows) == 4


class Constant(OnnxEngine):
    """Answers the same class, whatever the file says."""

    name = "constant"

    def check(self) -> None:
        pass

    def load(self, onnx: bytes) -> Program:
        class Answers(Program):
            def run(self, inputs):
                assert len(inputs[0] if isinstance(inputs, tuple) else inputs) == 1
                return [torch.eye(CLASSES)[1][None]]

        return Answers()


def test_the_file_answers_and_not_the_network(task, tmp_path) -> None:
    settings = QuantizationSettings(engine=Constant(), **QUICK)
    study = compare_quantized({"dense": task}, Colours(), tmp_path / "net.onnx", settings)
    assert [file.value for file in study.files] == pytest.approx([4 / 11, 4 / 11])


def test_validation_where_there_is_no_test_and_training_data_calibrate(task, tmp_path, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(
        "lightning_prune.experiments.quantized.quantize",
        lambda network, example, runs, path, **_: (seen.extend(runs), path.write_bytes(b""))[0],
    )
    settings = QuantizationSettings(engine=Constant(), **QUICK)
    study = compare_quantized({"dense": task}, data := OnlyValidation(), tmp_path / "net.onnx", settings)
    assert study.stage == "val"
    train = {image.sum().item() for image in dataset(20, 0).tensors[0]}
    used = [image.sum().item() for batch in seen for image in batch]
    assert len(used) == 12
    assert set(used) <= train
    assert "val_dataloader" not in vars(data)


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(CLASSES, 8, 3, padding=1), nn.ReLU())
        self.out, self.aux = nn.Conv2d(8, CLASSES, 1), nn.Conv2d(8, CLASSES, 1)

    def forward(self, x):
        x = self.body(x)
        return {"out": self.out(x), "aux": self.aux(x)}


def test_a_segmentation_network_returns_its_dict(tmp_path) -> None:
    torch.manual_seed(0)
    task = SegmentationTask(Heads(), CLASSES, input_size=(CLASSES, 8, 8))
    study = compare_quantized(
        {"dense": task}, Colours(masks=True), tmp_path / "net.onnx", QuantizationSettings(**QUICK)
    )
    assert study.metric == "miou"
    with quiet():
        assert study.files[0].value == pytest.approx(Runner(Colours(masks=True), "miou").test(task)[0], abs=1e-6)


class Pictures(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(pictures(8), 4, collate_fn=stacked)

    test_dataloader = train_dataloader


def test_a_detector_keeps_its_anchors(tmp_path) -> None:
    torch.manual_seed(0)
    study = compare_quantized({"dense": yolo_task()}, Pictures(), tmp_path / "net.onnx", QuantizationSettings(**QUICK))
    assert study.metric == "map"
    assert study.files[1].report.samples == 8
    assert study.files[1].report.agreement is None


# Refusals


class PastForward(ClassificationTask):
    def _logits(self, images):
        for layer in self.model:
            images = layer(images)
        return images


class OwnForward(ClassificationTask):
    """Its forward is the file: no child does all of it."""

    def forward(self, images):
        for layer in self.model:
            images = layer(images)
        return images

    def evaluate(self, batch, batch_idx, stage):
        super().evaluate(batch, batch_idx, stage)
        self.model[0](batch[0])


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (PastForward, r"the test of PastForward never calls Sequential\.forward on a batch"),
        (OwnForward, r"the test calls model\.0 by itself, past OwnForward\.forward"),
    ],
)
def test_tests_that_would_not_measure_the_file_are_refused(kind, said, tmp_path) -> None:
    task = kind(network(), CLASSES, input_size=(CLASSES, 8, 8))
    with pytest.raises(QuantizationError, match=said):
        compare_quantized({"dense": task}, Colours(), tmp_path / "net.onnx", QuantizationSettings(**QUICK))


def test_what_is_missing_is_named(task, tmp_path) -> None:
    def compare(task: LightningModule, data: LightningDataModule, **settings) -> None:
        compare_quantized({"dense": task}, data, tmp_path / "net.onnx", QuantizationSettings(**QUICK | settings))

    with pytest.raises(PruningError, match=r"logs no 'test_f1'; it logs test_.*test_acc.*: name a metric"):
        compare(task, Colours(), metric="f1", engine=Constant())
    with pytest.raises(PruningError, match="Colours has no training data"):
        compare(task, type("Colours", (Colours,), {"train_dataloader": LightningDataModule.train_dataloader})())
    with pytest.raises(PruningError, match="measure nothing together: neither test_step with test_dataloader"):
        compare(task, type("Nothing", (LightningDataModule,), {})())
    with pytest.raises(QuantizationError, match="at least 1 batch is needed"):
        compare(task, Colours(), batches=0)
