"""Short names for settings, weights and data: what tells the cells of one comparison from those of another."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from pytorch_lightning import LightningDataModule, LightningModule, seed_everything
from torch import Tensor
from torch.utils._pytree import tree_leaves


def digest(settings: Any) -> str:
    """A name for plain data that changes with it.

    Example:
        >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})
        True
    """
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def weights_digest(task: LightningModule) -> str:
    """A name for all parameters and buffers."""
    found = hashlib.sha256()
    for name, tensor in task.state_dict().items():
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def data_summary(data: LightningDataModule) -> dict[str, Any]:
    """What tells this data from other data: its class, and the first batch of the training and the test part."""
    data.prepare_data()
    summary: dict[str, Any] = {"class": f"{type(data).__module__}.{type(data).__qualname__}"}
    for part, stage, loader in (("train", "fit", data.train_dataloader), ("test", "test", data.test_dataloader)):
        data.setup(stage)
        seed_everything(0, verbose=False)
        batches = loader()
        leaves = [leaf for leaf in tree_leaves(next(iter(batches))) if isinstance(leaf, Tensor)]
        # Three digits: they survive another machine's rounding.
        summary[part] = [len(batches), *([*leaf.shape, f"{leaf.double().mean():.3g}"] for leaf in leaves)]
    return summary
