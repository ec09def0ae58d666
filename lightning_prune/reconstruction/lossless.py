"""Check that two models compute the same: the numbers behind the word lossless."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.errors import ReconstructionError
from lightning_prune.graph import call_model
from lightning_prune.graph.model_checks import without_values
from lightning_prune.graph.running import map_tensors, tensors_in, untouched
from lightning_prune.model_state.copying import copied

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class LosslessReport:
    """How far two models' outputs are apart.

    Attributes:
        max_abs_error: largest absolute difference of any output element.
        max_rel_error: that difference relative to the largest output element of the same tensor.
        dtype: what was computed in.
        tolerance: largest relative error that passes.
        outputs: number of output tensors compared.
        left: {group: why} of those that reconstruction could not make smaller.
    """

    max_abs_error: float
    max_rel_error: float
    dtype: str
    tolerance: float
    outputs: int
    left: dict[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether the relative error is within the tolerance."""
        return self.max_rel_error <= self.tolerance


def check_lossless(
    model: nn.Module,
    small: nn.Module,
    example_inputs: Any,
    *,
    dtype: torch.dtype | None = torch.float64,
    tolerance: float | None = None,
) -> LosslessReport:
    r"""Compare two models on the same inputs in eval mode.

    The error is :math:`\max_t \max|a_t - b_t| / \max|a_t|` over the output tensors :math:`t`. Where no output holds a
    number (a detector that finds nothing in the example inputs), :math:`t` are the outputs of all modules whose shapes
    are the same in both models.

    Args:
        model: usually the masked model.
        small: usually the reconstructed one.
        example_inputs: a tensor, a tuple, or a dict; the more varied, the stronger the check.
        dtype: copies of both models are compared in this type; None, or where the first model does not run in it:
            as they are.
        tolerance: default 1e-10 in float64, 1e-5 in float32.

    Raises:
        ReconstructionError: the models return different numbers or shapes of tensors, or none at all; or there are
            no values to compare, on the meta device.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> check_lossless(model, model, torch.ones(1, 2)).passed
        True
    """
    for net in (model, small):
        if (name := without_values(net)) is not None:
            raise ReconstructionError(
                f"{name!r} is on the meta device, where there are no values to compare: load the weights first, or "
                "build the smaller model unchecked, by reconstruct(model, graph, plan) without example_inputs"
            )
    try:
        reference = _outputs(model, example_inputs, dtype)
    except Exception:
        if dtype is None:
            raise
        # Some models insist on a type (torchvision's keypoints are float32): compared as they are then.
        dtype = None
        reference = _outputs(model, example_inputs, dtype)
    outputs = [reference, _outputs(small, example_inputs, dtype)]
    if [t.shape for t in outputs[0]] != [t.shape for t in outputs[1]]:
        shapes = [[list(t.shape) for t in side] for side in outputs]
        raise ReconstructionError(f"the models return tensors of different shapes: {shapes[0]} and {shapes[1]}")
    if not outputs[0]:
        raise ReconstructionError("the models return no tensor that could be compared")
    if not any(tensor.numel() for tensor in reference):
        inside = [_inner_outputs(net, example_inputs, dtype) for net in (model, small)]
        alike = [key for key, tensor in inside[0].items() if key in inside[1] and inside[1][key].shape == tensor.shape]
        if not alike:
            raise ReconstructionError(
                "the models return nothing but empty tensors, and none of their modules could be compared instead; "
                "give example_inputs in which they find something"
            )
        outputs = [[side[key] for key in alike] for side in inside]
    used = dtype or next((t.dtype for t in outputs[0] if t.is_floating_point()), torch.float32)
    worst_abs = worst_rel = 0.0
    for first, second in zip(*outputs, strict=True):
        if not first.numel():
            continue
        first, second = _real(first), _real(second)
        same = (first == second) | (first.isnan() & second.isnan())
        difference = torch.where(same, torch.zeros_like(first), (first - second).abs()).nan_to_num(
            nan=torch.inf, posinf=torch.inf
        )
        error = float(difference.max())
        scale = float(first[first.isfinite()].abs().max()) if first.isfinite().any() else 0.0
        worst_abs = max(worst_abs, error)
        worst_rel = max(worst_rel, error / scale if scale else (0.0 if error == 0 else float("inf")))
    limit = TOLERANCE.get(used, 1e-5) if tolerance is None else tolerance
    return LosslessReport(worst_abs, worst_rel, str(used).removeprefix("torch."), limit, len(outputs[0]))


def _real(tensor: Tensor) -> Tensor:
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).double()


def _outputs(model: nn.Module, example_inputs: Any, dtype: torch.dtype | None) -> list[Tensor]:
    with _running(model, example_inputs, dtype) as (runner, inputs):
        return tensors_in(call_model(runner, inputs))


def _inner_outputs(
    model: nn.Module, example_inputs: Any, dtype: torch.dtype | None
) -> dict[tuple[str, int, int], Tensor]:
    """What every module returns, by its path, the number of the call and the place in what it returned."""
    found: dict[tuple[str, int, int], Tensor] = {}
    calls: Counter[str] = Counter()

    def keep(name: str, output: Any) -> None:
        for place, tensor in enumerate(tensors_in(output)):
            if tensor.numel():
                found[name, calls[name], place] = tensor.clone()  # the next module may work in place
        calls[name] += 1

    with _running(model, example_inputs, dtype) as (runner, inputs), ExitStack() as hooks:
        for name, module in runner.named_modules():
            handle = module.register_forward_hook(lambda _, __, output, name=name: keep(name, output))
            hooks.callback(handle.remove)
        call_model(runner, inputs)
    return found


@contextmanager
def _running(model: nn.Module, example_inputs: Any, dtype: torch.dtype | None) -> Iterator[tuple[nn.Module, Any]]:
    """The model in eval mode and in that type, or a copy of it, and its inputs; left as it was."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    # Buffers too: float32 statistics under float64 weights would round both sides.
    floating = (t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point())
    same_type = dtype is None or all(t.dtype == dtype for t in floating)
    runner = model if same_type else copied(model).to(dtype)
    with untouched(runner):
        runner.eval()
        yield runner, example_inputs if dtype is None else map_tensors(cast, example_inputs)
