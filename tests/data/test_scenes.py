"""Scenes: fixed by seed, true to their digits, tight boxes; and their data modules."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as transform

from lightning_prune.data import Scenes, ScenesDetection, ScenesSegmentation
from lightning_prune.data.digits import digit_parts
from lightning_prune.data.samples import detection_sample, segmentation_sample, target_of
from lightning_prune.data.scenes import background
from lightning_prune.data.transforms import detection_evaluation, segmentation_evaluation
from lightning_prune.errors import DataError


@pytest.fixture(scope="module")
def many():
    scenes = Scenes("train", 120, size=96)
    return [scenes[index] for index in range(len(scenes))]


PARTS = {"train": 9, "val": 6}


def equal(sample, other):
    """Leaf by leaf: kind, type and every bit."""
    pairs = zip(tree_leaves(sample), tree_leaves(other), strict=True)
    return all(
        type(a) is type(b) and (a.dtype == b.dtype and torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b)
        for a, b in pairs
    )


def same(one, other):
    return all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in ("image", "instances", "boxes", "labels")
    )


def test_a_scene_depends_on_seed_part_and_index_alone():
    first = Scenes("train", 9, size=64)
    forwards = [first[index] for index in range(9)]
    backwards = [Scenes("train", 50, size=64)[index] for index in reversed(range(9))][::-1]
    assert all(same(one, other) for one, other in zip(forwards, backwards, strict=True))
    assert not same(forwards[3], Scenes("train", 9, size=64, seed=1)[3])
    assert not same(forwards[3], Scenes("val", 9, size=64)[3])
    assert not same(forwards[3], forwards[4])


def test_workers_change_nothing():
    batches = []
    for workers in (0, 2):
        module = ScenesSegmentation(4, size=64, lengths=(4, 12, 4), num_workers=workers)
        module.setup()
        loader = module.val_dataloader()
        assert isinstance(loader, DataLoader)
        batches.append([torch.cat(parts) for parts in zip(*loader, strict=True)])
    for alone, together in zip(*batches, strict=True):
        assert torch.equal(alone, together)


def test_boxes_are_tight_around_what_is_seen(many):
    for scene in many:
        assert scene.instances.max() == len(scene.labels)
        for number, (x1, y1, x2, y2) in enumerate(scene.boxes.astype(int), 1):
            seen = scene.instances == number
            inside = np.zeros_like(seen)
            inside[y1:y2, x1:x2] = True
            assert not (seen & ~inside).any()
            box = seen[y1:y2, x1:x2]
            assert box[0].any()
            assert box[-1].any()
            assert box[:, 0].any()
            assert box[:, -1].any()


def test_masks_pixels_and_labels_belong_together(many):
    for scene in many:
        assert scene.mask.shape == (96, 96)
        for number, label in enumerate(scene.labels, 1):
            where = scene.instances == number
            assert set(scene.mask[where].tolist()) == {label + 1}
            assert where.sum() == scene.pixels[number - 1]
        assert not scene.mask[scene.instances == 0].any()


def test_numbers_and_sizes_fill_their_range(many):
    counts = np.bincount([len(scene.labels) for scene in many], minlength=6)
    assert counts[0] == 0
    assert (counts[1:6] >= 10).all()
    heights = np.concatenate([scene.boxes[:, 3] - scene.boxes[:, 1] for scene in many]) / 96
    assert 0.12 < heights.min() < 0.22
    assert 0.42 < heights.max() < 0.6
    labels = np.bincount(np.concatenate([scene.labels for scene in many]), minlength=10)
    assert labels.min() > 0.4 * labels.mean()


def test_digits_stand_out_from_what_is_around_them(many):
    """Every digit's ink is lighter or darker than the ring around it."""
    weights = np.array([0.299, 0.587, 0.114])
    contrasts = []
    for scene in many:
        grey = scene.image @ weights / 255
        for number, (x1, y1, x2, y2) in enumerate(scene.boxes.astype(int), 1):
            around = scene.instances[y1:y2, x1:x2] == 0
            if around.sum() > 20:
                patch = grey[y1:y2, x1:x2]
                ink = scene.instances[y1:y2, x1:x2] == number
                contrasts.append(abs(patch[ink].mean() - patch[around].mean()))
    assert np.quantile(contrasts, 0.02) > 0.1
    assert np.median(contrasts) > 0.25


