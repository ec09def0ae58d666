"""torchvision's detectors behind DetectionTask: labels, losses in both modes, and what is known of them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lightning_prune.tasks import DetectionTask, TorchvisionDetector
from tests.tasks.helpers import (
    CLASSES,
    SIDE,
    TORCHVISION,
    listed,
    loader,
    make_trainer,
    pictures,
    stacked,
    torchvision_detector,
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
