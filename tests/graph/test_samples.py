"""How many samples a batch has, and its first few, whatever its form."""

import pytest
import torch

from lightning_prune.graph.entry_points import EntryPoint, head
from lightning_prune.graph.running import tensors_in

IMAGES = [torch.rand(3, 8, 8 + k) for k in range(4)]
TARGETS = [{"boxes": torch.rand(k + 1, 4), "labels": torch.ones(k + 1, dtype=torch.int64)} for k in range(4)]
BATCHES = {
    "a tensor": torch.rand(4, 3, 8, 8),
    "images and labels": [torch.rand(4, 3, 8, 8), torch.arange(4)],
    "two views": ((torch.rand(4, 3, 8, 8), torch.rand(4, 3, 8, 8)), torch.arange(4)),
    "series": (torch.rand(4, 5, 8), torch.rand(4, 5, 8)),
    "images and targets in lists": (tuple(IMAGES), tuple(TARGETS)),
    "images without targets": [IMAGES],
    "pairs": list(zip(IMAGES, TARGETS, strict=True)),
    "bytes": [(image.mul(255).byte(), target) for image, target in zip(IMAGES, TARGETS, strict=True)],
    "dicts": [{"image": image, "target": target} for image, target in zip(IMAGES, TARGETS, strict=True)],
    "a dict of lists": {"images": IMAGES, "targets": TARGETS, "mean": torch.rand(3, 1, 1)},
}


@pytest.mark.parametrize("name", BATCHES)
def test_the_first_samples_are_whole(name: str) -> None:
    entry = EntryPoint("step", lambda *_: None, BATCHES[name])
    assert entry.samples == 4
    few = head(entry, 2)
    assert few.samples == 2
    assert len(list(few.inputs)) == (2 if entry.samples == len(entry.inputs) else len(entry.inputs))
    images = [tensor for tensor in tensors_in(few.inputs) if tensor.dim() == 3 and tensor.shape[1] == 8]
    assert all(len(image) == 3 for image in images)
    assert len(images) in (0, 2)
    assert head(entry, 4) is entry
