"""What is left of a residual block without its branch; noted as plain data, so that a file can be loaded."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from lightning_prune.errors import CheckpointError

#: Activations that code may call as functions, by the name of the module that stands for them.
FUNCTIONS: dict[str, type[nn.Module]] = {
    kind.__name__: kind for kind in (nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish)
}
ACTIVATION = "activation"  # the name of one that was a function


class DroppedBlock(nn.Sequential):
    """A residual block that computes its shortcut and its activation alone; empty, it hands on what it is given.

    Attributes:
        remains: names of children that it keeps of the block, under their names, and perhaps of a function.

    Example:
        >>> import torch
        >>> DroppedBlock(nn.Sequential(nn.Conv2d(1, 1, 1)), ["ReLU"])(torch.tensor([-1.0, 2.0])).tolist()
        [0.0, 2.0]
    """

    def __init__(self, block: nn.Module, remains: Sequence[str]) -> None:
        super().__init__()
        self.remains = tuple(remains)
        own = dict(block.named_children())
        for name in remains:
            self.add_module(*((name, not_in_place(own[name])) if name in own else (ACTIVATION, FUNCTIONS[name]())))
        self.train(block.training)


def not_in_place(module: nn.Module) -> nn.Module:
    """The module itself, or a twin that leaves its input alone: what a block was given is others' too."""
    if not getattr(module, "inplace", False):
        return module
    twin = copy.copy(module)
    twin.inplace = False  # type: ignore[assignment]
    return twin


def dropped_blocks(model: nn.Module) -> dict[str, list[str]]:
    """{path: what remains} of the blocks that were dropped; plain data."""
    return {path: list(module.remains) for path, module in model.named_modules() if isinstance(module, DroppedBlock)}


def replace_blocks_(model: nn.Module, remains: Mapping[str, Sequence[str]]) -> Callable[[], None]:
    """Put in place of blocks what remains of them; returns what puts the blocks back."""
    before: list[tuple[nn.Module, str, nn.Module]] = []
    for path, names in remains.items():
        owner, _, name = path.rpartition(".")
        parent, block = model.get_submodule(owner), model.get_submodule(path)
        before.append((parent, name, block))
        parent._modules[name] = DroppedBlock(block, names)

    def undo() -> None:
        for parent, name, block in reversed(before):
            parent._modules[name] = block

    return undo


def drop_as_noted_(model: nn.Module, noted: Any, source: str) -> Callable[[], None]:
    """`replace_blocks_` by what a file notes, in a dense model or one whose blocks were dropped alike.

    Raises:
        CheckpointError: the note is none, or the model has no such block.
    """
    modules, left = dict(model.named_modules()), {}
    if not isinstance(noted, Mapping):
        raise CheckpointError(f"{source} is not a pruned checkpoint: its blocks are a {type(noted).__name__}")
    for path, remains in noted.items():
        block = modules.get(path)
        if not isinstance(remains, (list, tuple)) or not all(isinstance(name, str) for name in remains):
            raise CheckpointError(f"{source} is not a pruned checkpoint: {remains!r} remains of block {path!r}")
        if isinstance(block, DroppedBlock) and list(block.remains) == list(remains):
            continue
        known = {*FUNCTIONS, *(name for name, _ in block.named_children())} if block is not None else set()
        if block is None or not path or isinstance(block, DroppedBlock) or not known.issuperset(remains):
            raise CheckpointError(f"{source} belongs to another model: it has dropped a block {path!r}, unknown here")
        left[path] = remains
    if others := sorted(dropped_blocks(model).keys() - noted.keys()):
        raise CheckpointError(f"{source} belongs to another model: {others[0]!r} was dropped here, and not in the file")
    return replace_blocks_(model, left)
