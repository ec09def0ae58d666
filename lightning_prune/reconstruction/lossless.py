"""Check that two models compute the same: the numbers behind the word lossless."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.errors import ReconstructionError, first_line
from lightning_prune.graph.entry_points import EntryPoint, double_by_default, entry_points
from lightning_prune.graph.model_checks import without_values
from lightning_prune.graph.other_sizes import takes_size
from lightning_prune.graph.running import KeepsDouble, RunningModules, normalise_mode, tensors_in, untouched
from lightning_prune.model_state.copying import copied, copied_to
from lightning_prune.model_state.cutting import is_rescaled

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}

MARK = 1e5  # times what differs: an error of 1e-4 beside it is still seen


@dataclass(frozen=True)
class LosslessReport:
    """How far two models' outputs are apart.

    Attributes:
        max_abs_error: largest absolute difference of any output element.
        max_rel_error: that difference relative to the largest output element of the same tensor, marks aside.
        dtype: what was computed in.
        tolerance: largest relative error that passes.
        outputs: number of output tensors compared.
        left: {group: why} of those that reconstruction could not make smaller.
        compared: what was run on both models: the forward, also at another size, steps of training.
    """

    max_abs_error: float
    max_rel_error: float
    dtype: str
    tolerance: float
    outputs: int
    left: dict[str, str] = field(default_factory=dict)
    compared: tuple[str, ...] = ()

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

    The error is :math:`\max_t \max|a_t - b_t| / \max|a_t|` over the output tensors :math:`t`. Numbers that are the same
    in both and far beyond the others (more than 1e5 times the largest that differs, and the median) are marks, of
    padding say, and count for no maximum. Where no output holds a number (a detector that finds nothing in the example
    inputs), :math:`t` are the outputs of all modules whose shapes are the same in both models. NaN in either makes both
    errors infinite: it tells nothing, and passes for nothing.

    Args:
        model: usually the masked model.
        small: usually the reconstructed one.
        example_inputs: a tensor, a tuple, or a dict; the more varied, the stronger the check.
        dtype: copies of both models are compared in this type; None, or where the first model does not run in it:
            as they are.
        tolerance: default 1e-10 in float64, 1e-5 in float32; that of the models' own type where pruning multiplied a
            weight (`lightning_prune.graph.rescaled_means`), which their type rounds.

    Raises:
        ReconstructionError: the second model does not run, the models return different numbers or shapes of tensors, or
            none at all; or there are no values to compare, on the meta device.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> check_lossless(model, model, torch.ones(1, 2)).passed
        True
    """
    entry = entry_points(example_inputs)[0]
    try:
        return compare(Side(model), Side(small), entry, dtype=dtype, tolerance=tolerance)
    except CannotRunError as error:
        raise error.__cause__ or error from None


class CannotRunError(Exception):
    """A model fails on an entry point, for which it says in which module and why."""


class Side:
    """A model to be compared, as it is or copied to another type.

    own: always copied. precise: what some of its weights are in float64.
    """

    def __init__(self, model: nn.Module, *, own: bool = False, precise: Mapping[str, Tensor] | None = None) -> None:
        self.model = model
        self.own = own
        self.precise = precise or {}
        self._copies: dict[torch.dtype | None, nn.Module] = {}
        self._leading: dict[str, list[int]] = {}  # sizes of what entry points returned

    def outputs(
        self, entry: EntryPoint, training: bool, dtype: torch.dtype | None, seed: int = 0, *, keeps: bool = False
    ) -> list[Tensor]:
        """The tensors that it returns. keeps: code that casts to a shorter type gets float64."""
        with self._running(training, dtype, seed) as (model, running), KeepsDouble() if keeps else nullcontext():
            outputs = tensors_in(_run(model, entry, dtype, running))
        sizes = self._leading[entry.name] = [len(output) for output in outputs if output.dim()]
        if entry.varied is not None and not takes_size(entry, self._leading.get(entry.varied.name, []), sizes):
            raise CannotRunError(": it makes other rows than samples")
        return outputs

    def inner_outputs(
        self, entry: EntryPoint, training: bool, dtype: torch.dtype | None
    ) -> dict[tuple[str, int, int], Tensor]:
        """What every module returns, by its path, the number of the call and the place in what it returned."""
        found: dict[tuple[str, int, int], Tensor] = {}
        calls: Counter[str] = Counter()

        def keep(name: str, output: Any) -> None:
            for place, tensor in enumerate(tensors_in(output)):
                if tensor.numel():
                    found[name, calls[name], place] = tensor.clone()  # the next module may work in place
            calls[name] += 1

        with self._running(training, dtype, 0) as (model, running), ExitStack() as hooks:
            for name, module in model.named_modules():
                handle = module.register_forward_hook(lambda _, __, output, name=name: keep(name, output))
                hooks.callback(handle.remove)
            _run(model, entry, dtype, running)
        return found

    def in_type(self, dtype: torch.dtype | None) -> nn.Module:
        """The model, or a copy of it, with all floating tensors in that type; None: in its own."""
        if dtype not in self._copies:
            # Buffers too: float32 statistics under float64 weights would round both sides.
            floating = (t for t in (*self.model.parameters(), *self.model.buffers()) if t.is_floating_point())
            same_type = dtype is None or all(t.dtype == dtype for t in floating)
            if dtype is not None and not same_type:
                model = copied_to(self.model, dtype)
            else:
                model = copied(self.model) if self.own else self.model
            self._copies[dtype] = model
            for name in self.precise if dtype == torch.float64 and not same_type else ():
                model.get_parameter(name).data = self.precise[name]
        return self._copies[dtype]

    @contextmanager
    def _running(
        self, training: bool, dtype: torch.dtype | None, seed: int
    ) -> Iterator[tuple[nn.Module, RunningModules]]:
        model = self.in_type(dtype)
        running = RunningModules(model)
        with untouched(model), double_by_default() if dtype == torch.float64 else nullcontext(), running:
            normalise_mode(model, training=training)
            torch.manual_seed(seed)
            yield model, running


