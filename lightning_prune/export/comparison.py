"""Whether a file computes what the model computes, input by input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.engines import Program
from lightning_prune.engines.base import tensors_of
from lightning_prune.errors import ExportError, PruningError, first_line
from lightning_prune.graph.running import call_model, map_tensors
from lightning_prune.measure import samples_in
from lightning_prune.reconstruction.lossless import distance

#: Tensors to compare one by one; how many decisions (classes, boxes) are the same, and of how many.
Compared = tuple[list[tuple[Tensor, Tensor]], int, int]
ENOUGH = 0.99  # of the decisions: two boxes that overlap just so are one or two, as rounding has it


@dataclass
class Comparison:
    """The worst of all inputs so far."""

    max_abs_error: float = 0.0
    max_rel_error: float = 0.0
    inputs: int = 0
    same: int = 0
    decisions: int = 0
    nan: int = 0  # inputs for which the model itself computes it

    @property
    def agreement(self) -> float | None:
        """Share of the decisions that are the same; None: the outputs are none."""
        return self.same / self.decisions if self.decisions else None

    def add(self, samples: int, pairs: Sequence[tuple[Tensor, Tensor]], same: int, decisions: int) -> None:
        """One more pass."""
        if pairs:
            absolute, relative = distance(*map(list, zip(*pairs, strict=True)))
            self.max_abs_error = max(self.max_abs_error, absolute)
            self.max_rel_error = max(self.max_rel_error, relative)
        self.inputs, self.same, self.decisions = self.inputs + samples, self.same + same, self.decisions + decisions


def compare_program(model: nn.Module, program: Program, passes: Sequence[Any]) -> Comparison:
    """Run both on all inputs.

    A module that decides by computed values has a method ``compared_outputs(expected, found)``, which says which
    tensors are to be compared and how many decisions are the same: rounding breaks ties, and not alike everywhere.
    Its attribute ``decisions`` says what they are.

    Raises:
        ExportError: one of them does not run, or returns other tensors than the other.
    """
    result = Comparison()
    compared: Callable[[list[Tensor], list[Tensor]], Compared] = getattr(model, "compared_outputs", compare_all)
    for inputs in passes:
        shapes = ", ".join(str(list(x.shape)) for x in tensors_of(inputs))
        with torch.no_grad():
            try:
                expected = tensors_of(call_model(model, map_tensors(torch.clone, inputs)))
            except Exception as error:
                raise ExportError(
                    f"{type(model).__name__} does not run on inputs drawn like the example, {shapes}: "
                    f"{first_line(error)}; give inputs=[...]"
                ) from error
            try:
                found = tensors_of(program.run(map_tensors(torch.clone, inputs)))
            except PruningError:
                raise
            except Exception as error:
                raise ExportError(f"the exported model does not run on {shapes}: {first_line(error)}") from error
        if [x.shape for x in expected] != [x.shape for x in found]:
            sides = [", ".join(str(list(x.shape)) for x in side) for side in (found, expected)]
            raise ExportError(
                f"the exported model returns {sides[0]} where the model returns {sides[1]}, for inputs of {shapes}"
            )
        result.add(max(1, samples_in(inputs)), *compared(expected, found))
        result.nan += any(x.is_floating_point() and bool(x.isnan().any()) for x in expected)
    return result


def compare_all(expected: list[Tensor], found: list[Tensor]) -> Compared:
    """Every tensor, and of scores (N, classes) the class that has the highest."""
    scores = [
        (one, other)
        for one, other in zip(expected, found, strict=True)
        if one.dim() == 2 and one.shape[1] > 1 and one.is_floating_point()
    ]
    same = sum(int((one.argmax(1) == other.argmax(1)).sum()) for one, other in scores)
    return list(zip(expected, found, strict=True)), same, sum(len(one) for one, _ in scores)
