"""SegmentationTask: loss, metrics against a slow reference, what it refuses, and pruning inside fit."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import segmentation

from lightning_prune import LayerRatio, PruneCallback, check_lossless, mask_, reconstruct, trace
from lightning_prune.data import ScenesSegmentation
from lightning_prune.tasks import SegmentationTask
from tests.helpers import random_plan
from tests.tasks.helpers import make_trainer
from tests.zoo import randomise_

CLASSES = 4
NAMES = ["fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"]


class Net(nn.Module):
    """Two convolutions, and an auxiliary head if asked for."""

    def __init__(self, aux: bool = False):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.classifier = nn.Conv2d(8, CLASSES, 1)
        self.aux_classifier = nn.Conv2d(8, CLASSES, 1) if aux else None

    def forward(self, images):
        features = self.backbone(images)
        out = self.classifier(features)
        return out if self.aux_classifier is None else {"out": out, "aux": self.aux_classifier(features)}


def make_task(net=None, **options) -> SegmentationTask:
    return SegmentationTask(Net() if net is None else net, CLASSES, input_size=(3, 12, 12), **options)


def make_loader(count=7, ignored=0.1, classes=CLASSES) -> DataLoader:
    masks = torch.randint(classes, (count, 12, 12))
    masks[torch.rand(masks.shape) < ignored] = 255
    return DataLoader(TensorDataset(torch.rand(count, 3, 12, 12), masks), 3)


def slow_metrics(task, loader):
    """Global accuracy, mean IoU and IoU per class by the equations, pixel by pixel; classes as predicted."""
    n = [[0] * CLASSES for _ in range(CLASSES)]
    with torch.no_grad():
        for images, masks in loader:
            out = task.eval()(images)
            predicted = (out["out"] if isinstance(out, dict) else out).argmax(1)
            for true, guess in zip(masks.flatten().tolist(), predicted.flatten().tolist(), strict=True):
                if true != 255:
                    n[true][guess] += 1
    t = [sum(row) for row in n]
    accuracy = sum(n[i][i] for i in range(CLASSES)) / sum(t)
    unions = [t[i] + sum(n[j][i] for j in range(CLASSES)) - n[i][i] for i in range(CLASSES)]
    ious = [n[i][i] / unions[i] if unions[i] else math.nan for i in range(CLASSES)]
    present = [iou for iou in ious if not math.isnan(iou)]
    return accuracy, sum(present) / len(present), ious


@pytest.mark.parametrize("aux", [False, True])
def test_metrics_of_a_test_run_are_the_equations(tmp_path, aux):
    task, loader = make_task(Net(aux)), make_loader()
    (logged,) = make_trainer(tmp_path).test(task, loader, verbose=False)
    accuracy, miou, ious = slow_metrics(task, loader)
    assert logged["test_acc"] == pytest.approx(accuracy)
    assert logged["test_miou"] == pytest.approx(miou)
    assert [logged[f"test_iou_class_{c}"] for c in range(CLASSES)] == pytest.approx(ious)


def test_a_class_that_occurs_nowhere_counts_nowhere(tmp_path):
    task, loader = make_task(), make_loader(classes=3)
    with torch.no_grad():
        task.model.classifier.bias[3] = -1e4
    (logged,) = make_trainer(tmp_path).test(task, loader, verbose=False)
    _, miou, ious = slow_metrics(task, loader)
    assert math.isnan(ious[3])
    assert math.isnan(logged["test_iou_class_3"])
    assert logged["test_miou"] == pytest.approx(miou)


def test_the_loss_adds_the_auxiliary_head_and_leaves_ignored_pixels_out():
    task = make_task(Net(aux=True), aux_weight=0.3).eval()
    images, masks = next(iter(make_loader(3, ignored=0.4)))
    logs = {}
    task.log = lambda name, value, **_: logs.update({name: value.detach().item()})
    loss = task.training_step((images, masks), 0)
    heads, valid = task(images), masks != 255
    losses = []
    for name in ("out", "aux"):
        rows = heads[name].permute(0, 2, 3, 1)[valid].log_softmax(-1)
        losses.append(-rows[torch.arange(len(rows)), masks[valid]].mean())
    torch.testing.assert_close(loss, losses[0] + 0.3 * losses[1])
    assert logs == {"train_loss": pytest.approx(loss.item())}
    plain = F.cross_entropy(heads["out"], masks, ignore_index=255)
    task.log = lambda name, value, **_: logs.update({name: value}) if name == "val_loss" else None
    task.validation_step((images, masks), 0)
    torch.testing.assert_close(logs["val_loss"], plain)


def test_a_batch_without_a_pixel_that_counts_has_no_loss():
    task = make_task()
    loss = task.loss((torch.rand(2, 3, 12, 12), torch.full((2, 12, 12), 255)))
    loss.backward()
    assert loss == 0
    assert all(parameter.grad.isfinite().all() for parameter in task.parameters())


def test_fit_logs_and_leaves_no_metric_state_behind(tmp_path):
    task, loader = make_task(Net(aux=True)), make_loader()
    trainer = make_trainer(tmp_path, max_epochs=2)
    trainer.fit(task, loader, loader)
    assert {"train_loss", "val_loss", "val_acc", "val_miou"} <= set(trainer.callback_metrics)
    assert all(name.startswith("model.") for name in task.state_dict())
    assert task.metrics["val"]["miou"].confmat.sum() == 0


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (nn.Conv2d(3, 7, 1), r"logits of shape \(2, 4, 12, 12\).*got \(2, 7, 12, 12\) for 'out'"),
        (nn.Conv2d(3, 4, 1, stride=2), r"got \(2, 4, 6, 6\) for 'out'.*let the model resize"),
        (nn.Sequential(nn.Flatten(), nn.Linear(432, 4)), r"got \(2, 4\) for 'out'"),
    ],
)
def test_outputs_of_another_shape_are_refused(net, message):
    with pytest.raises(ValueError, match=message):
        make_task(net).loss((torch.rand(2, 3, 12, 12), torch.zeros(2, 12, 12).long()))


def test_an_auxiliary_head_of_another_shape_is_refused():
    net = Net(aux=True)
    net.aux_classifier = nn.Conv2d(8, 3, 1)
    with pytest.raises(ValueError, match=r"got \(2, 3, 12, 12\) for 'aux'"):
        make_task(net).loss((torch.rand(2, 3, 12, 12), torch.zeros(2, 12, 12).long()))


def test_a_dict_without_logits_is_refused():
    class Nothing(nn.Module):
        def forward(self, images):
            return {"logits": images}

    with pytest.raises(ValueError, match="got NoneType for 'out'"):
        make_task(Nothing()).predict_step(torch.rand(2, 3, 12, 12), 0)


@pytest.mark.parametrize(
    ("options", "name"), [({"ignore_index": 3}, "ignore_index"), ({"aux_weight": -0.1}, "aux_weight")]
)
def test_bad_options_are_refused(options, name):
    with pytest.raises(ValueError, match=name):
        make_task(**options)


def test_predict_step_takes_images_with_and_without_masks():
    task = make_task(Net(aux=True)).eval()
    images = torch.rand(3, 3, 12, 12)
    bare, masked = task.predict_step(images, 0), task.predict_step((images, torch.zeros(3, 12, 12)), 0)
    assert torch.equal(bare, masked)
    assert torch.equal(bare, task(images)["out"].argmax(1))


def torchvision_task(name, size=64) -> SegmentationTask:
    aux = {} if name.startswith("lraspp") else {"aux_loss": True}
    net = getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=CLASSES, **aux)
    return SegmentationTask(net, CLASSES, input_size=(3, size, size))


@pytest.mark.parametrize("name", NAMES)
def test_torchvisions_networks_train_and_reconstruct_without_loss(name):
    task = torchvision_task(name)
    task.loss((torch.rand(2, 3, 64, 64), torch.randint(CLASSES, (2, 64, 64)))).backward()
    randomise_(task.model)
    graph = trace(task, task.example_input_array.double())
    plan = random_plan(graph, 0.5)
    small = reconstruct(task, graph, plan)
    with mask_(task, graph, plan):
        report = check_lossless(task, small, torch.rand(2, 3, 64, 64))
    assert report.passed
    assert report.dtype == "float64"
    assert sum(p.numel() for p in small.parameters()) < 0.4 * sum(p.numel() for p in task.parameters())


def test_the_backbone_alone_is_pruned_where_the_heads_are_ignored():
    task = torchvision_task("fcn_resnet50")
    graph = trace(task, task.example_input_array)
    scores = {group.name: torch.rand(group.size) for group in graph.groups}
    plan = LayerRatio(0.3, ignore=["*classifier.*"]).select(graph, scores)
    small = reconstruct(task, graph, plan).model
    dense = task.model
    for head in ("classifier", "aux_classifier"):
        assert getattr(small, head)[0].out_channels == getattr(dense, head)[0].out_channels
        assert getattr(small, head)[0].in_channels == pytest.approx(0.7 * getattr(dense, head)[0].in_channels, abs=1)
    assert small.backbone.conv1.out_channels == 45
    whole = reconstruct(task, graph, LayerRatio(0.3).select(graph, scores)).model
    assert whole.classifier[0].out_channels == round(0.7 * dense.classifier[0].out_channels)


def test_pruning_inside_fit_is_lossless_and_the_miou_the_same(tmp_path):
    """Order A: what is trained masked and then reconstructed gives the same masks, hence the same numbers."""
    data = ScenesSegmentation(8, size=32, lengths=(8, 8, 8), objects=(1, 2), extent=(0.4, 0.6))
    data.setup()
    loaders = {}
    for part, loader in (("train", data.train_dataloader()), ("val", data.val_dataloader())):
        images, masks = next(iter(loader))
        loaders[part] = DataLoader(TensorDataset(images.double(), masks), 4)
    net = segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=11)
    task = SegmentationTask(net, 11, input_size=(3, 32, 32)).double()
    task.example_input_array = task.example_input_array.double()
    prune = PruneCallback("jre", ratio=0.4, reconstruct="never")
    make_trainer(tmp_path, callbacks=[prune]).fit(task, loaders["train"], loaders["val"])
    (masked,) = make_trainer(tmp_path).test(task, loaders["val"], verbose=False)
    small = reconstruct(task, prune.scoring.graph, prune.masking.plan)
    (after,) = make_trainer(tmp_path).test(small, loaders["val"], verbose=False)
    report = check_lossless(task, small, torch.rand(2, 3, 32, 32))
    assert report.max_rel_error < 1e-10
    assert report.dtype == "float64"
    assert after["test_miou"] == masked["test_miou"] > 0
    assert after["test_acc"] == masked["test_acc"]
    assert sum(p.numel() for p in small.parameters()) < 0.8 * sum(p.numel() for p in task.parameters())