def _run(model: nn.Module, entry: EntryPoint, dtype: torch.dtype | None, running: RunningModules) -> Any:
    try:
        return entry.own().mapped(lambda t: t.to(dtype) if t.is_floating_point() and dtype else t).run(model, running)
    except Exception as error:
        place = next((f" in module {path!r}" for path in running.paths if path), "")
        raise CannotRunError(f"{place}: {first_line(error)}") from error


def compare(
    model: Side,
    small: Side,
    entry: EntryPoint,
    *,
    training: bool = False,
    dtype: torch.dtype | None = torch.float64,
    tolerance: float | None = None,
) -> LosslessReport:
    """`check_lossless` for any entry point and either mode.

    Raises:
        CannotRunError: the first model does not run.
        ReconstructionError: the second does not, or returns other numbers or shapes of tensors.
    """
    for side in (model, small):
        if (name := without_values(side.model)) is not None:
            raise ReconstructionError(
                f"{name!r} is on the meta device, where there are no values to compare: load the weights first, or "
                "build the smaller model unchecked, by reconstruct(model, graph, plan) without example_inputs"
            )
    try:
        reference = model.outputs(entry, training, dtype)
    except CannotRunError:
        if dtype is None:
            raise
        # Some models insist on a type (torchvision's keypoints are float32): compared as they are then.
        dtype = None
        reference = model.outputs(entry, training, dtype)
    try:
        outputs = [reference, small.outputs(entry, training, dtype)]
    except CannotRunError as error:
        raise ReconstructionError(
            f"the reconstructed model does not run {entry.name}{error}. Some size is fixed in the Python code there (a "
            "view, a split): leave the layers before it out with ignore=[...]; or it meets channels that no trace "
            "followed there: pass what runs it as also=[...]"
        ) from error.__cause__
    if [t.shape for t in outputs[0]] != [t.shape for t in outputs[1]]:
        shapes = [[list(t.shape) for t in side] for side in outputs]
        raise ReconstructionError(f"the models return tensors of different shapes: {shapes[0]} and {shapes[1]}")
    if entry.required and not outputs[0]:
        raise ReconstructionError("the models return no tensor that could be compared")
    if entry.required and not any(tensor.numel() for tensor in reference):
        inside = [side.inner_outputs(entry, training, dtype) for side in (model, small)]
        alike = [key for key, tensor in inside[0].items() if key in inside[1] and inside[1][key].shape == tensor.shape]
        if not alike:
            raise ReconstructionError(
                "the models return nothing but empty tensors, and none of their modules could be compared instead; "
                "give example_inputs in which they find something"
            )
        outputs = [[side[key] for key in alike] for side in inside]
    elif dtype == torch.float64 and distance(*outputs)[1] > TOLERANCE[dtype]:
        # A mean that code takes in float32, say, is rounded otherwise over fewer channels.
        with suppress(CannotRunError, ReconstructionError):
            kept = [side.outputs(entry, training, dtype, keeps=True) for side in (model, small)]
            outputs = kept if distance(*kept)[1] <= TOLERANCE[dtype] else outputs
    used = dtype or next((t.dtype for t in outputs[0] if t.is_floating_point()), torch.float32)
    worst_abs, worst_rel = distance(*outputs)
    limit = _limit(model, small, used) if tolerance is None else tolerance
    name = str(used).removeprefix("torch.")
    return LosslessReport(worst_abs, worst_rel, name, limit, len(outputs[0]), compared=(entry.name,))


def _limit(model: Side, small: Side, used: torch.dtype) -> float:
    """What passes; weights that pruning multiplied (`model_state.cutting.rescale_means_`) are rounded to their type."""
    own = [used]
    for side in (model, small):
        if is_rescaled(side.model) and not side.precise:
            own += [parameter.dtype for parameter in side.model.parameters() if parameter.is_floating_point()]
    return max(TOLERANCE.get(dtype, 1e-5) for dtype in own)


def distance(first: list[Tensor], second: list[Tensor]) -> tuple[float, float]:
    """Largest absolute and relative difference of tensors of the same shapes; NaN differs from everything."""
    worst_abs = worst_rel = 0.0
    for one, other in zip(first, second, strict=True):
        if not one.numel():
            continue
        one, other = _real(one), _real(other)
        difference = torch.where(one == other, torch.zeros_like(one), (one - other).abs()).nan_to_num(
            nan=torch.inf, posinf=torch.inf
        )
        error = float(difference.max())
        if error == 0:
            continue
        size = one.abs().where(one.isfinite(), 0)
        usual = max(float(size.where(difference > 0, 0).max()), _median(size[size > 0]))
        scale = float(size.where(size <= MARK * usual, 0).max())
        worst_abs = max(worst_abs, error)
        worst_rel = max(worst_rel, error / scale if scale else float("inf"))
    return worst_abs, worst_rel


def _median(numbers: Tensor) -> float:
    return float(numbers.median()) if len(numbers) else 0.0


def _real(tensor: Tensor) -> Tensor:
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).double()
