"""Digits: the split, standardisation, augmentation on training batches only."""

from __future__ import annotations

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import RandomSampler, SequentialSampler

from lightning_prune.data import DigitsDataModule
from lightning_prune.data.digits import random_affine, split_digits
from tests.tasks.helpers import make_trainer

SIZES = {"train": 1257, "val": 180, "test": 360}


@pytest.fixture(scope="module")
def scans():
    return split_digits(seed=0, size=8)


def test_digits_are_split_70_10_20_by_class(scans):
    classes = np.bincount(load_digits().target)
    for part, size in SIZES.items():
        images, labels = scans[part].tensors
        assert images.shape == (size, 3, 8, 8)
        assert images.dtype == torch.float32
        assert labels.dtype == torch.int64
        share = np.bincount(labels, minlength=10) / size
        assert np.abs(share - classes / 1797).max() < 1.5 / size


def test_digits_parts_share_no_scan_and_leave_none_out(scans):
    """Undone standardisation gives back the scans, each as often as scikit-learn has it."""
    pixels = load_digits().data / 16
    images = torch.cat([part.tensors[0] for part in scans.values()])
    assert torch.equal(images[:, 0], images[:, 1])
    assert torch.equal(images[:, 0], images[:, 2])
    flat = images[:, 0].flatten(1).numpy()
    low, high = flat.min(), flat.max()
    found = (flat - low) / (high - low)
    order = np.lexsort(np.round(found * 16).T)
    expected = pixels[np.lexsort(np.round(pixels * 16).T)]
    np.testing.assert_allclose(found[order], expected, atol=1e-5)


def test_digits_split_is_fixed_by_the_seed(scans):
    again, other = split_digits(seed=0, size=8), split_digits(seed=1, size=8)
    for part in SIZES:
        assert torch.equal(again[part].tensors[0], scans[part].tensors[0])
        assert torch.equal(again[part].tensors[1], scans[part].tensors[1])
        assert not torch.equal(other[part].tensors[1], scans[part].tensors[1])


def test_digits_are_standardised_by_the_training_part():
    parts = split_digits(size=32)
    images = parts["train"].tensors[0]
    assert images.shape[1:] == (3, 32, 32)
    assert images.mean().item() == pytest.approx(0, abs=1e-4)
    assert images.std().item() == pytest.approx(1, abs=1e-3)
    assert parts["test"].tensors[0].mean().item() != pytest.approx(0, abs=1e-4)


def test_only_training_digits_are_augmented():
    module = DigitsDataModule(batch_size=60, size=16)
    module.setup()
    for part, loader in (("val", module.val_dataloader()), ("test", module.test_dataloader())):
        assert isinstance(loader.sampler, SequentialSampler)
        images, labels = (torch.cat(list(parts)) for parts in zip(*loader, strict=True))
        assert torch.equal(images, module.parts[part].tensors[0])
        assert torch.equal(labels, module.parts[part].tensors[1])
    images = next(iter(module.train_dataloader()))[0]
    originals = {image.numpy().tobytes() for image in module.parts["train"].tensors[0]}
    assert not any(image.numpy().tobytes() in originals for image in images)
    module = DigitsDataModule(batch_size=60, size=16, augment=False)
    module.setup()
    images = next(iter(module.train_dataloader()))[0]
    assert all(image.numpy().tobytes() in originals for image in images)


def test_training_digits_are_shuffled_and_can_drop_the_last_batch():
    module = DigitsDataModule(batch_size=100, size=8)
    module.setup()
    assert isinstance(module.train_dataloader().sampler, RandomSampler)
    assert len(module.train_dataloader()) == 13
    module.drop_last = True
    assert len(module.train_dataloader()) == 12


def test_augmented_digits_follow_the_global_seed():
    module = DigitsDataModule(batch_size=8, size=8)
    module.setup()
    batches = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        batches.append(next(iter(module.train_dataloader())))
    assert torch.equal(batches[0][0], batches[1][0])
    assert torch.equal(batches[0][1], batches[1][1])
    assert not torch.equal(batches[0][0], batches[2][0])


def test_no_motion_is_the_identity():
    images = torch.randn(4, 3, 9, 7)
    moved = random_affine(images, degrees=0, scale=0, shift=0)
    torch.testing.assert_close(moved, images, atol=1e-5, rtol=0)


def centre(images):
    """Centre of mass in pixels from the middle, (N, 2) as x, y; and mass."""
    side = images.shape[-1]
    line = torch.arange(side) - (side - 1) / 2
    mass = images.sum((1, 2, 3))
    x = (images.sum((1, 2)) * line).sum(1) / mass
    y = (images.sum((1, 3)) * line).sum(1) / mass
    return torch.stack([x, y], 1), mass


def blobs(count, x=0.0, y=0.0, side=61):
    """Smooth spots at an offset from the middle."""
    line = torch.arange(side) - (side - 1) / 2
    spot = torch.exp(-((line[None] - x) ** 2 + (line[:, None] - y) ** 2) / 32)
    return spot.expand(count, 1, side, side).contiguous()


def test_shifts_stay_within_two_pixels_and_use_them():
    torch.manual_seed(0)
    where, _ = centre(random_affine(blobs(500), degrees=0, scale=0))
    assert where.abs().max() <= 2.01
    assert (where.amax(0) > 1.8).all()
    assert (where.amin(0) < -1.8).all()


def test_scales_stay_within_a_tenth_and_use_it():
    torch.manual_seed(0)
    _, mass = centre(random_affine(blobs(500), degrees=0, shift=0))
    scale = (mass / centre(blobs(1))[1]).sqrt()
    assert 0.895 < scale.min() < 0.91
    assert 1.09 < scale.max() < 1.105


def test_rotations_stay_within_ten_degrees_and_use_them():
    torch.manual_seed(0)
    where, _ = centre(random_affine(blobs(500, x=10.0), scale=0, shift=0))
    angle = torch.rad2deg(torch.atan2(where[:, 1], where[:, 0]))
    assert where.norm(dim=1).sub(10).abs().max() < 0.1
    assert 9 < angle.max() < 10.1
    assert -10.1 < angle.min() < -9


def test_motion_repeats_the_border():
    images = torch.full((16, 3, 8, 8), 7.0)
    torch.testing.assert_close(random_affine(images), images)


class Probe(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10))
        self.seen = []

    def step(self, batch, part):
        self.seen.append((part, tuple(batch[0].shape)))
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch):
        return self.step(batch, "train")

    def validation_step(self, batch):
        self.step(batch, "val")

    def test_step(self, batch):
        self.step(batch, "test")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_digits_in_a_trainer(tmp_path):
    model, data = Probe(), DigitsDataModule(batch_size=16, size=8)
    limits = {f"limit_{part}_batches": 1 for part in ("train", "val", "test")}
    trainer = make_trainer(tmp_path, **limits, num_sanity_val_steps=0, log_every_n_steps=1)
    trainer.fit(model, data)
    trainer.test(model, data, verbose=False)
    assert model.seen == [(part, (16, 3, 8, 8)) for part in ("train", "val", "test")]
