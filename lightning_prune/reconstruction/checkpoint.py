"""Save a reconstructed model and load it into a freshly built dense one: tensors and plain data only.

Lightning checkpoints that were written while a model was pruned are read as well.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import nn

from lightning_prune.errors import CheckpointError
from lightning_prune.files import atomic, disk_error
from lightning_prune.model_state.cutting import Undo, changed_sizes, dense_shapes
from lightning_prune.plan import Plan
from lightning_prune.reconstruction.channel_map import noted
from lightning_prune.reconstruction.dropped_blocks import dropped_blocks
from lightning_prune.reconstruction.file_shapes import FileShapes, dropped_as_noted, shape_of
from lightning_prune.reconstruction.state_dicts import (
    check_kind,
    check_names,
    check_values,
    digest_of,
    named_alike,
    some,
    state_dict_in,
)
from lightning_prune.tensor_files import code_in, read_tensors

FORMAT = "lightning-prune/1"
KEY = "lightning_prune"  # in a Lightning checkpoint: the format, the plan and the sizes
DIGEST = "digest"
_DIGESTED = (
    "plan",
    "sizes",
    "dense",
    "blocks",
    "channels",
    "buffers",
    "state_dict",
)  # not extras


def save(path: str | os.PathLike[str], small: nn.Module, plan: Plan, **extra: Any) -> None:
    """Write a reconstructed model: its weights, the plan, and plain extras; the file appears whole or not at all.

    Args:
        path: file to write.
        small: from `lightning_prune.reconstruct`.
        plan: the plan it was built with.
        extra: numbers, strings, lists, dicts and tensors to keep with it.

    Raises:
        CheckpointError: an extra that `torch.load(weights_only=True)` could not read back.
        PruningError: the file cannot be written.

    Example:
        >>> import tempfile, lightning_prune as lp
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
        >>> result = lp.prune(model, torch.zeros(1, 3, 8, 8), criterion="l1", ratio=0.5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(f"{folder}/small.pt", result.model, result.plan, accuracy=0.9)
        ...     torch.load(f"{folder}/small.pt", weights_only=True)["extra"]
        {'accuracy': 0.9}
    """
    content = {**shapes_of(small, plan), "state_dict": small.state_dict(), "extra": extra}
    content[DIGEST] = digest_of({name: content[name] for name in _DIGESTED})
    with atomic(Path(path)) as stream:
        try:
            torch.save(content, stream)
            stream.flush()
            read_tensors(stream.name)
        except Exception as error:
            if disk_error(error) is not None:
                raise
            what = some(code_in(Path(stream.name))) or type(error).__name__
            raise CheckpointError(f"cannot save to {path}: only tensors and plain data can be kept ({what})") from error


def shapes_of(small: nn.Module, plan: Plan) -> dict[str, Any]:
    """What `reshape_` needs beside the state dict; plain data."""
    dense, state = dense_shapes(small), small.state_dict()
    buffers = dict(small.named_buffers())
    return {
        "format": FORMAT,
        "plan": plan.to_dict(),
        "sizes": changed_sizes(small),
        "dense": dense,
        "blocks": dropped_blocks(small),
        "channels": noted(small),
        "buffers": {name: buffers[name] for name in dense if name in buffers and name not in state},  # not persistent
    }


def load(path: str | os.PathLike[str], dense_model: nn.Module) -> Plan:
    """Turn a freshly built dense model, or one that was pruned alike, in place, into the one that was saved.

    No trace is needed: the shapes are those of the saved tensors. On failure the model is as it was.

    Args:
        path: file written by `save`, or a Lightning checkpoint written while a `lightning_prune.PruneCallback` ran;
            then the model is the LightningModule.
        dense_model: the same architecture, unpruned or with the shapes of the file.

    Returns:
        The plan that the saved model was built with; without groups if a Lightning checkpoint is of the dense model.

    Raises:
        CheckpointError: not such a file, or another model; both shapes are named.

    Example:
        >>> import tempfile, lightning_prune as lp
        >>> def dense() -> nn.Module:
        ...     return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
        >>> result = lp.prune(dense(), torch.zeros(1, 3, 8, 8), criterion="l1", ratio=0.5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(f"{folder}/small.pt", result.model, result.plan)
        ...     plan = load(f"{folder}/small.pt", model := dense())
        >>> plan == result.plan, model[0]
        (True, Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1)))
    """
    content = read(path)
    shapes = FileShapes.read(content, str(path))
    with dropped_as_noted(dense_model, content, str(path)):
        completed = _completed(shapes, dense_model)
        changed = completed.check(dense_model)
        check_values(shapes.state, str(path))
        _check_digest(content, str(path))
        with _back_on_failure(dense_model):
            completed.apply_(dense_model, changed)
            _load_(dense_model, content["state_dict"], str(path))
    return shapes.plan


def load_dense(path: str | os.PathLike[str], model: nn.Module) -> None:
    """Load the weights of an unpruned model: a state dict, alone or in a checkpoint of Lightning or a training script.

    It may lie under ``"state_dict"``, ``"model"`` and the like, its names may have what wrappers put in front of them
    (``module.``, ``_orig_mod.``, ``model.``), its numbers another precision. Files of torch or safetensors.

    Args:
        path: file; no code in it is run.
        model: the same architecture; on failure as it was.

    Raises:
        CheckpointError: no such file, one that holds more than tensors and plain data, NaN, or another model's.
    """
    content, own = read_file(path), model.state_dict()
    state = named_alike(own, state_dict_in(content, str(path)))
    pruned = "; it is of a pruned model: lightning_prune.load" if is_pruned(content) else ""
    _check_dense(own, state, str(path), pruned)
    check_values(state, str(path))
    with _back_on_failure(model):
        _load_(model, state, str(path))


def reshape_(dense_model: nn.Module, content: Mapping[str, Any], source: str = "the checkpoint") -> Plan:
    """Give a dense model, in place, the shapes of a pruned checkpoint, so that its state dict can be loaded.

    On failure the model is as it was. What is cut has no meaningful value until the state dict is loaded.
    """
    shapes = FileShapes.read(content, source)
    with dropped_as_noted(dense_model, content, source):
        shapes = _completed(shapes, dense_model)
        shapes.apply_(dense_model, shapes.check(dense_model))
    return shapes.plan


def check_fits(model: nn.Module, content: Mapping[str, Any], source: str) -> None:
    """Refuse a Lightning checkpoint whose weights are not those of a dense model, or of it pruned; change nothing.

    Raises:
        CheckpointError: names, shapes or kinds of tensors differ, or are not those of the checkpoint's own plan.
    """
    own, state = model.state_dict(), content["state_dict"]
    if is_pruned(content):
        shapes = FileShapes.read({**content[KEY], "state_dict": state}, source)
        with dropped_as_noted(model, content[KEY], source, always_back=True):
            shapes.check(model)
    else:
        _check_dense(own, state, source)
    check_values(state, source)


def _is_strict(model: nn.Module) -> bool:
    """Whether a state dict must hold all of its tensors; a LightningModule says so in ``strict_loading``."""
    return getattr(model, "strict_loading", True) is not False


def _completed(shapes: FileShapes, model: nn.Module) -> FileShapes:
    """With the model's own tensors where it leaves some out of its files, such as a frozen teacher's."""
    if _is_strict(model):
        return shapes
    own, known = model.state_dict(), {*shapes.dense, *shapes.buffers}
    left_out = {name: value for name, value in own.items() if name not in known and name not in shapes.state}
    named = {name: value for name, value in shapes.state.items() if name in known or name in own}
    return replace(shapes, state={**left_out, **named})


def _load_(model: nn.Module, state: Mapping[str, Any], source: str) -> None:
    """Load a state dict, as strictly as the model wants it."""
    try:
        model.load_state_dict(state, **({} if _is_strict(model) else {"strict": False}))
    except Exception as error:
        raise CheckpointError(
            f"{type(model).__name__} cannot take the weights of {source}: {shorten(str(error), 240)}. A "
            "LightningModule whose state_dict leaves some of its tensors out says so: self.strict_loading = False"
        ) from error


@contextmanager
def _back_on_failure(model: nn.Module) -> Iterator[None]:
    """Put back shapes, values and attributes if something is raised."""
    undo = Undo(model)
    values = [(data, data.clone()) for _, data, _ in undo.tensors]
    attributes = [(vars(module), dict(vars(module))) for module in model.modules()]
    try:
        yield
    except BaseException:
        for data, value in values:
            data.copy_(value)
        undo()
        for own, before in attributes:
            own.clear()
            own.update(before)
        raise


def _check_dense(own: Mapping[str, Any], state: Mapping[str, Any], source: str, hint: str = "") -> None:
    """Refuse tensors that have other names, shapes or kinds than a dense model's."""
    check_names(own, state, source)
    for name, value in state.items():
        if shape_of(value) != shape_of(own[name]):
            raise CheckpointError(
                f"{source} belongs to another model: {name!r} is {shape_of(value)} in the file and "
                f"{shape_of(own[name])} in the model; its arguments may differ{hint}"
            )
    for name, value in state.items():
        check_kind(name, value, own[name], source)


