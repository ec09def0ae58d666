"""Means over channels that may lose some, because their module's eps and weight can make up for their number.

Where masked channels are exactly zero a sum over them is the same without them; only a mean divides by another number.
RMS norm, x / sqrt(Q / C + eps) * g, is the same over C' channels with eps * C / C' and g * sqrt(C / C'); global
response norm, G / (S / C + eps) * g, with eps * C / C' and g * C / C'. Which numbers of a module these are is found out
by running it alone (`lightning_prune.graph.cut_alone`); where that shows nothing, the channels stay.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_prune.graph.cut_alone import LARGE, CutAlone, Slot, forms
from lightning_prune.graph.label_space import LabelSpace
from lightning_prune.graph.labels import NO_LABEL
from lightning_prune.graph.means import Form, Mean
from lightning_prune.graph.operator_call import OperatorCall

AVERAGING = ("lerp", "add", "sub", "copy", "detach", "clone", "alias")  # and multiplying by a number
EPS_IN_CODE = "whose eps is a number in its code: keep it in an attribute of the module, self.eps"
EPS_OF_TYPE = "whose eps is None, that of the data type: set it to a number"
NO_WEIGHT = "which has no weight that could make up for their number"
NOTHING = Form(None, 0.0, None, 0.0)
SHARED = "whose weight other code uses too"


@dataclass(frozen=True)
class Rescaled:
    """A module's mean over ids (n,) that can be made up for, and how."""

    module: str
    ids: Tensor
    form: Form


def only_averages(call: OperatorCall, named: Sequence[str]) -> bool:
    """Whether an operator at most averages parameters of one kind, which are multiplied alike."""
    linear = call.name in AVERAGING or (call.name == "mul" and len(call.tensors) == 1)
    return linear and len(named) == len(call.tensors)


def decide(
    space: LabelSpace, model: nn.Module, names: Mapping[int, str], users: Mapping[str, Collection[str]]
) -> list[Rescaled]:
    """Every mean made up for, or its channels frozen; once everything is recorded.

    names: by identity of the tensor. users: of a parameter, the modules whose code met it.
    """
    return _Deciding(space, model, names, users).settled() if space.means else []


