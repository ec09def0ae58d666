"""The hooks that hold masks: of a module that is called, of those inside it that are not, and both in copies."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from lightning_prune.reconstruction.holding import Held, HeldParameter, HoldZero, Zeros


class Hold(HoldZero):
    """Holds the parameters of one module; in a copy, which no handle can release, until they are cut.

    Attributes:
        lets_go: whether it is a copy's.
        nearest: how deep the calls reach that hold these parameters: to a module around them, or to their own.
    """

    def __init__(
        self, zeros: dict[str, list[Zeros]], held: Held, shapes: dict[str, torch.Size], lets_go: bool = False
    ) -> None:
        super().__init__(zeros, held)
        self.shapes, self.lets_go, self.nearest = shapes, lets_go, 0.0

    def __reduce__(self) -> tuple[Any, ...]:
        return Hold, (self.zeros, self.held, self.shapes, True)

    def __call__(self, module: nn.Module, _args: Any, reach: float = math.inf) -> None:
        """Clear the masked entries of the module's parameters if need be."""
        compiling = torch.compiler.is_dynamo_compiling()
        if not compiling:
            self.nearest = reach
        if self.lets_go:
            if any(self._is_cut(module, name) for name in self.zeros):
                return
            if not self.places and not compiling:
                self.places = [_HeldInCopy(module, name, self.shapes[name], of) for name, of in self.zeros.items()]
                self.held.places += self.places
        super().__call__(module, _args)

    def clear_one_(self, module: nn.Module, name: str) -> None:
        """Clear the masked entries of one of the module's parameters."""
        if not self._is_cut(module, name):
            super().clear_one_(module, name)

    def _is_cut(self, module: nn.Module, name: str) -> bool:
        parameter = module._parameters.get(name)
        if not self.lets_go or parameter is None or torch.jit.is_tracing():  # type: ignore[attr-defined]
            return False  # while it traces, torch has no numbers to compare
        return parameter.shape != self.shapes[name]


class HoldInside:
    """Module pre-hook for those inside it that are never called, while other code reads their parameters.

    ``F.conv2d(x, self.conv.weight)`` and `torch.nn.ParameterDict` are such. Those that are called, or have a module
    around them that is nearer and called, hold by themselves; without others it goes.
    """

    holds_masks = lets_go = True

    def __init__(self, inside: list[tuple[str, Hold]], depth: int) -> None:
        self.inside, self.depth = inside, depth
        self._called = False

    def __reduce__(self) -> tuple[Any, ...]:
        return HoldInside, (self.inside, self.depth)

    def __call__(self, module: nn.Module, _args: Any) -> None:
        """Clear masked entries that no other hook has cleared so far."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
            return
        self.inside = [(path, hold) for path, hold in self.inside if hold.nearest <= self.depth]
        for path, hold in self.inside:
            owner: Any = module
            for name in path.split("."):
                owner = None if owner is None else owner._modules.get(name)
            if owner is None or all(hook is not hold for hook in owner._forward_pre_hooks.values()):
                continue  # the user has replaced it
            if self._called:
                hold(owner, (), self.depth)
            else:  # it may be called in this forward, which marks what it clears
                hold.clear_(owner)
                hold.nearest = self.depth
        if not self._called:
            torch.clear_autocast_cache()
        self._called = True
        if not self.inside:
            for key in [key for key, hook in module._forward_pre_hooks.items() if hook is self]:
                module._forward_pre_hooks.pop(key, None)


class _HeldInCopy(HeldParameter):
    """A place that is empty once its parameter is cut."""

    __slots__ = ("shape",)

    def __init__(self, module: nn.Module, name: str, shape: torch.Size, zeros: list[Zeros]) -> None:
        self.shape = shape
        super().__init__(module, name, zeros)

    @property
    def clean(self) -> nn.Parameter | None:
        """What stood here and is zero as long as nobody writes to it."""
        found = _CLEAN.__get__(self)
        return found if found is None or found.shape == self.shape else None

    @clean.setter
    def clean(self, parameter: nn.Parameter | None) -> None:
        _CLEAN.__set__(self, parameter)

    def parameter(self) -> nn.Parameter | None:
        """What stands here now."""
        found = super().parameter()
        return found if found is None or found.shape == self.shape else None


_CLEAN: Any = vars(HeldParameter)["clean"]