class PrunedCheckpoints:
    """Mixin: ``load_from_checkpoint`` of a LightningModule that also takes checkpoints of pruned runs.

    Example:
        >>> from pytorch_lightning import LightningModule
        >>> class Task(PrunedCheckpoints, LightningModule):
        ...     '''Task.load_from_checkpoint("last.ckpt") builds the dense model, then cuts it to the file's shapes.'''
    """

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Lightning calls it before the state dict is loaded."""
        if KEY in checkpoint and getattr(self, "_trainer", None) is None:  # in a Trainer the callbacks do it
            assert isinstance(self, nn.Module)
            reshape_(self, {**checkpoint[KEY], "state_dict": checkpoint["state_dict"]})
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]


def read_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a checkpoint of any kind holds."""
    return read_tensors(path, CheckpointError)


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a pruned checkpoint."""
    content = read_file(path)
    if isinstance(content.get(KEY), dict) and "state_dict" in content:
        return {**content[KEY], "state_dict": content["state_dict"]}
    if content.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is not a pruned checkpoint of format {FORMAT}; name a file of lightning_prune.save"
        )
    return content


def is_pruned(content: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is of a pruned model."""
    noted = content if content.get("format") == FORMAT else content.get(KEY)
    plan = noted.get("plan") if isinstance(noted, Mapping) else None
    return content.get("format") == FORMAT or (isinstance(plan, Mapping) and bool(plan.get("groups")))


def _check_digest(content: Mapping[str, Any], source: str) -> None:
    """Refuse what is not as it was saved; files that are older, and Lightning's, have no digest."""
    stored = content.get(DIGEST)
    try:
        if stored is None or stored == digest_of({name: content.get(name) for name in _DIGESTED}):
            return
    except RecursionError:
        pass
    raise CheckpointError(
        f"{source} is damaged or was changed: its content has not the digest that was stored with it; write it again "
        "with lightning_prune.save"
    )
