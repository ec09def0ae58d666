"""Save a reconstructed model and load it into a freshly built dense one: tensors and plain data only.

Lightning checkpoints that were written while a model was pruned are read as well.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint

from lightning_prune.errors import CheckpointError, PruningError
from lightning_prune.files import atomic
from lightning_prune.model_state.code_sizes import SIZES, following, own_class
from lightning_prune.model_state.cut_history import remember_history_
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
from lightning_prune.reconstruction.channel_map import history_in, noted
from lightning_prune.reconstruction.dropped_blocks import drop_as_noted_, dropped_blocks

FORMAT = "lightning-prune/1"
KEY = "lightning_prune"  # in a Lightning checkpoint: the format, the plan and the sizes


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
    with atomic(Path(path)) as stream:
        try:
            torch.save(content, stream)
            stream.flush()
            torch.load(stream.name, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:
            what = _some(_code_in(stream.name)) or type(error).__name__
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
    plan = reshape_(dense_model, content, str(path))
    dense_model.load_state_dict(content["state_dict"])
    return plan


def load_dense(path: str | os.PathLike[str], model: nn.Module) -> None:
    """Load the weights of an unpruned model: a state dict, alone or in a Lightning checkpoint.

    Args:
        path: file; no code in it is run.
        model: the same architecture; on failure as it was.

    Raises:
        CheckpointError: no such file, one that holds more than tensors and plain data, or another model's.
    """
    content = read_file(path)
    state, own = content.get("state_dict", content), model.state_dict()
    if not isinstance(state, Mapping) or not any(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds no state dict")
    other = next(iter(_other_shapes(own, state, str(path))), None)
    if other is not None:
        raise CheckpointError(
            f"{path} belongs to another model: {other!r} is {_shape(state[other])} in the file and "
            f"{_shape(own[other])} in the model; its arguments may differ"
        )
    model.load_state_dict(state)


def reshape_(dense_model: nn.Module, content: Mapping[str, Any], source: str = "the checkpoint") -> Plan:
    """Give a dense model, in place, the shapes of a pruned checkpoint, so that its state dict can be loaded.

    On failure the model is as it was. What is cut has no meaningful value until the state dict is loaded.
    """
    if knows_shapes(dense_model):
        raise CheckpointError("the dense model holds masks, which know its shapes; call MaskHandle.remove() first")
    undo = drop_as_noted_(dense_model, content.get("blocks", {}), source)
    try:
        return _reshape_(dense_model, content, source)
    except BaseException:
        undo()
        raise


def _reshape_(dense_model: nn.Module, content: Mapping[str, Any], source: str) -> Plan:
    try:
        buffers, plan = dict(content.get("buffers", {})), Plan.from_dict(content["plan"])  # a file may be older
        state = {**content["state_dict"], **buffers}
        sizes = {module: dict(values) for module, values in content["sizes"].items()}
        dense = {name: list(shape) for name, shape in content["dense"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{source} is not a pruned checkpoint: {error!r}") from error
    # Shared tensors are in a state dict under every name they have.
    tensors: dict[str, Tensor] = {
        **dict(dense_model.named_parameters(remove_duplicate=False)),
        **dict(dense_model.named_buffers(remove_duplicate=False)),
    }
    own = {**dense_model.state_dict(), **{name: tensors[name] for name in buffers if name in tensors}}
    smaller = {name: state[name] for name in _other_shapes(own, state, source)}
    for name in {**smaller, **dense}:
        saved = state.get(name)
        if name in tensors and saved is not None and _shape(saved) == _shape(own[name]):
            continue  # it has the pruned shape already
        expected = dense.get(name, _shape(saved))
        fits = name in tensors and isinstance(saved, Tensor) and saved.dim() == tensors[name].dim()
        if not fits or expected != _shape(own[name]):
            found = _shape(own[name]) if name in own else "not there"
            was = f" (cut from {expected})" if name in dense else ""
            raise CheckpointError(
                f"{source} belongs to another model: {name!r} is {_shape(saved)} in the file{was} and {found} in the "
                "dense model"
            )
    modules = dict(dense_model.named_modules())
    _check_sizes(modules, sizes, source)
    history = history_in(content.get("channels"), state, source)
    for name, saved in {**smaller, **buffers}.items():
        tensor = tensors[name]
        tensor.grad = None
        set_data_(tensor, dense_copy(saved.to(tensor), tensor))
    for module, values in sizes.items():
        for name, value in values.items():
            set_size_(modules[module], name, value)
    update_attributes_(dense_model)
    remember_dense_(dense_model, dense)
    remember_history_(dense_model, history)
    return plan


def _check_sizes(modules: Mapping[str, nn.Module], sizes: Mapping[str, Mapping[str, Any]], source: str) -> None:
    """Refuse size attributes that the modules do not have, and sizes that stand nowhere in their code."""
    for path, values in sizes.items():
        for name, value in values.items():
            if name == SIZES and path in modules:
                try:
                    following(own_class(modules[path]), frozenset(map(str, value)))
                except PruningError as error:
                    raise CheckpointError(f"{source} belongs to another model: {path!r}: {error}") from error
            elif not isinstance(getattr(modules.get(path), name, None), type(value)):
                raise CheckpointError(
                    f"{source} belongs to another model: {path!r} has no size {name!r} in the dense one"
                )


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
    if not Path(path).is_file():
        raise CheckpointError(f"there is no file {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        code = _code_in(path)
        if not code:
            raise CheckpointError(f"{path} cannot be read: damaged, cut short, or not a checkpoint at all") from error
        raise CheckpointError(
            f"{path} cannot be read: it holds {_some(code)}, and reading that would run code from the file; save the "
            "weights alone, torch.save(model.state_dict(), ...)"
        ) from error
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path} holds a {type(content).__name__}, it is not a checkpoint or a state dict")
    return content


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a pruned checkpoint."""
    content = read_file(path)
    if isinstance(content.get(KEY), dict) and "state_dict" in content:
        return {**content[KEY], "state_dict": content["state_dict"]}
    if content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a pruned checkpoint of format {FORMAT}")
    return content


