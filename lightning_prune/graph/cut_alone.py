"""A module run alone in float64: whole with masked channels, and cut, with its eps and weight multiplied.

What makes up for a mean over fewer channels is not read off the module's code, which may be written in any way: the
forms that it may have are tried on random numbers, at scales at which the eps is all that counts and at which it is
nothing, with one, half and all but one of the channels gone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.graph.label_space import Span
from lightning_prune.graph.labels import Labels
from lightning_prune.graph.means import Argument, Form, ModuleCall
from lightning_prune.graph.running import KeepsDouble, normalise_mode, tensors_in
from lightning_prune.model_state.copying import copied
from lightning_prune.model_state.cutting import sizes_of, update_attributes_

LIMIT = 1e-12  # relative, in float64
SMALL_TO_LARGE = (1e-9, 1e-3, 1.0)
LARGE = (1e9,)
POSITIONS = 3


def forms(epsilons: Sequence[str], weights: Sequence[str]) -> list[Form]:
    """Those that are tried; without an eps first, since a number that does not matter would pass too."""
    powers = [(None, 0.0), *((name, power) for name in epsilons for power in (1.0, 0.5))]
    return [
        Form(eps, eps_power, weight, power, offset)
        for eps, eps_power in powers
        for weight in weights
        for offset in (0.0, 1.0)
        for power in (0.5, 1.0)
    ]


@dataclass(frozen=True)
class Slot:
    """Where the module's own tensors hold channels. masked: they are zero in the masked model."""

    name: str
    span: Span
    masked: bool


class CutAlone:
    """One module with what it was called on.

    slots: the channels in its tensors. joint: (ids,) class of every id. over: (n,) ids that its mean is over.
    """

    def __init__(self, module: nn.Module, call: ModuleCall, slots: Sequence[Slot], joint: Tensor, over: Tensor) -> None:
        self._call, self._slots, self._joint, self._over = call, slots, joint, over
        self._classes = joint[over[over >= 0]].unique()
        self._shortened = True
        self._module = copied(module).double()
        generator = torch.Generator().manual_seed(0)
        for parameter in self._module.parameters():
            noise = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data = (noise + 0.5).to(parameter.device)
        with contextlib.suppress(Exception):  # whatever a user's forward may raise, when it gets another size
            self._run(self._module, torch.zeros(len(joint), dtype=torch.bool), 1.0, training=False)
            return
        self._shortened = False

    def first(self, candidates: Sequence[Form], scales: Sequence[float] = SMALL_TO_LARGE) -> Form | None:
        """The first form with which the cut module equals the masked one."""
        half = self._removals()[0]
        return next((f for f in candidates if self._equal(f, half, scales) and self._always(f, scales)), None)

    def _always(self, form: Form, scales: Sequence[float]) -> bool:
        removals = self._removals()
        return all(self._equal(form, gone, scales) for gone in removals) and self._equal(
            form, removals[0], scales, True
        )

    def _removals(self) -> list[Tensor]:
        """(ids,) flags of the classes that go: half of them, one, all but one."""
        order = self._classes[torch.randperm(len(self._classes), generator=torch.Generator().manual_seed(0))]
        flags = []
        for number in dict.fromkeys((max(len(order) // 2, 1), 1, len(order) - 1)):
            gone = torch.zeros(len(self._joint), dtype=torch.bool)
            gone[order[:number]] = True
            flags.append(gone)
        return flags

    def _gone(self, ids: Tensor, gone: Tensor) -> Tensor:
        """(n,) which of the entries go."""
        return (ids >= 0) & gone[self._joint[ids.clamp(min=0)]]

    def _equal(self, form: Form, gone: Tensor, scales: Sequence[float], training: bool = False) -> bool:
        try:
            whole = copied(self._module)
            for slot in self._slots:
                if slot.masked:
                    entries = self._gone(slot.span.ids, gone).nonzero().flatten()
                    whole.get_parameter(slot.name).data.index_fill_(slot.span.dim, entries, 0)
            cut = copied(whole)
            before, after = len(self._over), int((~self._gone(self._over, gone)).sum())
            eps_factor, factor = form.factors(before, after)
            tensors: dict[str, Tensor] = {**dict(cut.named_parameters()), **dict(cut.named_buffers())}
            for slot in self._slots:
                tensor, left = tensors[slot.name], ~self._gone(slot.span.ids, gone)
                tensor.data = tensor.data.index_select(slot.span.dim, left.nonzero().flatten())
            if form.eps is not None:
                setattr(cut, form.eps, getattr(cut, form.eps) * eps_factor)
            if form.weight is not None:
                tensors[form.weight].data = (tensors[form.weight].data + form.offset) * factor - form.offset
            update_attributes_(cut)
            for scale in scales:
                first = self._run(whole, gone, scale, training)
                second = self._run_cut(cut, gone, scale, training, before, after)
                if form.weight is None:
                    second = [tensor * factor for tensor in second]
                if not all(map(self._same, first, self._call.outputs, second, [gone] * len(first))):
                    return False
            return True
        except Exception:  # noqa: BLE001 - whatever a user's forward may raise: it was not shown to be equal
            return False

    def _run_cut(
        self, cut: nn.Module, gone: Tensor, scale: float, training: bool, before: int, after: int
    ) -> list[Tensor]:
        try:
            return self._run(cut, gone, scale, training, cut=True)
        except Exception:  # noqa: BLE001 - once more with the sizes that it holds in attributes, as a graph sets them
            for name, value in sizes_of(cut).items():
                if value == before:
                    setattr(cut, name, after)
                elif isinstance(value, (list, tuple)) and before in value:
                    setattr(cut, name, type(value)(after if item == before else item for item in value))
            return self._run(cut, gone, scale, training, cut=True)

    def _run(self, module: nn.Module, gone: Tensor, scale: float, training: bool, cut: bool = False) -> list[Tensor]:
        normalise_mode(module, training=training)
        generator = torch.Generator().manual_seed(1)
        args: list[Any] = []
        for arg in self._call.args:
            if isinstance(arg, Argument):
                value = torch.randn(self._shape(arg), generator=generator, dtype=torch.float64) * scale
                for labels in arg.labels:
                    value = self._without(value, labels, gone, cut=cut)
                args.append(value)
            else:
                args.append(arg)
        torch.manual_seed(0)
        with torch.no_grad(), KeepsDouble():
            return tensors_in(module(*args))

    def _shape(self, argument: Argument) -> list[int]:
        """Its own, with a few positions where that works: they are alike."""
        channels = {dim for labels in argument.labels for dim in labels.dims}
        few = POSITIONS if self._shortened else max(argument.shape)
        return [size if dim in channels else min(size, few) for dim, size in enumerate(argument.shape)]

    def _without(self, value: Tensor, labels: Labels, gone: Tensor, *, cut: bool) -> Tensor:
        """Channels zero, where they are when masked, or gone."""
        (dim,) = labels.dims
        flat = labels.flat()
        going = self._gone(flat.ids, gone)
        value = value.index_fill(dim, (going & ~flat.live).nonzero().flatten(), 0)
        return value.index_select(dim, (~going).nonzero().flatten()) if cut else value

    def _same(self, whole: Tensor, output: Argument, cut: Tensor, gone: Tensor) -> bool:
        for labels in output.labels:
            (dim,) = labels.dims
            whole = whole.index_select(dim, (~self._gone(labels.flat().ids, gone)).nonzero().flatten())
        largest = float(whole.abs().max())
        return whole.shape == cut.shape and float((whole - cut).abs().max()) <= LIMIT * largest and largest > 0
