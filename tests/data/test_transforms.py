"""Transforms of images with their masks and boxes."""

from __future__ import annotations

import pytest
import torch
from torchvision import tv_tensors

from lightning_prune.data.samples import detection_sample
from lightning_prune.data.transforms import (
    DarknetJitter,
    Letterbox,
    detection_evaluation,
    detection_training,
    segmentation_evaluation,
    segmentation_training,
)
from lightning_prune.errors import DataError
from tests.data.helpers import objects


def marked(height, width, box):
    """A black image with one white rectangle, which tells where a transform takes things."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    x1, y1, x2, y2 = box
    image[:, y1:y2, x1:x2] = 255
    return tv_tensors.Image(image)


def white(image):
    """x1 y1 x2 y2 of what is nearly white."""
    rows, columns = (image.mean(0) > 0.9).any(1).nonzero(), (image.mean(0) > 0.9).any(0).nonzero()
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


@pytest.mark.parametrize(("height", "width"), [(60, 100), (100, 60), (50, 50), (33, 97)])
def test_a_letterbox_keeps_proportions_and_boxes_follow(height, width):
    image, box = marked(height, width, [10, 10, 30, 25]), [[10, 10, 30, 25]]
    moved, target = detection_sample(image, objects(box, (height, width)), detection_evaluation(200))
    assert moved.shape == (3, 200, 200)
    scale = 200 / max(height, width)
    pad = [(200 - round(width * scale)) // 2, (200 - round(height * scale)) // 2]
    expected = [10 * scale + pad[0], 10 * scale + pad[1], 30 * scale + pad[0], 25 * scale + pad[1]]
    assert target["boxes"][0].tolist() == pytest.approx(expected, abs=1)
    assert white(moved) == pytest.approx(expected, abs=2)
    if height != width:
        assert moved[:, 0, 0].tolist() == pytest.approx([128 / 255] * 3)
        assert moved[:, -1, -1].tolist() == pytest.approx([128 / 255] * 3)
    assert target["orig_size"] == (height, width)


def test_evaluation_keeps_every_box_and_scales_areas():
    tiny = objects([[5, 5, 6, 6], [0, 0, 50, 60]], area=torch.tensor([1.0, 1500.0]))
    _, target = detection_sample(marked(60, 100, [0, 0, 1, 1]), tiny, detection_evaluation(200))
    assert len(target["boxes"]) == 2
    assert target["area"].tolist() == pytest.approx([4.0, 6000.0])
    _, kept = detection_sample(marked(60, 100, [0, 0, 1, 1]), tiny, detection_training("none", 100))
    assert kept["boxes"].tolist() == [[0, 20, 50, 80]]
    assert kept["labels"].tolist() == [1]


@pytest.mark.parametrize("augment", ["flip", "yolo", "ssd"])
def test_boxes_follow_their_pixels_through_augmentation(augment):
    """The white rectangle is where the box says, in every draw in which it is not cut."""
    seen, moved_once = 0, set()
    for seed in range(40):
        torch.manual_seed(seed)
        sample = objects([[40, 20, 60, 40]], (60, 100))
        moved, target = detection_sample(marked(60, 100, [40, 20, 60, 40]), sample, detection_training(augment, 128))
        assert moved.shape == (3, 128, 128)
        assert moved.dtype == torch.float32
        bright = (moved.mean(0) > 0.6).nonzero()
        if len(target["boxes"]) == 0 or len(bright) == 0 or augment == "ssd":
            seen += len(target["boxes"])
            continue
        x1, y1, x2, y2 = target["boxes"][0].tolist()
        inside = (
            (bright[:, 0] >= y1 - 1.5)
            & (bright[:, 0] <= y2 + 0.5)
            & (bright[:, 1] >= x1 - 1.5)
            & (bright[:, 1] <= x2 + 0.5)
        )
        assert inside.all()
        if x1 > 1 and y1 > 1 and x2 < 127 and y2 < 127:
            size = bright.amax(0) - bright.amin(0) + 1
            assert size.tolist() == pytest.approx([y2 - y1, x2 - x1], abs=2.5)
        seen += 1
        moved_once.add(round(x1))
    assert seen >= 20
    assert augment == "ssd" or len(moved_once) >= (1 if augment == "flip" else 10)


def test_flips_mirror_boxes():
    found = set()
    for seed in range(8):
        torch.manual_seed(seed)
        sample = objects([[10, 20, 30, 40]], (100, 100))
        _, target = detection_sample(marked(100, 100, [10, 20, 30, 40]), sample, detection_training("flip", None))
        found.add(tuple(target["boxes"][0].tolist()))
    assert found == {(10, 20, 30, 40), (70, 20, 90, 40)}


def test_jitter_moves_edges_by_at_most_its_share():
    sizes = []
    for seed in range(60):
        torch.manual_seed(seed)
        moved = DarknetJitter(0.2)(marked(100, 200, [0, 0, 200, 100]))
        sizes.append(moved.shape[-2:])
        assert set(moved.unique().tolist()) <= {128, 255}  # grey outside, never black
    heights, widths = zip(*sizes, strict=True)
    assert 60 <= min(heights) < 75
    assert 125 < max(heights) <= 140
    assert 120 <= min(widths) < 150
    assert 250 < max(widths) <= 280


def test_unknown_augmentation_is_refused():
    with pytest.raises(DataError, match="none, flip, yolo, ssd"):
        detection_training("mosaic")


def test_segmentation_training_crops_image_and_mask_alike():
    """Image values are the mask's, so that after any transform they must agree wherever the mask is not ignored."""
    classes = torch.zeros(40, 60, dtype=torch.int64)
    classes[:, 30:] = 1
    image = tv_tensors.Image((classes * 255).to(torch.uint8).expand(3, -1, -1).contiguous())
    ignored = set()
    for seed in range(12):
        torch.manual_seed(seed)
        moved, mask = segmentation_training(40, 48)(image, tv_tensors.Mask(classes))
        assert moved.shape == (3, 48, 48)
        assert mask.shape == (48, 48)
        assert mask.dtype == torch.int64
        pixels = moved[0] * 0.229 + 0.485
        off = mask != 255
        assert ((pixels[off] > 0.5) == mask[off].bool()).float().mean() > 0.95
        assert torch.allclose(pixels[~off], torch.tensor(0.0), atol=1e-5)
        ignored.add(bool((~off).any()))
    assert ignored == {True, False}


def test_segmentation_evaluation_resizes_the_shorter_side():
    image = tv_tensors.Image(torch.zeros(3, 40, 60, dtype=torch.uint8))
    moved, mask = segmentation_evaluation(20)(image, tv_tensors.Mask(torch.ones(40, 60, dtype=torch.int64)))
    assert moved.shape == (3, 20, 30)
    assert mask.unique().tolist() == [1]
    assert moved[:, 0, 0].tolist() == pytest.approx([-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225])


def test_letterbox_pads_masks_with_ignored_pixels():
    mask = Letterbox(20)(tv_tensors.Mask(torch.ones(10, 20, dtype=torch.uint8)))
    assert (mask == 255).sum() == 200