class _Deciding:
    def __init__(
        self, space: LabelSpace, model: nn.Module, names: Mapping[int, str], users: Mapping[str, Collection[str]]
    ) -> None:
        self.space, self.names, self.users = space, names, users
        self.modules = dict(model.named_modules())
        self.joint = space.classes()
        self._masked = ~space.marked("reader") | space.marked("filter") | space.marked("must_mask")
        self._spans: dict[str, list[Slot]] = {}
        for span in space.spans:
            masked = not span.buffer and bool(self._masked[span.ids].any())
            self._spans.setdefault(span.tensor, []).append(Slot(span.tensor, span, masked))
        frozen = [item.ids for item in space.frozen if not item.statistics]
        self._frozen = self.joint[torch.cat([*frozen, torch.arange(0)])].unique()
        self._known: dict[tuple[object, ...], Form | str] = {}

    def settled(self) -> list[Rescaled]:
        """One for each module that can make up for its mean, and for those that lose channels along with it."""
        found: list[Rescaled] = []
        for path, mean in self.space.means.items():
            if self._stays(mean):
                continue
            form = self._form(path, mean)
            alike = list(self._alike(path, mean, form)) if isinstance(form, Form) and form.changes else []
            if isinstance(form, Form) and None not in alike:
                found += [Rescaled(path, mean.ids[0], form), *(one for one in alike if one is not None)]
            elif not mean.sums:
                told = f", {form}" if isinstance(form, str) and form else ""
                for ids in mean.ids:
                    reason = f"enters a statistic over channels in {mean.where}{told}"
                    self.space.freeze(ids, reason, statistics=True)
        return [one for one in found if one.form.changes]

    def _stays(self, mean: Mean) -> bool:
        """Whether all its channels stay anyway, so that nothing needs to be tried."""
        return bool(torch.isin(self._sorted(torch.cat(mean.ids)), self._frozen).all())

    def _form(self, path: str, mean: Mean) -> Form | str:
        """How the module makes up for fewer channels, or why it cannot."""
        module, over = self.modules[path], mean.ids[0]
        classes = self._sorted(over)
        weights = [n for n, p in module._parameters.items() if p is not None and self._lies_on(p, classes)]
        if mean.call is None or any(not torch.equal(self._sorted(ids), classes) for ids in mean.ids[1:]):
            return ""
        if next(module.children(), None) is not None and (not weights or mean.sums):
            return ""  # a whole network, perhaps; a number that a sum is divided by shows when that runs with fewer
        signature = self._signature(module, mean, over)
        if signature not in self._known:
            self._known[signature] = self._tried(module, mean, over, weights)
        form = self._known[signature]
        if (
            isinstance(form, Form)
            and form.changes
            and self._others_use(path, f"{path}.{form.weight}" if path else str(form.weight))
        ):
            return SHARED
        return form

    def _tried(self, module: nn.Module, mean: Mean, over: Tensor, weights: Sequence[str]) -> Form | str:
        assert mean.call is not None
        arguments = [arg for arg in (*mean.call.args, *mean.call.outputs) if hasattr(arg, "labels")]
        if any(len(labels.dims) != 1 for argument in arguments for labels in argument.labels):
            return ""
        slots = [
            Slot(name, slot.span, slot.masked)
            for name, tensor in (*module.named_parameters(), *module.named_buffers())
            for slot in self._spans.get(self.names.get(id(tensor), ""), ())
        ]
        alone = CutAlone(module, mean.call, slots, self.joint, over)
        epsilons = [name for name, value in vars(module).items() if type(value) is float and value > 0]
        if (form := alone.first([NOTHING, *forms(epsilons, weights)])) is not None or mean.sums:
            return form or ""
        if alone.first(forms((), weights), LARGE) is not None:
            return EPS_OF_TYPE if "eps" in vars(module) and module.eps is None else EPS_IN_CODE
        bare = [Form(None, 0.0, None, power) for power in (0.5, 1.0)]
        return NO_WEIGHT if alone.first(bare, LARGE) is not None else ""

    def _alike(self, path: str, mean: Mean, form: Form) -> Iterator[Rescaled | None]:
        """Modules of the type that no run took a mean in but that lose the same channels; None: they cannot."""
        classes, module = self._sorted(mean.ids[0]), self.modules[path]
        for other, twin in self.modules.items():
            if type(twin) is type(module) and other not in self.space.means:
                weight = twin._parameters.get(str(form.weight))
                slots = [] if weight is None else self._spans.get(self.names.get(id(weight), ""), [])
                if any(bool(torch.isin(self.joint[slot.span.ids], classes).any()) for slot in slots):
                    same = len(slots) == 1 and vars(twin).keys() == vars(module).keys()
                    yield Rescaled(other, slots[0].span.ids, form) if same else None

    def _signature(self, module: nn.Module, mean: Mean, over: Tensor) -> tuple[object, ...]:
        """What evidence depends on: modules that agree in it need not be tried one by one."""
        assert mean.call is not None
        plain = {n: v for n, v in vars(module).items() if isinstance(v, (bool, int, float, str, tuple, type(None)))}
        used: list[object] = []
        for arg in (*mean.call.args, *mean.call.outputs):
            lines = [(labels.dims, self._order(labels.flat().ids)) for labels in getattr(arg, "labels", ())]
            used.append((getattr(arg, "shape", arg), lines))
        own = [(n, p.shape) for n, p in (*module.named_parameters(), *module.named_buffers())]
        return (type(module), repr(plain), repr(own), repr(used), self._order(over))

    def _order(self, ids: Tensor) -> bytes:
        """Which entries go together, whatever their numbers."""
        classes = torch.where(ids == NO_LABEL, NO_LABEL, self.joint[ids.clamp(min=0)])
        return classes.unique(return_inverse=True)[1].to(torch.int32).numpy().tobytes()

    def _sorted(self, ids: Tensor) -> Tensor:
        return torch.where(ids == NO_LABEL, NO_LABEL, self.joint[ids.clamp(min=0)]).sort().values

    def _lies_on(self, parameter: Tensor, classes: Tensor) -> bool:
        """Whether a parameter has one entry for each of the channels, and nothing else."""
        slots = self._spans.get(self.names.get(id(parameter), ""), [])
        return len(slots) == 1 and torch.equal(self._sorted(slots[0].span.ids), classes)

    def _others_use(self, path: str, name: str) -> bool:
        return self.names.get(id(self._parameter(name))) != name or bool({*self.users.get(name, ())} - {path})

    def _parameter(self, name: str) -> Tensor | None:
        owner, _, own = name.rpartition(".")
        return self.modules[owner]._parameters[own]
