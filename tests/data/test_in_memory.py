"""Batches made as a whole: crops and flips as torchvision's, new tensors, samples made once, Lightning's samplers."""

from __future__ import annotations

import itertools

import pytest
import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.trainer.states import RunningStage
from pytorch_lightning.utilities.data import _update_dataloader
from torch.utils.data import DataLoader, DistributedSampler, Subset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as transform

from lightning_prune.data.in_memory import (
    ImageTensors,
    KeptSamples,
    crop_flip,
    random_crop_flip,
    standardised,
    whole_batch,
)
from tests.tasks.helpers import make_trainer

OUTCOMES = 9 * 9 * 2


def pixels(count, height=32, width=32):
    return torch.randint(256, (count, 3, height, width), dtype=torch.uint8)


def numbered(count=20, **options):
    """Image and label number i are all i."""
    numbers = torch.arange(count)
    return ImageTensors(numbers.to(torch.uint8)[:, None, None, None].repeat(1, 3, 2, 2), numbers, **options)


@pytest.mark.parametrize("size", [(32, 32), (9, 12)])
def test_crops_and_flips_are_torchvisions_pixel_for_pixel(size):
    """At every offset and both ways round, each image at its own."""
    torch.manual_seed(0)
    height, width = size
    places = list(itertools.product(range(9), range(9), (False, True)))
    images = pixels(len(places), *size)
    down, across, flipped = (torch.tensor(column) for column in zip(*places, strict=True))
    found = crop_flip(images, down, across, flipped, padding=4)
    for image, moved, (top, left, flip) in zip(images, found, places, strict=True):
        expected = transform.crop(transform.pad(image, [4]), top, left, height, width)
        assert torch.equal(moved, transform.horizontal_flip(expected) if flip else expected)


def outcomes(images):
    """Which of the 162 crops and flips each moved copy of `marked` is."""
    row, left, right = images[:, 0, 16, 16], images[:, 1, 16, 15], images[:, 1, 16, 16]
    across = torch.where(right > left, right - 16, right - 15)  # a flip swaps columns 15 and 16
    return (row - 16) * 18 + across * 2 + (right < left)


def marked(count):
    """Images whose pixels tell their row and column, counted from the edge of the padding."""
    line = torch.arange(32, dtype=torch.uint8) + 4
    image = torch.stack([line[:, None].expand(32, 32), line.expand(32, 32), line.expand(32, 32)])
    return image.expand(count, -1, -1, -1).contiguous()


def test_random_crops_and_flips_are_distributed_as_torchvisions():
    """Chi-square of all 162 outcomes in one batch, against even shares and against image by image; 5 deviations."""
    torch.manual_seed(0)
    each = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()])
    count = 30 * OUTCOMES
    moved = outcomes(random_crop_flip(marked(count)).long())
    reference = outcomes(torch.stack([each(image) for image in marked(count)]).long())
    new, old = (torch.bincount(of, minlength=OUTCOMES).double() for of in (moved, reference))
    assert len(new) == len(old) == OUTCOMES  # no outcome that is none
    freedom = OUTCOMES - 1
    limit = freedom + 5 * (2 * freedom) ** 0.5
    assert ((new - 30) ** 2 / 30).sum() < limit
    assert ((new - old) ** 2 / (new + old)).sum() < limit
    flips = torch.bincount(2 * (moved[:-1] % 2) + moved[1:] % 2, minlength=4).double()  # neighbours know nothing
    assert ((flips - flips.sum() / 4) ** 2 / (flips.sum() / 4)).sum() < 20


def test_crops_follow_the_global_seed_and_differ_between_processes(monkeypatch):
    images, moved = marked(64), []
    for seed, rank in ((3, None), (3, None), (3, 0), (3, 1), (4, None)):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda rank=rank: rank is not None)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        torch.manual_seed(seed)
        moved.append((random_crop_flip(images), torch.rand(())))
    first, again, rank_0, rank_1, other = moved
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[0], rank_0[0])
    assert not torch.equal(first[0], rank_1[0])
    assert not torch.equal(first[0], other[0])
    assert first[1] == again[1] == rank_1[1]  # what is drawn afterwards


def test_standardised_batches_are_torchvisions_bit_for_bit():
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    each = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(5, 3, 1, 1)
    expected = torch.stack([each(image.permute(1, 2, 0).numpy()) for image in images])
    assert torch.equal(standardised(images, mean, std), expected)


def test_whole_batches_are_new_tensors_in_the_order_asked_for():
    data = numbered()
    images, labels = data.__getitems__([7, 3, 3])
    assert labels.tolist() == [7, 3, 3]
    assert images[:, 0, 0, 0].tolist() == [7, 3, 3]
    images.zero_()
    labels.zero_()
    assert [int(label) for _, label in data] == list(range(20))
    assert [int(image.max()) for image, _ in data] == list(range(20))
    assert data[-1][1] == 19
    with pytest.raises(IndexError):
        data[20]


def test_transforms_see_a_batch_once():
    shapes = []
    data = numbered(transforms=lambda images: (shapes.append(tuple(images.shape)), images)[1])
    assert len(list(DataLoader(data, 8, collate_fn=whole_batch))) == 3
    assert shapes == [(8, 3, 2, 2), (8, 3, 2, 2), (4, 3, 2, 2)]
    assert next(iter(DataLoader(Subset(data, [5, 6, 7]), 2, collate_fn=whole_batch)))[1].tolist() == [5, 6]


def test_kept_samples_are_made_once_and_those_beyond_every_time():
    made = []
    data = KeptSamples(4, 2, lambda index: (made.append(index), index)[1], lambda samples: (samples, samples))
    for _ in range(2):
        assert data.__getitems__([3, 0, 1]) == ([3, 0, 1], [3, 0, 1])
    assert made == [3, 0, 1, 3]
    assert len(data) == 4
    assert [sample for sample, _ in data] == [0, 1, 2, 3]
    assert len(KeptSamples(4, 9, int, whole_batch).made) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_lightning_gives_loaders_other_samplers(workers):
    """As it does in every distributed run, to overfit, and to predict."""
    data = numbered(19)
    loader = DataLoader(data, 4, shuffle=True, drop_last=True, collate_fn=whole_batch, num_workers=workers)
    parts = []
    for rank in range(2):
        sampler = DistributedSampler(data, 2, rank, shuffle=True, drop_last=True)
        batches = list(_update_dataloader(loader, sampler))
        assert [images.shape for images, _ in batches] == [(4, 3, 2, 2)] * 2
        assert all(torch.equal(images[:, 0, 0, 0], labels) for images, labels in batches)
        parts.append(torch.cat([labels for _, labels in batches]).tolist())
    assert len({*parts[0], *parts[1]}) == 16
    assert parts[0] != sorted(parts[0])
    predicted = list(_update_dataloader(loader, range(19), RunningStage.PREDICTING))
    assert torch.cat([labels for _, labels in predicted]).tolist() == list(range(19))


class Seen(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.labels = []

    def training_step(self, batch):
        self.labels.append(batch[1].tolist())
        return self.weight**2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled train dataloader shuffling")
def test_a_trainer_overfits_the_first_batches(tmp_path):
    task = Seen()
    loader = DataLoader(numbered(), 4, shuffle=True, collate_fn=whole_batch)
    make_trainer(tmp_path, overfit_batches=2, max_epochs=2).fit(task, loader)
    assert task.labels == [[0, 1, 2, 3], [4, 5, 6, 7]] * 2
