"""A name for tensors that changes with their values."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def digest_of(tensors: Mapping[str, Any]) -> str:
    """Of the values of a state dict, or of scores, under their names; what is no tensor does not count."""
    found = hashlib.sha256()
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor):
            found.update(name.encode())
            found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