def test_no_digit_is_hidden_beyond_the_limit():
    """Where nothing may be hidden fewer digits fit, and all of their ink is seen."""
    crowd = {"size": 48, "objects": (8, 8), "extent": (0.4, 0.5)}
    strict, lax = (Scenes("train", 15, hidden=hidden, **crowd) for hidden in (0.0, 0.6))
    pixels = [np.concatenate([scenes[index].pixels for index in range(15)]) for scenes in (strict, lax)]
    assert len(pixels[0]) < len(pixels[1])
    assert pixels[0].min() > 25
    assert pixels[1].mean() < pixels[0].mean()


def test_what_is_hidden_adds_up():
    """5 more pixels of a digit of 100 may be covered where 2 are already, but not where 12 are."""
    scenes = Scenes("train", 1, size=32, hidden=0.15)
    instances = np.zeros((32, 32), dtype=np.uint8)
    instances[0, :] = instances[1, :] = instances[2, :24] = 1
    ink = np.zeros((32, 32), dtype=np.float32)
    ink[0, :5] = 1
    assert scenes._place(np.random.default_rng(0), instances, [90], ink) == (slice(0, 32), slice(0, 32))
    assert scenes._place(np.random.default_rng(0), instances, [100], ink) is None


def test_a_part_draws_its_own_digits_only():
    scans, labels, parts = digit_parts(0)
    for part, indices in parts.items():
        scenes = Scenes(part, 1)
        assert np.array_equal(scenes.scans[:, 2:-2, 2:-2], scans[indices].numpy())
        assert np.array_equal(scenes.digits, labels[indices].numpy())
    assert len(set().union(*(set(indices) for indices in parts.values()))) == 1797


def test_an_undistorted_digit_is_its_scan():
    """A digit drawn large, shrunk again, correlates with some scan of its class better than with any other class's."""
    scenes = Scenes("test", 40, size=96, objects=(1, 1), extent=(0.6, 0.65))
    hits = 0
    for index in range(40):
        scene = scenes[index]
        x1, y1, x2, y2 = scene.boxes[0].astype(int)
        ink = torch.from_numpy(scene.instances[y1:y2, x1:x2] > 0).float()[None, None]
        small = torch.nn.functional.interpolate(ink, size=(8, 8), mode="bilinear", antialias=True).flatten()
        flat = torch.from_numpy(scenes.scans[:, 2:-2, 2:-2]).flatten(1)
        likeness = torch.nn.functional.cosine_similarity(flat, small[None])
        hits += int(scenes.digits[int(likeness.argmax())] == scene.labels[0])
    assert hits >= 28  # chance: 4; stretched to a square, a 1 is a blob


def test_an_empty_scene_is_a_negative():
    module = ScenesDetection(2, size=32, lengths=(2, 2, 2), objects=(0, 0))
    module.setup()
    _, targets = next(iter(module.train_dataloader()))
    assert all(target["boxes"].shape == (0, 4) and target["labels"].shape == (0,) for target in targets)


def test_a_thousand_scenes_take_seconds():
    scenes = Scenes("train", 60)
    scenes[0]
    started = time.process_time()
    for index in range(60):
        scenes[index]
    assert (time.process_time() - started) / 60 < 0.02


def test_backgrounds_are_textured():
    image = background(np.random.default_rng(0), 64)
    assert image.shape == (64, 64, 3)
    assert image.std(axis=(0, 1)).min() > 0.02


def test_segmentation_batches():
    module = ScenesSegmentation(3, size=48, lengths=(7, 3, 3))
    module.setup()
    assert module.num_classes == len(module.class_names) == 11
    images, masks = next(iter(module.val_dataloader()))
    assert images.shape == (3, 3, 48, 48)
    assert images.dtype == torch.float32
    assert masks.dtype == torch.int64
    scene = module.scenes["val"][1]
    assert torch.equal(masks[1], torch.from_numpy(scene.mask).long())
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = images[1].permute(1, 2, 0) * std + mean
    np.testing.assert_allclose(pixels * 255, scene.image, atol=1e-3)
    assert len(module.train_dataloader()) == 3
    module.drop_last = True
    assert len(module.train_dataloader()) == 2


