"""Whether the tensors of a file are those of a model: their names as people have them, kinds, values and digest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_prune.errors import CheckpointError

_COMPILED = "_orig_mod"  # what torch.compile puts around a module
_DEPTH = 2  # keys that lead to a state dict: {"model": {"state_dict": ...}}

Keys = tuple[str, ...]


def state_dict_in(content: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    """The state dict in a file: all of it, or the only one that a training script has kept in it, under any name.

    Raises:
        CheckpointError: there is none, or there are several; what there is is named.
    """
    if _says_which(content) and isinstance(state := content.get("state_dict"), Mapping):
        return state
    for dimensions in (2, 1):  # a layer has a weight of two; where none is found, one of vectors may be meant
        found = dict(_state_dicts(content, dimensions))
        if len(found) == 1:
            return next(iter(found.values()))
        if found:
            paths = ["".join(f"[{key!r}]" for key in keys) for keys in found]
            line = f"torch.save(torch.load({source!r}, map_location='cpu'){paths[0]}, 'weights.pt')"
            raise CheckpointError(
                f"{source} holds {len(found)} state dicts, {some(paths)}, and does not say which is the model; save "
                f"the one that you mean alone, as this does with the first: {line}"
            )
    raise CheckpointError(
        f"{source} holds no state dict, but {some(list(map(str, content)))}; save the model's, "
        "torch.save(model.state_dict(), ...)"
    )


def _says_which(content: Mapping[str, Any]) -> bool:
    """Whether a file is of Lightning or of ours, which keep one model in it, under ``state_dict``."""
    return "pytorch-lightning_version" in content or str(content.get("format")).startswith("lightning-prune/")


def _state_dicts(content: Mapping[Any, Any], dimensions: int, keys: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """What may be a model's by its form, and the keys that lead to it; the state of optimizers is not."""
    if _is_state_dict(content, dimensions):
        yield keys, content
    elif len(keys) < _DEPTH and "param_groups" not in content:
        for key, value in content.items():
            if isinstance(key, str) and isinstance(value, Mapping):
                yield from _state_dicts(value, dimensions, (*keys, key))


def _is_state_dict(content: Mapping[Any, Any], dimensions: int) -> bool:
    """Whether names lead to tensors, more of them than to anything else, and one has so many dimensions."""
    if not all(isinstance(name, str) for name in content):
        return False
    tensors = [value for value in content.values() if isinstance(value, Tensor)]
    others = [name for name, value in content.items() if not isinstance(value, Tensor)]
    others = [name for name in others if not name.endswith("_extra_state")]  # of modules; anything
    return len(tensors) > len(others) and any(value.dim() >= dimensions for value in tensors)


def named_alike(own: Mapping[str, Any], state: Mapping[str, Any]) -> Mapping[str, Any]:
    """A state dict under the names that a model has, where they differ in what wrappers put in front of all of them.

    ``module.`` is DataParallel's, ``_orig_mod.`` compile's, ``model.`` that of the LightningModule around a network.
    Where more than that differs the state dict is returned as it is.
    """
    if own.keys() == state.keys():
        return state
    here = {_bare(name): name for name in own}
    there = {_bare(name): name for name in state}
    if "n_averaged" not in here:  # the counter of torch.optim.swa_utils.AveragedModel
        there.pop("n_averaged", None)
    if len(here) != len(own) or len(here) != len(there):
        return state
    prefix, longer = _prefix(sorted(here), sorted(there))
    if prefix is None:
        return state
    if longer == "there":
        return {name: state[there[prefix + bare]] for bare, name in here.items()}
    return {name: state[there[bare.removeprefix(prefix)]] for bare, name in here.items()}


def _prefix(here: list[str], there: list[str]) -> tuple[str | None, str]:
    """What all names of one side have in front of those of the other side, and which side it is."""
    if not here:
        return None, ""
    for side, longer, shorter in (("there", there, here), ("here", here, there)):
        prefix = longer[0].removesuffix(shorter[0])
        whole = not prefix or prefix.endswith(".")
        if whole and [f"{prefix}{name}" for name in shorter] == longer:
            return prefix, side
    return None, ""


def _bare(name: Any) -> str:
    return ".".join(part for part in str(name).split(".") if part != _COMPILED)


