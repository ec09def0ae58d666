"""DetectionTask: losses, metrics, both forms of images, what it logs and draws, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torchmetrics.detection import MeanAveragePrecision

from lightning_prune.models import YoloV3Tiny
from lightning_prune.tasks import DetectionTask, TorchvisionDetector, YoloDetector
from tests.tasks.helpers import (
    CLASSES,
    SIDE,
    listed,
    loader,
    make_trainer,
    oracle_task,
    pictures,
    stacked,
    sure,
    torchvision_detector,
    yolo_task,
)


def recording_logs(task):
    logs = {}
    task.log = lambda name, value, **_: logs.update({name: value.detach().item()})
    return logs


@pytest.mark.parametrize("loss", ["ciou", "darknet"])
def test_training_step_returns_the_sum_of_the_losses_and_logs_each(loss):
    task = yolo_task(loss=loss)
    logs = recording_logs(task)
    total = task.training_step(stacked(pictures(4)), 0)
    assert total.requires_grad
    assert set(logs) == {"train_loss", "train_loss_box", "train_loss_objectness", "train_loss_class"}
    parts = sum(value for name, value in logs.items() if name != "train_loss")
    assert total.item() == pytest.approx(logs["train_loss"]) == pytest.approx(parts)


@pytest.mark.parametrize("loss", ["ciou", "darknet"])
def test_numbers_of_other_types_train_the_same(loss):
    task = yolo_task(loss=loss).eval()
    task.log = lambda *_, **__: None
    images, targets = stacked(pictures(4))
    other = [{"boxes": target["boxes"].int(), "labels": target["labels"].int()} for target in targets]
    torch.testing.assert_close(task.training_step((images, other), 0), task.training_step((images, targets), 0))


def test_stacked_and_listed_images_are_the_same_batch():
    task = yolo_task().eval()
    task.log = lambda *_, **__: None
    samples = pictures(4)
    torch.testing.assert_close(task.training_step(stacked(samples), 0), task.training_step(listed(samples), 0))
    for one, other in zip(
        task.predict_step(stacked(samples), 0), task.predict_step(listed(samples)[0], 0), strict=True
    ):
        assert {name: value.tolist() for name, value in one.items()} == {n: v.tolist() for n, v in other.items()}


def test_crowds_and_difficult_objects_are_not_trained_on():
    (image, target), *_ = pictures(2)
    more = {
        "boxes": torch.cat([target["boxes"], torch.tensor([[1.0, 1, 30, 30], [20, 20, 60, 60]])]),
        "labels": torch.cat([target["labels"], torch.tensor([0, 1])]),
        "iscrowd": torch.tensor([False] * len(target["labels"]) + [True, False]),
        "difficult": torch.tensor([False] * len(target["labels"]) + [False, True]),
    }
    task = yolo_task().eval()
    task.log = lambda *_, **__: None
    torch.testing.assert_close(task.training_step(([image], [more]), 0), task.training_step(([image], [target]), 0))


def test_perfect_detections_have_a_precision_of_one(tmp_path):
    samples = pictures(6)
    task = oracle_task(samples, [sure(target) for _, target in samples])
    (logged,) = make_trainer(tmp_path).test(task, loader(samples), verbose=False)
    expected = ["map", "map_50", "map_75", "mar_100", "map_voc07", "map_voc10", "map_voc07_conf20", "map_voc10_conf20"]
    expected += ["map_class_0", "map_class_1"]
    assert set(logged) == {f"test_{name}" for name in expected}
    assert all(value == pytest.approx(1) for value in logged.values())


def test_metrics_are_those_of_torchmetrics_over_the_whole_set(tmp_path):
    """Six images in batches of four: a mean over batches is something else."""
    samples = pictures(6)
    generator = torch.Generator().manual_seed(1)
    answers = []
    for _, target in samples:
        count = len(target["labels"])
        noise = 6 * torch.rand(count, 4, generator=generator)
        moved = {"boxes": target["boxes"] + noise, "labels": target["labels"]}
        answers.append(sure(moved, 0.1 + 0.9 * torch.rand(count, generator=generator)))
    (logged,) = make_trainer(tmp_path).test(oracle_task(samples, answers), loader(samples), verbose=False)
    reference = MeanAveragePrecision()
    reference.update(answers, [target for _, target in samples])
    for name in ("map", "map_50", "map_75", "mar_100"):
        assert logged[f"test_{name}"] == pytest.approx(reference.compute()[name].item())
    assert 0 < logged["test_map"] < logged["test_map_50"]
    assert 0 < logged["test_map_voc10"] <= 1


def test_difficult_and_crowd_reach_the_metrics(tmp_path):
    (image, target), *_ = pictures(2)
    boxes = torch.tensor([[2.0, 2, 20, 20], [30, 30, 60, 60]])
    target = {"boxes": boxes, "labels": torch.tensor([0, 0])}
    found = sure({"boxes": boxes[:1], "labels": torch.tensor([0])})

    def averages(**flags):
        samples = [(image, {**target, **flags})]
        (logged,) = make_trainer(tmp_path).test(oracle_task(samples, [found], 1), loader(samples), verbose=False)
        return logged["test_map_50"], logged["test_map_voc10"]

    assert averages() == pytest.approx((51 / 101, 0.5), abs=1e-4)
    assert averages(difficult=torch.tensor([False, True])) == pytest.approx((51 / 101, 1.0), abs=1e-4)
    assert averages(iscrowd=torch.tensor([False, True])) == pytest.approx((1.0, 0.5), abs=1e-4)


def test_fit_logs_and_leaves_nothing_in_the_state(tmp_path):
    task = yolo_task(val_loss=True)
    trainer = make_trainer(tmp_path, max_epochs=2)
    trainer.fit(task, loader(pictures(6)), loader(pictures(4, same_size=False), collate=listed))
    expected = {
        "train_loss",
        "val_loss",
        "val_map",
        "val_map_50",
        "val_map_75",
        "val_mar_100",
        "val_map_voc07",
        "val_map_voc10",
    }
    assert expected <= set(trainer.callback_metrics)
    assert all(name.startswith("model.") for name in task.state_dict())
    assert task.coco["val"].detection_box == []
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)


def test_a_class_that_is_found_but_never_there_has_no_precision(tmp_path):
    boxes = torch.tensor([[2.0, 2, 20, 20], [30, 30, 60, 60]])
    samples = [(torch.rand(3, SIDE, SIDE), {"boxes": boxes[:1], "labels": torch.tensor([1])})]
    answers = [sure({"boxes": boxes, "labels": torch.tensor([1, 2])})]
    (logged,) = make_trainer(tmp_path).test(oracle_task(samples, answers, 3), loader(samples), verbose=False)
    assert logged["test_map_class_1"] == logged["test_map"] == pytest.approx(1)
    assert math.isnan(logged["test_map_class_0"])
    assert math.isnan(logged["test_map_class_2"])


def test_images_without_objects_have_no_precision(tmp_path):
    samples = [
        (image, {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}) for image, _ in pictures(3)
    ]
    (logged,) = make_trainer(tmp_path).test(yolo_task(), loader(samples), verbose=False)
    assert math.isnan(logged["test_map"])
    assert math.isnan(logged["test_map_voc10"])


@pytest.mark.parametrize("loss", ["ciou", "darknet"])
def test_a_narrow_yolo_learns_eight_pictures(tmp_path, loss):
    task = yolo_task(loss=loss, optimizer=lambda params: torch.optim.Adam(params, lr=3e-3))
    samples = pictures(8)
    trainer = make_trainer(tmp_path, max_epochs=40, check_val_every_n_epoch=40)
    trainer.fit(task, loader(samples, 8), loader(samples))
    (logged,) = make_trainer(tmp_path).test(task, loader(samples), verbose=False)
    assert logged["test_map_50"] > 0.8


def test_burn_in_raises_the_learning_rate_with_the_fourth_power(tmp_path):
    rates = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    task = yolo_task(burn_in=4, lr_scheduler="constant", optimizer=lambda params: Watched(params, lr=0.01))
    trainer = make_trainer(tmp_path, max_epochs=3)
    trainer.fit(task, loader(pictures(4), 2), loader(pictures(2)))
    assert rates == pytest.approx([0.01 * min(1, step / 4) ** 4 for step in range(1, 7)])
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.01


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": torch.tensor([CLASSES])}, r"labels from 2 to 2; they must lie in 0..1, without background"),
        ({"labels": torch.tensor([-1])}, "labels from -1"),
        ({"labels": torch.tensor([0, 1])}, r"boxes of shape \(1, 4\) and 2 labels"),
        ({"boxes": torch.tensor([[5.0, 5, 5, 9]])}, "box without area"),
        ({"boxes": torch.tensor([[5, 5, 9, 9]]).bfloat16()}, r"boxes of torch.bfloat16.*precision=\"bf16-mixed\""),
    ],
)
def test_batches_in_another_form_are_refused(change, words):
    target = {"boxes": torch.tensor([[5.0, 5, 9, 9]]), "labels": torch.tensor([0]), **change}
    with pytest.raises(ValueError, match=words):
        yolo_task().training_step(([torch.rand(3, SIDE, SIDE)], [target]), 0)


def test_images_without_targets_are_refused():
    with pytest.raises(ValueError, match="2 images and 1 targets"):
        yolo_task().training_step((torch.rand(2, 3, SIDE, SIDE), [{}]), 0)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DetectionTask(nn.Conv2d(3, 3, 1), 2), "does not know Conv2d; give it detector="),
        (lambda: DetectionTask(YoloV3Tiny(3, width=0.25), 2), "YoloV3Tiny predicts 3 classes and the task has 2"),
        (lambda: DetectionTask(torchvision_detector("fcos"), 3), "FCOS predicts 2 classes and the task has 3"),
        (lambda: DetectionTask(nn.Identity(), 2, detector=YoloDetector()), "takes YoloV3 or YoloV3Tiny, got Identity"),
        (lambda: TorchvisionDetector().losses(nn.Identity(), [], [], 0), "Identity is none of torchvision's detectors"),
        (lambda: DetectionTask(torchvision_detector("mask_rcnn"), 2), "MaskRCNN trains on more than boxes"),
        (lambda: yolo_task(burn_in=-1), "burn_in"),
        (lambda: yolo_task(class_names=["one"]), "2 names, got 1"),
        (lambda: YoloDetector(100), "multiple of 32"),
        (lambda: YoloDetector(loss="focal"), "ciou, darknet"),
        (lambda: YoloDetector(min_score=2), r"min_score must lie in \[0, 1\]"),
    ],
)
def test_what_does_not_fit_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_example_input_is_letterboxed_and_touches_no_global_rng():
    state = torch.get_rng_state()
    task = DetectionTask(torchvision_detector("ssd"), CLASSES, input_size=(3, 40, 50))
    assert [tuple(image.shape) for image in task.example_input_array] == [(3, 40, 50)] * 2
    net = YoloV3Tiny(CLASSES, width=0.25)
    state = torch.get_rng_state()
    assert DetectionTask(net, CLASSES, input_size=(3, 40, 50)).example_input_array.shape == (2, 3, 416, 416)
    assert torch.equal(torch.get_rng_state(), state)