def test_detection_batches():
    module = ScenesDetection(3, size=48, lengths=(7, 3, 3))
    module.setup()
    images, targets = next(iter(module.val_dataloader()))
    scene = module.scenes["val"][2]
    np.testing.assert_allclose(images[2].permute(1, 2, 0) * 255, scene.image, atol=1e-3)
    assert targets[2]["boxes"].tolist() == scene.boxes.tolist()
    assert type(targets[2]["boxes"]) is torch.Tensor
    assert targets[2]["labels"].tolist() == scene.labels.tolist()
    assert targets[2]["area"].tolist() == scene.pixels.tolist()
    assert not targets[2]["iscrowd"].any()
    assert targets[2]["image_id"] == 2


def one_by_one(module, part, index):
    """A sample as torchvision's transforms make it of a scene rendered anew."""
    scenes = module.scenes[part]
    scene = Scenes(part, len(scenes), size=scenes.size)[index]
    image = transform.to_image(scene.image)
    if isinstance(module, ScenesSegmentation):
        return segmentation_sample(image, scene.mask, segmentation_evaluation(None))
    target = target_of(scene.mask.shape, scene.boxes, scene.labels, index, area=scene.pixels)
    return detection_sample(image, target, detection_evaluation(None))


@pytest.mark.parametrize("kind", [ScenesSegmentation, ScenesDetection])
@pytest.mark.parametrize("cache", [0, 1, 1024])
def test_kept_scenes_are_those_rendered_anew_bit_for_bit(kind, cache, monkeypatch):
    """In every epoch, even if a step has worked in place; 1 MiB holds a third of these scenes."""
    rendered = Counter()
    render = Scenes.__getitem__
    monkeypatch.setattr(
        Scenes, "__getitem__", lambda self, index: (rendered.update([self.part]), render(self, index))[1]
    )
    module = kind(4, size=108, lengths=(9, 6, 45), cache=cache)
    module.setup()
    counts = {0: {"train": 18, "val": 12}, 1: {"train": 9 + 6, "val": 6 + 4}, 1024: {"train": 9, "val": 6}}
    expected = {part: [one_by_one(module, part, index) for index in range(count)] for part, count in PARTS.items()}
    rendered.clear()
    for _ in range(2):
        for part, loader in (("train", module.train_dataloader()), ("val", module.val_dataloader())):
            samples = [sample for images, known in loader for sample in zip(images, known, strict=True)]
            assert len(samples) == PARTS[part]
            order = range(PARTS[part])
            if part == "train":  # shuffled: found again by its pixels
                order = [
                    next(k for k, (own, _) in enumerate(expected[part]) if torch.equal(own, i)) for i, _ in samples
                ]
            assert sorted(order) == list(range(PARTS[part]))
            for index, sample in zip(order, samples, strict=True):
                assert equal(sample, expected[part][index])
            for leaf in tree_leaves(samples):
                if isinstance(leaf, torch.Tensor):
                    leaf.zero_()
    assert rendered == counts[cache]
    assert equal(module.parts["val"][5], expected["val"][5])


@pytest.mark.parametrize(
    "options",
    [
        {"part": "all"},
        {"length": 0},
        {"size": 31},
        {"objects": (3, 2)},
        {"objects": (-1, 2)},
        {"extent": (0.0, 0.4)},
        {"extent": (0.03, 0.4)},  # of 128 pixels
        {"extent": (0.5, 0.8)},
        {"hidden": 1.0},
    ],
)
def test_impossible_scenes_are_refused(options):
    with pytest.raises(DataError, match=next(iter(options))):
        Scenes(**options)


def test_a_negative_cache_is_refused():
    with pytest.raises(DataError, match="cache must be at least 0 MiB, got -1"):
        ScenesDetection(cache=-1)


def test_there_is_no_scene_beyond_the_length():
    with pytest.raises(IndexError):
        Scenes("train", 3)[3]
    assert len(list(iter(Scenes("train", 3, size=32)))) == 3
