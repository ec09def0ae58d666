"""Pruning detectors: which channels go together in YOLOv3, losslessness, equal metrics, and the callback."""

from __future__ import annotations

import pytest
import torch

import lightning_prune as lp
from lightning_prune.models import YoloV3, YoloV3Tiny, load_darknet_weights, save_darknet_weights
from lightning_prune.tasks import DetectionTask
from tests.helpers import random_plan
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
    yolo_task,
)
from tests.zoo import randomise_

NETWORKS = {"yolov3": lambda: YoloV3(2, width=0.0625), "yolov3_tiny": lambda: YoloV3Tiny(2, width=0.25)}
IMAGES = torch.rand(2, 3, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=NETWORKS)
def traced(request):
    model = randomise_(NETWORKS[request.param]()).eval()
    return model, lp.trace(model, IMAGES)


def test_all_but_the_detection_convolutions_can_be_pruned(traced):
    model, graph = traced
    frozen = [layer.name for group in graph.groups if not group.prunable for layer in group.layers]
    assert frozen == [name for name, _ in model.named_modules() if name.endswith(".predict")]
    assert len(frozen) == len(model.strides)
    assert graph.notes == ()


def test_shortcuts_tie_the_backbone_of_yolov3():
    """Lee et al.'s groups: the stride-2 convolution and the last one of every block of its stage."""
    graph = lp.trace(YoloV3(2, width=0.0625), IMAGES.float())
    shared = {len(group.layers): group.name for group in graph.groups if len(group.layers) > 1}
    sizes = sorted(len(group.layers) for group in graph.groups if len(group.layers) > 1)
    assert sizes == [2, 3, 5, 9, 9]
    assert len(graph.groups) == 75 - 23
    members = [layer.name for layer in graph.group(shared[3]).layers]
    expected = ["backbone.stages.1.0.conv", "backbone.stages.1.1.widen.conv", "backbone.stages.1.2.widen.conv"]
    assert sorted(members) == expected


@pytest.mark.parametrize("coupling", ["joint", "union"])
@pytest.mark.parametrize("ratio", [0.3, 0.7])
def test_the_reconstructed_network_is_the_masked_one(traced, coupling, ratio):
    model, graph = traced
    plan = random_plan(graph, ratio, coupling)
    small = lp.reconstruct(model, graph, plan)
    with lp.mask_(model, graph, plan):
        report = lp.check_lossless(model, small, torch.cat([IMAGES, IMAGES.flip(3)]))
    assert report.passed
    assert report.max_rel_error <= 1e-10
    assert not report.left
    assert lp.measure.count_params(small) < 0.8 * lp.measure.count_params(model)


def test_the_papers_predictors_can_be_left_out(traced):
    model, graph = traced
    plan = lp.LayerRatio(0.5, ignore=model.predictors).select(graph, lp.score(model, graph, lp.L1()))
    pruned = {layer.name for name in plan.groups for layer in graph.group(name).layers}
    convolutions = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Conv2d)]
    heads = [f"{branch}.{last}" for branch in ("coarse", "middle", "fine") for last in ("expand.conv", "predict")]
    assert pruned == set(convolutions) - set(heads)
    assert len(convolutions) - len(pruned) == 2 * len(model.strides)


def test_a_pruned_network_can_be_written_as_darknet_weights(traced, tmp_path):
    model, graph = traced
    plan = random_plan(graph, 0.5)
    small = lp.reconstruct(model, graph, plan).float()
    save_darknet_weights(small, tmp_path / "small.weights")
    other = lp.reconstruct(NETWORKS["yolov3" if len(model.strides) == 3 else "yolov3_tiny"]().double(), graph, plan)
    load_darknet_weights(other, tmp_path / "small.weights")
    with torch.no_grad():
        for found, expected in zip(other.eval()(IMAGES), small.double().eval()(IMAGES), strict=True):
            torch.testing.assert_close(found, expected)


def test_masked_and_reconstructed_have_the_same_metrics(tmp_path):
    task = yolo_task().double()
    for module in task.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.bias.data.normal_(0, 0.3)
    samples = [(image.double(), target) for image, target in pictures(8)]
    graph = lp.trace(task, task.example_input_array.double())
    plan = lp.GlobalRatio(0.4).select(graph, lp.score(task, graph, lp.L1()))
    small = lp.reconstruct(task, graph, plan)
    lp.mask_(task, graph, plan)
    logged = [make_trainer(tmp_path).test(of, loader(samples), verbose=False)[0] for of in (task, small)]
    assert logged[0] == pytest.approx(logged[1], abs=0, nan_ok=True)
    found = [of.eval().predict_step(stacked(samples), 0) for of in (task, small)]
    assert sum(len(of["boxes"]) for of in found[0]) > 50
    for one, other in zip(*found, strict=True):
        assert torch.equal(one["labels"], other["labels"])
        torch.testing.assert_close(one["boxes"], other["boxes"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("criterion", ["l1", "jre"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_the_callback_prunes_yolo_inside_fit(tmp_path, criterion, order):
    task = yolo_task()
    dense = lp.measure.count_params(task)
    callback = lp.PruneCallback(criterion, ratio=0.4, reconstruct=order)
    trainer = make_trainer(tmp_path, callbacks=[callback])
    trainer.fit(task, loader(pictures(6)), loader(pictures(4, same_size=False), collate=listed))
    assert callback.reconstruction.lossless.max_rel_error <= 1e-10
    assert lp.measure.count_params(task) < 0.75 * dense
    assert trainer.callback_metrics["train_loss"].isfinite()
    assert "val_map" in trainer.callback_metrics
    assert task.model.coarse.predict.out_channels == 3 * (5 + CLASSES)


@pytest.mark.parametrize("name", TORCHVISION)
def test_masked_and_reconstructed_torchvision_detectors_have_the_same_metrics(tmp_path, name):
    task = DetectionTask(torchvision_detector(name), CLASSES, input_size=(3, SIDE, SIDE), val_loss=True).double()
    graph = lp.trace(task, ([image.double() for image in task.example_input_array],))
    plan = lp.GlobalRatio(0.4).select(graph, lp.score(task, graph, lp.L1()))
    small = lp.reconstruct(task, graph, plan)
    lp.mask_(task, graph, plan)
    samples = [(image.double(), target) for image, target in pictures(6)]
    logged = [make_trainer(tmp_path).test(of, loader(samples), verbose=False)[0] for of in (task, small)]
    assert logged[0].pop("test_loss") == pytest.approx(logged[1].pop("test_loss"), rel=1e-12)
    assert logged[0] == pytest.approx(logged[1], abs=0, nan_ok=True)


@pytest.mark.parametrize("name", TORCHVISION)
def test_the_callback_prunes_a_torchvision_detector(tmp_path, name):
    net = torchvision_detector(name)
    rate = {"optimizer": lambda params: torch.optim.SGD(params, lr=1e-3)}
    task = DetectionTask(net, CLASSES, input_size=(3, SIDE, SIDE), **rate)
    dense = lp.measure.count_params(task)
    callback = lp.PruneCallback("jre", ratio=0.3)
    trainer = make_trainer(tmp_path, callbacks=[callback])
    trainer.fit(task, loader(pictures(6)), loader(pictures(4)))
    assert callback.reconstruction.lossless.max_rel_error <= 1e-10
    assert lp.measure.count_params(task) < 0.9 * dense
    assert trainer.callback_metrics["train_loss"].isfinite()
