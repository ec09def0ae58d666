"""Boxes that are clipped, repaired or refused, and batches of samples."""

from __future__ import annotations

import pytest
import torch

from lightning_prune.data.modules import detection_batch, segmentation_batch
from lightning_prune.data.samples import check_boxes
from lightning_prune.errors import DataError
from tests.data.helpers import objects


def test_small_overhang_is_clipped_and_large_refused():
    clipped = check_boxes(objects([[-1.5, 0, 101, 61]]), "a.xml")
    assert clipped["boxes"].tolist() == [[0, 0, 100, 60]]
    with pytest.raises(
        DataError, match=r"a\.xml: box 2, .* image of 100 x 60 leaves it by 5 pixels.*bad_boxes: repair"
    ):
        check_boxes(objects([[0, 0, 5, 5], [0, 0, 105, 60]]), "a.xml")
    with pytest.raises(DataError, match=r"box 1, .* has no area"):
        check_boxes(objects([[5, 5, 5, 9]]), "a.xml")
    with pytest.raises(DataError, match="box 1"):
        check_boxes(objects([[float("nan"), 5, 9, 9]]), "a.xml")


def test_bad_boxes_can_be_repaired():
    boxes = [[0, 0, 150, 60], [5, 5, 5, 9], [200, 0, 210, 5], [float("nan"), 5, 9, 9], [1, 2, 3, 4]]
    repaired = check_boxes(objects(boxes), "a.xml", "repair")
    assert repaired["boxes"].tolist() == [[0, 0, 100, 60], [1, 2, 3, 4]]
    assert repaired["labels"].tolist() == [0, 4]


def test_segmentation_batches_are_padded_with_ignored_pixels():
    samples = [(torch.ones(3, 4, 6), torch.ones(4, 6).long()), (torch.ones(3, 5, 3), torch.ones(5, 3).long())]
    images, masks = segmentation_batch(samples)
    assert images.shape == (2, 3, 5, 6)
    assert (masks == 255).sum() == 6 + 15
    assert torch.equal(images[:, 0] == 0, masks == 255)


def test_detection_batches_are_stacked_where_they_can_be():
    one, other = torch.zeros(3, 4, 4), torch.zeros(3, 4, 5)
    assert detection_batch([(one, {}), (one, {})])[0].shape == (2, 3, 4, 4)
    images, targets = detection_batch([(one, {"labels": 1}), (other, {"labels": 2})])
    assert [image.shape for image in images] == [one.shape, other.shape]
    assert targets == [{"labels": 1}, {"labels": 2}]
