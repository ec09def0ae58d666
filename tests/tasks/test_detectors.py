"""What DetectionTask asks of a network: boxes of YOLO's maps, and torchvision's detectors with labels and losses."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from lightning_prune.models import YoloV3Tiny
from lightning_prune.tasks import DetectionTask, MultiScale, TorchvisionDetector, YoloDetector
from tests.tasks.helpers import (
    ANCHORS,
    CLASSES,
    SIDE,
    TORCHVISION,
    listed,
    loader,
    make_trainer,
    pictures,
    stacked,
    torchvision_detector,
    yolo_task,
)


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_detectors_fit_and_find(tmp_path, name):
    optimizer = {"optimizer": lambda params: torch.optim.SGD(params, lr=1e-3)}
    task = DetectionTask(torchvision_detector(name), CLASSES, input_size=(3, SIDE, SIDE), val_loss=True, **optimizer)
    trainer = make_trainer(tmp_path)
    trainer.fit(task, loader(pictures(6)), loader(pictures(4, same_size=False), collate=listed))
    assert trainer.callback_metrics["train_loss"].isfinite()
    assert trainer.callback_metrics["val_loss"].isfinite()
    found = task.eval().predict_step(listed(pictures(3, same_size=False)), 0)
    assert len(found) == 3
    labels = torch.cat([of["labels"] for of in found])
    assert len(labels)
    assert set(labels.tolist()) <= set(range(CLASSES))


@pytest.mark.parametrize(("name", "background"), [("faster_rcnn", 1), ("ssd", 1), ("retinanet", 0), ("fcos", 0)])
def test_labels_are_moved_past_the_background_where_there_is_one(name, background):
    net, detector, seen = torchvision_detector(name).eval(), TorchvisionDetector(), []
    images, targets = stacked(pictures(2))

    def forward(images, targets=None):
        if targets is None:
            return [{"boxes": torch.zeros(1, 4), "scores": torch.ones(1), "labels": torch.tensor([background])}]
        seen.extend(target["labels"] for target in targets)
        return {}

    net.forward = forward
    detector.losses(net, images, targets, 0)
    assert torch.equal(torch.cat(seen), torch.cat([t["labels"] for t in targets]) + background)
    assert detector.detect(net, images)[0]["labels"].tolist() == [0]


@pytest.mark.parametrize("training", [True, False])
def test_losses_of_torchvision_detectors_leave_modes_and_statistics(training):
    net = torchvision_detector("retinanet").train(training)
    before = {name: value.clone() for name, value in net.named_buffers()}
    losses = TorchvisionDetector().losses(net, *stacked(pictures(2)), 0)
    assert set(losses) == {"classification", "bbox_regression"}
    assert {module.training for module in net.modules()} == {training}
    moved = [name for name, value in net.named_buffers() if not torch.equal(value, before[name])]
    assert bool(moved) == training


def test_a_network_of_torchvisions_own_recipe_is_known():
    from torchvision.models import get_model

    with torch.device("meta"):
        net = get_model("ssdlite320_mobilenet_v3_large", weights=None, weights_backbone=None, num_classes=4)
    TorchvisionDetector().check(net, 3)
    with pytest.raises(ValueError, match=r"SSD predicts 3 classes and the task has 4: .* num_classes=5 \(background"):
        TorchvisionDetector().check(net, 4)


@pytest.mark.parametrize("name", TORCHVISION)
def test_the_validation_loss_is_a_function_of_weights_and_data(name):
    """Faster R-CNN samples its proposals; all resize to a size that they draw in train mode."""
    task = DetectionTask(torchvision_detector(name), CLASSES, input_size=(3, SIDE, SIDE), val_loss=True).eval()
    task.model.transform.min_size = (SIDE // 2, SIDE)  # the last one is for evaluation
    task.trainer = SimpleNamespace(sanity_checking=True, global_step=0)
    logged = []
    task.log = lambda name, value, **_: logged.append(value.item())
    before = torch.get_rng_state()
    task.validation_step(stacked(pictures(4)), 0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    task.validation_step(stacked(pictures(4)), 0)
    assert logged[0] == logged[1]
    task.model.transform.min_size = (SIDE,)
    task.validation_step(stacked(pictures(4)), 0)
    assert logged[2] == logged[0]


def test_boxes_come_back_in_the_pixels_of_the_image():
    """One prediction written into the head map, of an image that is letterboxed and scaled."""
    task = yolo_task().eval()
    net = task.model
    maps = [torch.full((1, 3 * (5 + CLASSES), SIDE // s, SIDE // s), -20.0) for s in net.strides]
    maps[1][0, :7, 2, 1] = torch.tensor([0.0, 0, 0, 0, 20, -20, 20])  # centre (24, 40), the 8x8 anchor, class 1
    net.forward = lambda images: maps
    wide = torch.zeros(3, 64, 128)  # halved, 16 pixels of grey above
    (found,) = task.predict_step([wide], 0)
    torch.testing.assert_close(found["boxes"], torch.tensor([[40.0, 40.0, 56.0, 56.0]]))
    assert found["labels"].tolist() == [1]
    torch.testing.assert_close(found["scores"], torch.ones(1))


def test_overlapping_boxes_of_one_class_are_suppressed_and_clipped():
    task = yolo_task().eval()
    maps = [torch.full((1, 21, SIDE // s, SIDE // s), -20.0) for s in task.model.strides]
    maps[1][0, :7, 0, 0] = torch.tensor([0.0, 0, 1, 1, 3, -20, 20])  # at (8, 8), 22 wide: leaves the image
    maps[1][0, 7:14, 0, 0] = torch.tensor([0.0, 0, 0.6, 0.6, 2, -20, 20])  # nearly the same
    maps[1][0, 14:21, 0, 0] = torch.tensor([0.0, 0, 0.3, 0.3, 2, 20, -20])  # of the other class
    task.model.forward = lambda images: maps
    (found,) = task.predict_step(torch.zeros(1, 3, SIDE, SIDE), 0)
    assert found["labels"].tolist() == [1, 0]
    assert found["boxes"].min() == 0
    half = 8 * math.e / 2
    torch.testing.assert_close(found["boxes"][0], torch.tensor([0.0, 0.0, 8 + half, 8 + half]))


@pytest.mark.parametrize("log_width", [20.0, 100.0])
def test_an_exploded_box_does_not_disturb_the_suppression_of_others(log_width):
    task = yolo_task().eval()
    maps = [torch.full((1, 21, SIDE // s, SIDE // s), -20.0) for s in task.model.strides]
    maps[1][0, :7, 1, 1] = torch.tensor([0.0, 0, 1, 1, 3, -20, 20])
    maps[1][0, 7:14, 1, 1] = torch.tensor([0.0, 0, 0.6, 0.6, 2, -20, 20])  # nearly the same
    maps[1][0, 14:21, 3, 3] = torch.tensor([0.0, 0, log_width, 0, 1, 20, -20])
    task.model.forward = lambda images: maps
    (found,) = task.predict_step(torch.zeros(1, 3, SIDE, SIDE), 0)
    assert found["labels"].tolist() == [1, 0]
    assert found["boxes"][1, [0, 2]].tolist() == [0, SIDE]


def test_few_candidates_are_the_best():
    net = YoloV3Tiny(CLASSES, width=0.25, anchors=ANCHORS)
    images = torch.rand(1, 3, SIDE, SIDE)
    every = YoloDetector(SIDE, nms_threshold=1.0).detect(net.eval(), images)[0]["scores"]
    few = YoloDetector(SIDE, nms_threshold=1.0, max_candidates=7).detect(net, images)[0]["scores"]
    torch.testing.assert_close(few, every[:7])
    assert len(YoloDetector(SIDE, nms_threshold=1.0, max_detections=5).detect(net, images)[0]["scores"]) == 5


def test_multi_scale_changes_the_input_in_training_only():
    sizes = []
    detector = YoloDetector(SIDE, multi_scale=MultiScale(32, 128, every=1))
    task = yolo_task(detector=detector)
    task.log = lambda *_, **__: None
    task.model.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[-1]))
    for step in range(20):
        detector.losses(task.model, *stacked(pictures(2)), step)
    assert sizes == [detector.multi_scale.at(step) for step in range(20)]
    assert len(set(sizes)) == 4
    sizes.clear()
    detector.losses(task.model.eval(), *stacked(pictures(2)), 3)
    detector.detect(task.model, stacked(pictures(2))[0])
    assert sizes == [SIDE, SIDE]


def test_multi_scale_draws_every_size_and_depends_on_step_and_seed_only():
    sizes = MultiScale(320, 608, every=10)
    drawn = [sizes.at(step) for step in range(2000)]
    assert set(drawn) == set(range(320, 609, 32))
    assert all(len(set(drawn[start : start + 10])) == 1 for start in range(0, 2000, 10))
    assert drawn == [MultiScale(320, 608, every=10).at(step) for step in range(2000)]
    assert drawn != [MultiScale(320, 608, every=10, seed=1).at(step) for step in range(2000)]


@pytest.mark.parametrize("options", [{"smallest": 330}, {"smallest": 640}, {"every": 0}, {"largest": 600}])
def test_multi_scale_refuses_what_it_cannot_do(options):
    with pytest.raises(ValueError, match="multiples of 32"):
        MultiScale(**options)
