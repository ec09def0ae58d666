"""Rehearse: run all that the user runs on the smaller model before it is kept, and compare it with the masked one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_prune.errors import ReconstructionError, first_line
from lightning_prune.graph.entry_points import EntryPoint, head, is_forward
from lightning_prune.graph.other_sizes import odd_sizes, other_sizes
from lightning_prune.graph.running import RunningModules
from lightning_prune.model_state.preservation import copy_without_masks, preserved
from lightning_prune.reconstruction.lossless import CannotRunError, LosslessReport, Side, compare, distance
from lightning_prune.reconstruction.same_draws import SameDraws

SAMPLES = 2  # of a user's batch, in the comparison in float64
ALIKE = 1e-6  # of batch statistics: those of two samples that are nearly the same magnify what is rounded


def rehearse(
    masked: nn.Module,
    small: nn.Module,
    entries: Sequence[EntryPoint],
    *,
    lossless: bool,
    precise: Mapping[str, Tensor] | None = None,
) -> LosslessReport:
    """Compare both models in float64 on everything that can be run, then take the user's own steps, gradients and all.

    The forward is compared on the example inputs, at another batch and image size and on one sample of odd sides, if
    the masked model takes them, and in train mode; steps on the first samples of their batch. lossless: a difference
    is an error. precise: weights of the smaller model before they were rounded to its type.

    Raises:
        ReconstructionError: the smaller model does not run, or is not equal.
    """
    sides = Side(masked, own=True), Side(small, own=True, precise=precise)
    report: LosslessReport | None = None
    for found in _comparisons(sides, entries):
        if lossless and not found.passed:
            if found.max_rel_error == math.inf and _computes_nan(sides[0], entries[0]):
                raise ReconstructionError(
                    "the masked model computes NaN, which equals nothing. Nothing was changed. Its weights "
                    "hold NaN (training diverged: take an earlier checkpoint), or it needs other example inputs"
                )
            raise ReconstructionError(
                f"the reconstructed model differs from the masked one in {found.compared[0]}: relative error "
                f"{found.max_rel_error:.1e} in {found.dtype}, allowed {found.tolerance:.0e}. Nothing was changed. Find "
                "the layers at fault with ignore=[...] and please report the model"
            )
        report = found if report is None else _united(report, found)
    assert report is not None, "the forward comes first"
    for entry in entries:
        for training in () if entry.borrowed else entry.modes:
            _take_step(masked, small, entry, training)
    return report


def _computes_nan(side: Side, forward: EntryPoint) -> bool:
    outputs = side.outputs(forward, False, None)
    return any(tensor.is_floating_point() and bool(tensor.isnan().any()) for tensor in outputs)


def _united(first: LosslessReport, second: LosslessReport) -> LosslessReport:
    """The one with the larger error; what could not be compared in float64 counts only if it fails."""
    alike = first.dtype == second.dtype
    worse = second.max_rel_error > first.max_rel_error if alike else not second.passed
    united = second if worse else first
    compared = tuple(dict.fromkeys((*first.compared, *second.compared)))
    return replace(united, outputs=first.outputs + second.outputs, compared=compared)


def _comparisons(sides: tuple[Side, Side], entries: Sequence[EntryPoint]) -> Iterator[LosslessReport]:
    for entry in entries:
        if entry.modes:
            for training in entry.modes:
                yield from _on_few_samples(sides, entry, training)
            continue
        try:
            yield _compared(sides, entry)
        except CannotRunError as error:
            raise ReconstructionError(
                f"the masked model does not run {entry.name}{error}. Leave the layers before it out with ignore=[...]"
            ) from error.__cause__
        if is_forward(entry):
            for others in (other_sizes(entry), odd_sizes(entry)):
                yield from _on_first_taken(sides, others)
            trained = _on_few_samples(sides, entry, True, ALIKE)
            yield from (found for found in trained if not found.passed)  # its own error would hide that of eval mode


def _on_first_taken(sides: tuple[Side, Side], others: Iterable[EntryPoint]) -> Iterator[LosslessReport]:
    for other in others:
        try:
            yield _compared(sides, other)
        except CannotRunError:
            continue
        return


def _compared(sides: tuple[Side, Side], entry: EntryPoint) -> LosslessReport:
    """In eval mode; where that draws random numbers (dropout that stays on, noise), with the same for both models."""
    report = compare(*sides, entry)
    if report.passed or not _random(sides[0], entry, False, report.tolerance):
        return report
    with SameDraws():
        report = compare(*sides, entry)
    return replace(report, compared=tuple(f"{name}, all its draws the same" for name in report.compared))


def _on_few_samples(
    sides: tuple[Side, Side], entry: EntryPoint, training: bool, tolerance: float | None = None
) -> Iterator[LosslessReport]:
    """A step that fails on the masked model too is no step to compare."""
    for few in (head(entry, SAMPLES), entry):
        try:
            report = compare(*sides, few, training=training, tolerance=tolerance)
        except CannotRunError:
            continue
        if report.passed or not _random(sides[0], few, training, report.tolerance):
            yield report
        return


def _random(side: Side, entry: EntryPoint, training: bool, tolerance: float) -> bool:
    """Whether a step draws numbers: their number may depend on the channels, so that two models cannot be compared."""
    first, second = (side.outputs(entry, training, None, seed) for seed in (0, 1))
    return distance(first, second)[1] > tolerance


def _take_step(masked: nn.Module, small: nn.Module, entry: EntryPoint, training: bool) -> None:
    """The step as training takes it, on a copy that is thrown away."""
    running = RunningModules(small)
    try:
        _step(small, entry, training, running)
    except Exception as error:
        place = next((f" in module {path!r}" for path in running.paths if path), "")
        try:
            _step(masked, entry, training, running)
        except Exception:  # noqa: BLE001 - whatever a user's step may raise; it is not the smaller model's fault
            return
        raise ReconstructionError(
            f"{entry.name} does not run on the reconstructed model{place}: {first_line(error)}. Nothing was changed. "
            "Leave the layers before it out with ignore=[...], or pass what runs the code there as also=[...]"
        ) from error


def _step(model: nn.Module, entry: EntryPoint, training: bool, running: RunningModules) -> None:
    copied = copy_without_masks(model)
    running.names = {id(module): name for name, module in copied.named_modules()}
    for module in copied.modules():
        if isinstance(module, nn.SyncBatchNorm):  # it would wait for other processes, and is not for CPUs
            module.forward = partial(_BatchNorm.forward, module)  # type: ignore[method-assign]
    with preserved(copied), torch.inference_mode(False), torch.set_grad_enabled(training), running:
        copied.train(training)
        entry.own().run(copied, running)  # which takes its backward pass itself, where gradients are on
