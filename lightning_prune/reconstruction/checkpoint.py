"""Save a reconstructed model and load it into a freshly built dense one: tensors and plain data only.

Lightning checkpoints that were written while a model was pruned are read as well.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.errors import CheckpointError
from lightning_prune.files import atomic
from lightning_prune.model_state.cutting import (
    changed_sizes,
    dense_shapes,
    remember_dense_,
    set_size_,
    update_attributes_,
)
from lightning_prune.model_state.memory import dense_copy, set_data_
from lightning_prune.model_state.preservation import knows_shapes
from lightning_prune.plan import Plan
from lightning_prune.reconstruction.file_checks import check_plan, check_sizes
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
_DIGESTED = ("plan", "sizes", "dense", "buffers", "state_dict")  # extras are everybody's to add to


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
        except OSError:
            raise
        except Exception as error:
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
    shapes = _Shapes.read(content, str(path))
    changed = shapes.check(dense_model)
    check_values(shapes.state, str(path))
    _check_digest(content, str(path))
    shapes.apply_(dense_model, changed)
    dense_model.load_state_dict(content["state_dict"])
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
    check_names(own, state, str(path))
    other = next((name for name, value in state.items() if _shape(value) != _shape(own[name])), None)
    if other is not None:
        pruned = "; it is of a pruned model: lightning_prune.load" if is_pruned(content) else ""
        raise CheckpointError(
            f"{path} belongs to another model: {other!r} is {_shape(state[other])} in the file and "
            f"{_shape(own[other])} in the model; its arguments may differ{pruned}"
        )
    for name, value in state.items():
        check_kind(name, value, own[name], str(path))
    check_values(state, str(path))
    model.load_state_dict(state)


def reshape_(dense_model: nn.Module, content: Mapping[str, Any], source: str = "the checkpoint") -> Plan:
    """Give a dense model, in place, the shapes of a pruned checkpoint, so that its state dict can be loaded.

    On failure the model is as it was. What is cut has no meaningful value until the state dict is loaded.
    """
    shapes = _Shapes.read(content, source)
    shapes.apply_(dense_model, shapes.check(dense_model))
    return shapes.plan


def check_fits(model: nn.Module, content: Mapping[str, Any], source: str) -> None:
    """Refuse a Lightning checkpoint whose weights are not those of a dense model, or of it pruned; change nothing.

    Raises:
        CheckpointError: names, shapes or kinds of tensors differ, or are not those of the checkpoint's own plan.
    """
    own, state = model.state_dict(), content["state_dict"]
    if is_pruned(content):
        shapes = _Shapes.read({**content[KEY], "state_dict": state}, source)
        shapes.check(model)
    else:
        check_names(own, state, source)
        other = next((name for name, value in state.items() if _shape(value) != _shape(own[name])), None)
        if other is not None:
            raise CheckpointError(
                f"{source} belongs to another model: {other!r} is {_shape(state[other])} in the file and "
                f"{_shape(own[other])} in the model; its arguments may differ"
            )
        for name, value in state.items():
            check_kind(name, value, own[name], source)
    check_values(state, source)


@dataclass(frozen=True)
class _Shapes:
    """What a pruned checkpoint says of the model that it is of."""

    plan: Plan
    state: dict[str, Any]  # with the buffers that no state dict holds
    buffers: dict[str, Any]
    sizes: dict[str, dict[str, Any]]
    dense: dict[str, list[int]]
    source: str

    @classmethod
    def read(cls, content: Mapping[str, Any], source: str) -> _Shapes:
        """From the content of a file."""
        try:
            buffers, plan = dict(content.get("buffers", {})), Plan.from_dict(content["plan"])  # a file may be older
            state = {**content["state_dict"], **buffers}
            sizes = {module: dict(values) for module, values in content["sizes"].items()}
            dense = {name: list(shape) for name, shape in content["dense"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{source} is not a pruned checkpoint: {error!r}") from error
        return cls(plan, state, buffers, sizes, dense, source)

    def check(self, model: nn.Module) -> list[str]:
        """Refuse a model that cannot become the one in the file; the names of the tensors to change otherwise."""
        if knows_shapes(model):
            raise CheckpointError("the dense model holds masks, which know its shapes; call MaskHandle.remove() first")
        tensors = _tensors(model)
        own = {**model.state_dict(), **{name: tensors[name] for name in self.buffers if name in tensors}}
        check_names(own, self.state, self.source)
        smaller = [name for name, value in self.state.items() if _shape(value) != _shape(own[name])]
        for name in dict.fromkeys((*smaller, *self.dense)):
            saved = self.state.get(name)
            if name in tensors and saved is not None and _shape(saved) == _shape(own[name]):
                continue  # it has the pruned shape already
            expected = self.dense.get(name, _shape(saved))
            fits = name in tensors and isinstance(saved, Tensor) and saved.dim() == tensors[name].dim()
            if not fits or expected != _shape(own[name]):
                found = _shape(own[name]) if name in own else "not there"
                was = f" (cut from {expected})" if name in self.dense else ""
                raise CheckpointError(
                    f"{self.source} belongs to another model: {name!r} is {_shape(saved)} in the file{was} and {found} "
                    "in the dense model"
                )
            assert saved is not None
            if not all(1 <= new <= old for new, old in zip(saved.shape, tensors[name].shape, strict=True)):
                raise CheckpointError(
                    f"{self.source} is damaged: {name!r} is {_shape(saved)}, which cannot be cut from {expected}"
                )
        for name, saved in self.state.items():
            check_kind(name, saved, own[name], self.source)
        check_plan(self.plan, self.state, dict(model.named_modules()), own, self.source)
        check_sizes(dict(model.named_modules()), self.sizes, self.source)
        return smaller

    def apply_(self, model: nn.Module, smaller: Iterable[str]) -> None:
        """Cut the model, which `check` has found to fit."""
        tensors, modules = _tensors(model), dict(model.named_modules())
        for name, saved in {**{name: self.state[name] for name in smaller}, **self.buffers}.items():
            tensor = tensors[name]
            tensor.grad = None
            set_data_(tensor, dense_copy(saved.to(tensor), tensor))
        for module, values in self.sizes.items():
            for name, value in values.items():
                set_size_(modules[module], name, value)
        update_attributes_(model)
        remember_dense_(model, self.dense)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Shared tensors are in a state dict under every name they have."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


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
        raise CheckpointError(f"{path} is not a pruned checkpoint of format {FORMAT}")
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


def _shape(value: Any) -> list[int] | str:
    """Of a tensor; modules may also keep other things in a state dict (`get_extra_state`)."""
    return list(value.shape) if isinstance(value, Tensor) else type(value).__name__