def check_names(own: Mapping[str, Any], state: Mapping[str, Any], source: str) -> None:
    """Refuse other names.

    Raises:
        CheckpointError: some are missing, or there are others.
    """
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(map(str, state.keys() - own.keys()))
    if missing or unexpected:
        raise CheckpointError(f"{source} belongs to another model: {_difference(missing, unexpected)}")


def _difference(missing: list[str], unexpected: list[str]) -> str:
    """Names that do not fit, of a model and of a file, both sorted."""
    for longer, shorter, way_out in (
        (unexpected, missing, "it is of the whole task (on the command line: --config)"),
        (missing, unexpected, "it is of a part of this model (on the command line: --model)"),
    ):
        prefix = _front(longer, shorter)
        if prefix:
            more = len(longer) - len(shorter)
            others = [name for name in longer if not name.startswith(prefix)][:more]
            beside = f", beside {some(others)}" if others else ""
            return f"its names {'have' if longer is unexpected else 'lack'} '{prefix}' in front{beside}; {way_out}"
    lists = {"missing": missing, "unexpected": unexpected}
    return ", ".join(f"{len(names)} {what} ({some(names)})" for what, names in lists.items() if names)


def _front(longer: list[str], shorter: list[str]) -> str:
    """What, put in front of every one of some names, makes them names of a list that is not much longer."""
    if not shorter or len(longer) > 2 * len(shorter):
        return ""
    found = (name.removesuffix(shorter[0]) for name in longer if name.endswith(f".{shorter[0]}"))
    return next((prefix for prefix in found if {f"{prefix}{name}" for name in shorter} <= {*longer}), "")


def check_kind(name: str, saved: Any, own: Any, source: str) -> None:
    """Refuse a tensor that a tensor of a model cannot take the values of.

    Raises:
        CheckpointError: none at all, one without values, or integers for real numbers.
    """
    if not isinstance(own, Tensor) or not isinstance(saved, Tensor):
        return
    if saved.is_meta or saved.layout != torch.strided or saved.is_quantized:
        kind = "without values" if saved.is_meta else "quantized" if saved.is_quantized else str(saved.layout)
        raise CheckpointError(f"{source}: {name!r} is {kind}, and a plain dense tensor is needed")
    if (saved.is_floating_point(), saved.is_complex()) != (own.is_floating_point(), own.is_complex()):
        types = (str(tensor.dtype).removeprefix("torch.") for tensor in (saved, own))
        raise CheckpointError(f"{source} belongs to another model: {name!r} is {' in the file and '.join(types)} here")


def check_values(state: Mapping[str, Any], source: str) -> None:
    """Refuse weights that are no numbers; shapes must be known to be right.

    Raises:
        CheckpointError: a tensor holds NaN.
    """
    wrong = [
        name
        for name, value in state.items()
        if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()) and has_nan(value)
    ]
    if wrong:
        raise CheckpointError(
            f"{source} holds NaN in {len(wrong)} of {len(state)} tensors ({some(wrong)}): its training diverged; take "
            "an earlier checkpoint"
        )


def has_nan(tensor: Tensor) -> bool:
    """Whether a tensor holds NaN, also one of a type that computes nothing, such as 8 bits."""
    short = tensor.is_floating_point() and tensor.dtype.itemsize == 1
    return bool((tensor.float() if short else tensor).isnan().any())


def digest_of(content: Any) -> str:
    """SHA-256 of plain data and tensors, whatever the order of a mapping's names.

    Example:
        >>> digest_of({"a": 1, "b": [torch.ones(2)]}) == digest_of({"b": (torch.ones(2),), "a": 1})
        True
        >>> digest_of(torch.ones(2)) == digest_of(torch.ones(2, 1))
        False
    """
    found = hashlib.sha256()
    _hash(content, found)
    return found.hexdigest()


def _hash(value: Any, found: Any) -> None:
    if isinstance(value, Tensor):
        found.update(f"tensor {value.dtype} {list(value.shape)};".encode())
        if value.layout == torch.strided and not value.is_meta and not value.is_quantized:
            plain = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
            found.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping):
        found.update(f"names {len(value)};".encode())
        for name in sorted(value, key=repr):
            found.update(f"{name!r}:".encode())
            _hash(value[name], found)
    elif isinstance(value, (list, tuple)):
        found.update(f"items {len(value)};".encode())
        for item in value:
            _hash(item, found)
    else:
        found.update(f"{value!r};".encode())


def some(names: list[str]) -> str:
    """The first three."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
