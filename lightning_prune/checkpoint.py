"""Save a reconstructed model and load it into a freshly built dense one: tensors and plain data only."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_prune.errors import PruningError
from lightning_prune.plan import Plan
from lightning_prune.reconstruction import update_attributes_

FORMAT = "lightning-prune/1"


class CheckpointError(PruningError):
    """A file that is not a pruned checkpoint, or belongs to another model."""


def save(path: str | os.PathLike[str], small: nn.Module, plan: Plan, **extra: Any) -> None:
    """Write a reconstructed model: its weights, the plan, and plain extras; the file appears whole or not at all.

    Args:
        path: file to write.
        small: from `lightning_prune.reconstruct`.
        plan: the plan it was built with.
        extra: numbers, strings, lists, dicts and tensors to keep with it.

    Raises:
        CheckpointError: an extra that `torch.load(weights_only=True)` could not read back.
    """
    content = {"format": FORMAT, "plan": plan.to_dict(), "state_dict": small.state_dict(), "extra": extra}
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".part")
    os.close(handle)
    part = Path(name)
    try:
        torch.save(content, part)
        torch.load(part, map_location="cpu", weights_only=True)
        part.replace(target)
    except Exception as error:
        raise CheckpointError(f"cannot save to {target}: only tensors and plain data can be kept ({error})") from error
    finally:
        part.unlink(missing_ok=True)


def load(path: str | os.PathLike[str], dense_model: nn.Module) -> Plan:
    """Turn a freshly built dense model, in place, into the reconstructed one that `save` wrote.

    No trace is needed: the shapes are those of the saved tensors. On failure the model is as it was.

    Args:
        path: file written by `save`.
        dense_model: the same architecture, unpruned.

    Returns:
        The plan that the saved model was built with.

    Raises:
        CheckpointError: not such a file, or another model; both shapes are named.
    """
    content = read(path)
    state = content["state_dict"]
    tensors = dict(dense_model.named_parameters()) | dict(dense_model.named_buffers())
    own = dense_model.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unexpected:
        raise CheckpointError(f"{path} belongs to another model: missing {missing[:5]}, unexpected {unexpected[:5]}")
    for name, saved in state.items():
        if saved.dim() != own[name].dim() or any(s > d for s, d in zip(saved.shape, own[name].shape, strict=True)):
            raise CheckpointError(
                f"{path} belongs to another model: {name!r} is {list(saved.shape)} in the file and "
                f"{list(own[name].shape)} in the dense model"
            )
    for name, saved in state.items():
        tensor = tensors[name]
        if tensor.shape != saved.shape:
            tensor.grad = None
            tensor.data = saved.to(device=tensor.device, dtype=tensor.dtype, copy=True)
    dense_model.load_state_dict(state)
    update_attributes_(dense_model)
    return Plan.from_dict(content["plan"])


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a pruned checkpoint.

    Raises:
        CheckpointError: missing, not readable with ``weights_only=True``, or not in this format.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"there is no file {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} is not a pruned checkpoint: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a pruned checkpoint of format {FORMAT}")
    return content
