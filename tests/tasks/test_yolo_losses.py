"""Both YOLO losses against slow references, on logits."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_prune.models import YoloV3Tiny
from lightning_prune.tasks.yolo_losses import Truths, ciou_loss, darknet_loss
from tests.reference import yolo_loss as reference

SIDE = 64
ANCHORS = [(5, 7), (9, 6), (8, 14), (20, 16), (24, 40), (50, 44)]
# image, class, centre, size: small and large, two in one cell, two of one class, at the edge; none in image 1
TRUTHS = [
    (0, 0, 10.0, 12.0, 6.0, 8.0),
    (0, 1, 11.0, 13.0, 5.5, 7.0),
    (0, 2, 40.0, 30.0, 45.0, 50.0),
    (2, 1, 63.5, 63.9, 1.0, 2.0),
    (2, 0, 33.0, 20.0, 22.0, 30.0),
    (2, 0, 20.0, 20.0, 22.0, 15.0),
]


def network(classes=3):
    return YoloV3Tiny(classes, width=0.25, anchors=ANCHORS)


def random_maps(classes=3, scale=1.0, images=3):
    channels = 3 * (5 + classes)
    maps = [scale * torch.randn(images, channels, SIDE // s, SIDE // s, dtype=torch.float64) for s in (32, 16)]
    return [head.requires_grad_() for head in maps]


def truths_of(rows):
    boxes = torch.tensor(
        [(x - w / 2, y - h / 2, x + w / 2, y + h / 2) for _, _, x, y, w, h in rows], dtype=torch.float64
    )
    image, label = torch.tensor([row[:2] for row in rows], dtype=torch.int64).view(-1, 2).unbind(1)
    return Truths(image, label, boxes.view(-1, 4))


@pytest.mark.parametrize("ignore", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("rows", [TRUTHS, TRUTHS[:1], []])
def test_gradients_of_the_darknet_loss_are_darknets_deltas(rows, ignore):
    net, maps = network(), random_maps()
    losses = darknet_loss(maps, truths_of(rows), net, ignore_threshold=ignore)
    gradients = torch.autograd.grad(sum(losses.values()) * 3, maps)  # times the images: darknet divides later
    expected = reference.darknet_deltas([m.detach() for m in maps], rows, net.anchors, net.strides, ignore)
    for gradient, delta in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, -delta, rtol=1e-9, atol=1e-12)


def test_a_prediction_that_overlaps_is_left_alone_and_others_are_pushed_down():
    """The case above must contain both, or it would not test the threshold."""
    net, maps = network(), [m.detach() for m in random_maps()]
    shares = [
        torch.cat([d[:, 4::8].flatten() for d in reference.darknet_deltas(maps, TRUTHS, net.anchors, net.strides, t)])
        for t in (0.2, 1.0)
    ]
    assert 0 < ((shares[0] == 0) & (shares[1] != 0)).sum() < len(shares[0]) / 2


def test_the_darknet_loss_vanishes_where_everything_is_right():
    net = network()
    maps = [torch.full_like(m, -40.0).detach() for m in random_maps(images=1)]
    x, y, w, h = 24.0, 40.0, 24.0, 40.0  # anchor 4: the coarse head, second anchor, cell (1, 0) at stride 32
    cell = maps[0][0, 8:16, 1, 0]
    cell[:8] = torch.tensor([math.log(0.75 / 0.25), math.log(0.25 / 0.75), 0, 0, 40, -40, 40, -40])
    losses = darknet_loss(maps, truths_of([(0, 1, x, y, w, h)]), net)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))  # BCE of a fraction with itself is not 0
    assert losses["box"].item() == pytest.approx(2 * entropy * (2 - w * h / SIDE**2))
    assert losses["objectness"].item() == pytest.approx(0, abs=1e-9)
    assert losses["class"].item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("rows", [TRUTHS, TRUTHS[:1], []])
def test_the_ciou_loss_equals_the_loops(rows, classes):
    rows = [(image, label % classes, *box) for image, label, *box in rows]
    net, maps = network(classes), random_maps(classes)
    losses = ciou_loss(maps, truths_of(rows), net)
    expected = reference.ciou_parts([m.detach() for m in maps], rows, net.anchors, net.strides)
    assert {name: value.item() for name, value in losses.items()} == pytest.approx(expected, rel=1e-5, abs=1e-12)
    assert all(g is not None for g in torch.autograd.grad(sum(losses.values()), maps))


def test_the_objectness_target_of_the_ciou_loss_carries_no_gradient():
    net, maps = network(), random_maps()
    raw = ciou_loss(maps, truths_of(TRUTHS), net)["objectness"]
    gradients = torch.autograd.grad(raw, maps)
    for gradient in gradients:
        entries = gradient.view(3, 3, 8, *gradient.shape[2:])
        assert entries[:, :, 4].abs().min() > 0
        assert not entries[:, :, [0, 1, 2, 3, 5, 6, 7]].any()


@pytest.mark.parametrize("loss", [darknet_loss, ciou_loss])
def test_an_overflowing_size_elsewhere_does_not_spoil_the_gradient(loss):
    net, maps = network(), [m.detach() for m in random_maps(images=1)]
    maps[1][0, 2, 3, 0] = 1000.0  # exp of it is infinite
    maps = [m.requires_grad_() for m in maps]
    total = sum(loss(maps, truths_of(TRUTHS[:1]), net).values())
    assert all(g.isfinite().all() for g in torch.autograd.grad(total, maps))