def _code_in(path: str | os.PathLike[str]) -> list[str]:
    """Names of what a file would have to import; none if it cannot be told."""
    try:
        return sorted(get_unsafe_globals_in_checkpoint(path))
    except Exception:  # noqa: BLE001  # not a zip archive, a damaged pickle, ...
        return []


def _other_shapes(own: Mapping[str, Any], state: Mapping[str, Any], source: str) -> list[str]:
    """Names that are of another shape in a file than in a model; other names are refused."""
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unexpected:
        raise CheckpointError(f"{source} belongs to another model: {_difference(missing, unexpected)}")
    return [name for name, value in state.items() if _shape(value) != _shape(own[name])]


def _shape(value: Any) -> list[int] | str:
    """Of a tensor; modules may also keep other things in a state dict (`get_extra_state`)."""
    return list(value.shape) if isinstance(value, Tensor) else type(value).__name__


def _difference(missing: list[str], unexpected: list[str]) -> str:
    """Names that do not fit, of a model and of a file, both sorted."""
    for longer, shorter, way_out in (
        (unexpected, missing, "it is of the whole task (on the command line: --config)"),
        (missing, unexpected, "it is of a part of this model (on the command line: --model)"),
    ):
        prefix = longer[0].removesuffix(shorter[0]) if longer and shorter else ""
        if prefix and [f"{prefix}{name}" for name in shorter] == longer:
            return f"its names {'have' if longer is unexpected else 'lack'} '{prefix}' in front; {way_out}"
    lists = {"missing": missing, "unexpected": unexpected}
    return ", ".join(f"{len(names)} {what} ({_some(names)})" for what, names in lists.items() if names)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
