"""Letterboxing, decoding, and the grid between head maps and boxes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torchvision import tv_tensors

from lightning_prune.data.transforms import Letterbox
from lightning_prune.models import YoloV3, YoloV3Tiny
from lightning_prune.models.yolo_boxes import decode, flatten, letterbox


@pytest.mark.parametrize("size", [320, 77])
def test_the_longer_side_fills_the_letterbox_and_the_data_modules_round_alike(size):
    """77 * (320 / 77) is a little less than 320 in floating point; torchvision's own resize rounds the same way."""
    for height, width in itertools.product((1, 33, 50, 77, 97), (77, 303, 389, 616)):
        batch, (placement,) = letterbox([torch.zeros(3, height, width)], size)
        assert placement.scale[width < height] == size / max(height, width)
        whole = torch.tensor([[0.0, 0.0, width, height]])
        boxes = tv_tensors.BoundingBoxes(whole, format="XYXY", canvas_size=(height, width))
        torch.testing.assert_close(Letterbox(size)(boxes).as_subclass(torch.Tensor), placement.to_network(whole))
        covered = Letterbox(size)(tv_tensors.Image(torch.zeros(3, height, width))) == 0
        assert torch.equal(covered, batch[0] == 0)


def test_decoding_one_prediction_by_hand():
    net = YoloV3(2, width=0.0625)
    maps = [torch.zeros(1, 21, 96 // s, 64 // s) for s in net.strides]
    maps[1][0, 7:14, 2, 3] = torch.tensor([math.log(3), 0, math.log(2), 0, 0, math.log(3), -math.log(3)])
    boxes, scores = decode(maps, net)
    assert boxes.shape == (1, 3 * (6 + 24 + 96), 4)
    place = 3 * 6 + 24 + 2 * 4 + 3  # head, anchor, row, column
    width, height = 2 * 62, 45
    x, y = (3 + 0.75) * 16, (2 + 0.5) * 16
    expected = torch.tensor([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
    torch.testing.assert_close(boxes[0, place], expected)
    torch.testing.assert_close(scores[0, place], torch.tensor([0.5 * 0.75, 0.5 * 0.25]))


def test_the_grid_numbers_places_as_the_maps_are_laid_out():
    net = YoloV3Tiny(3, width=0.25)
    maps = [torch.randn(3, 24, 64 // s, 64 // s) for s in net.strides]
    raw, grid = flatten(maps, net)
    assert grid.first == (0, 12, 60)
    torch.testing.assert_close(raw[1, 12 + 2 * 16 + 3 * 4 + 1], maps[1][1, 16:24, 3, 1])
    assert grid.cell[12 + 2 * 16 + 3 * 4 + 1].tolist() == [1, 3]


@pytest.mark.parametrize("size", [(50, 80), (80, 50), (64, 64), (33, 100), (200, 96)])
def test_letterboxed_boxes_come_back(size):
    image = torch.rand(3, *size)
    batch, (placement,) = letterbox([image], 96)
    boxes = torch.tensor([[1.0, 2.0, 30.0, 31.0], [0.0, 0.0, size[1], size[0]]])
    inside = placement.to_network(boxes)
    torch.testing.assert_close(placement.to_image(inside), boxes)
    x1, y1, x2, y2 = (round(v) for v in inside[1].tolist())
    assert max(x2 - x1, y2 - y1) == 96
    outside = torch.ones(96, 96, dtype=torch.bool)
    outside[y1:y2, x1:x2] = False
    assert (batch[0][:, outside] == 0.5).all()
    assert (batch[0][:, y1:y2, x1:x2] != 0.5).float().mean() > 0.9


def test_a_letterboxed_object_lies_where_its_box_says():
    image = torch.zeros(1, 40, 80)
    image[:, 10:20, 30:60] = 1
    batch, (placement,) = letterbox(image[None], 160)
    rows, columns = (batch[0, 0] > 0.75).nonzero().unbind(1)
    found = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()
    torch.testing.assert_close(found, placement.to_network(torch.tensor([30.0, 10, 60, 20])), atol=1.0, rtol=0)


def test_images_of_the_right_size_are_not_touched():
    images = torch.rand(2, 3, 64, 64)
    batch, placements = letterbox(images, 64)
    assert torch.equal(batch, images)
    assert {p.offset for p in placements} == {(0, 0)}
