"""Trace any eager model: run it once, follow its channels through every operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from lightning_prune.errors import TraceError
from lightning_prune.graph import rules, sizes
from lightning_prune.graph.build_groups import Classes, build_groups
from lightning_prune.graph.constraints import Cut, resolve
from lightning_prune.graph.contraction import Call
from lightning_prune.graph.groups import ChannelGraph
from lightning_prune.graph.inputs import call_model
from lightning_prune.graph.labels import Freeze, Info, LabelSpace, region, signature
from lightning_prune.graph.operator_call import Context, tensors_out
from lightning_prune.graph.recording import (
    Recorder,
    module_names,
    normalise_mode,
    tensors_in,
    untouched,
    watch_training_flag,
)
from lightning_prune.graph.rehearse import Decisions, Draft, places_of, settle
from lightning_prune.model_state.preservation import without_masks

OUTPUT = "reaches the model's output"


def trace(model: nn.Module, example_inputs: Any, *, statistics: bool = False) -> ChannelGraph:
    """Find which channels of a model go together, and which cannot go at all.

    The model runs once in eval mode under a dispatch mode that sees every operator, and once more in train mode if
    its code asks which one it is in (auxiliary heads exist only there; batch norm and dropout stay in eval). Then it
    is tried out with fewer channels, see `lightning_prune.graph.rehearse`. Modes, buffers, gradients and random state
    are left as they were.

    Args:
        model: any eager module.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.
        statistics: let channels go although a statistic over them (layer norm, softmax over channels) changes:
            those groups are prunable then, but not without loss (`Group.statistics` says why).

    Raises:
        TraceError: the model does not run on these inputs.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
        >>> graph = trace(model, torch.zeros(1, 3, 8, 8))
        >>> [(group.name, group.size, group.prunable) for group in graph.groups]
        [('0', 8, True), ('3', 4, False)]
    """
    tracer = _Tracer(model, statistics)
    modes = [False]
    with untouched(model), without_masks(model):
        normalise_mode(model, training=False)
        with watch_training_flag() as flag:
            tracer.run(example_inputs)
        if flag.asked:
            normalise_mode(model, training=True)
            if tracer.run(example_inputs, optional=True):
                modes.append(True)
    with torch.inference_mode(False):
        return settle(model, example_inputs, modes, tracer.draft).graph


class _Tracer:
    """One label space filled by one or several runs of the same model."""

    def __init__(self, model: nn.Module, statistics: bool) -> None:
        self.model = model
        self.statistics = statistics
        self.space = LabelSpace()
        self.calls: list[Call] = []
        self.norms: list[tuple[str, Tensor]] = []
        self.notes: dict[str, None] = {}
        self.used: set[str] = set()
        self.runs = 0
        self._last: tuple[Any, Draft] | None = None
        self.names: dict[int, str] = {}
        self.known: dict[Tensor, Info] = {}
        kernels = {id(m._parameters.get("weight")) for m in model.modules() if isinstance(m, _ConvNd)}
        tensors: list[tuple[str, Tensor, bool]] = [(name, tensor, False) for name, tensor in model.named_parameters()]
        tensors += [(name, tensor, True) for name, tensor in model.named_buffers()]
        for name, tensor, buffer in tensors:
            if is_lazy(tensor):
                raise TraceError(f"parameter {name!r} is not initialised yet; run the model once before tracing it")
            self.names[id(tensor)] = name
            dims = 2 if id(tensor) in kernels else None
            self.known[tensor] = self.space.label_parameter(name, tensor, buffer=buffer, dims=dims)

    def run(self, example_inputs: Any, *, optional: bool = False) -> bool:
        """Run the model under the recorder. ``optional``: a failure is only noted (train mode may need targets)."""
        recorder = Recorder(self.known, self._observe, self.runs)
        self.runs += 1
        for tensor in tensors_in(example_inputs):
            recorder.set_info(tensor, Info(data=True))
        try:
            with module_names(self.model, recorder), recorder:
                output = call_model(self.model, example_inputs)
        except Exception as error:
            place = f" in module {recorder.module!r}" if recorder.module else ""
            if optional:
                self.notes[f"not traced in train mode: {type(error).__name__}: {error}"] = None
                return False
            raise TraceError(
                f"the model does not run on the example inputs{place}: {type(error).__name__}: {error}. "
                "Pass inputs as the model's forward takes them: a tensor, a tuple, or a dict of keyword arguments."
            ) from error
        for tensor in tensors_in(output):
            for layer in recorder.info(tensor).layers:
                self.space.freeze(layer, OUTPUT)
        return True

    def draft(self, decisions: Decisions) -> Draft:
        """The graph under given decisions."""
        modules = dict(self.model.named_modules())
        module_of = {
            f"{path}.{key}" if path else key: path
            for path, module in modules.items()
            for key, _ in module.named_parameters(recurse=False)
        }
        resolved = resolve(self.space, self.space.constraints, decisions.choices)
        found = sizes.match(modules, [*self.space.sizes, *resolved.sizes])
        cuts = [c for c in resolved.active if isinstance(c, Cut)]
        outcome = (resolved.axes, tuple(found), tuple(decisions.held), tuple(decisions.held_whole))
        if self._last is not None and self._last[0] == outcome:
            return self._last[1]
        frozen = [*self._held(decisions), *resolved.frozen, *sizes.unmatched(cuts, found)]
        classes = Classes.of(self.space, resolved.joint, frozen, allow_statistics=self.statistics)
        groups, channels = build_groups(classes, self.calls, self.norms, module_of)
        free = {group.name: channels[group.name] for group in groups if group.prunable}
        shapes = {self.names[id(tensor)]: tuple(tensor.shape) for tensor in self.known}
        graph = ChannelGraph(tuple(groups), shapes, self._notes(), tuple(sizes.attributes(found, resolved.joint, free)))
        places, guessed = places_of(self.space.constraints, decisions.choices, classes)
        self._last = outcome, Draft(graph, places, guessed, uneven=bool(cuts))
        return self._last[1]

    def _held(self, decisions: Decisions) -> list[Freeze]:
        """Channels that a module reads, or also makes, where the trials came to leave them."""
        readers = self.space.marked("reader")
        frozen = []
        for path, reason in decisions.held.items():
            for span in self.space.spans:
                if not path or span.tensor.startswith(f"{path}."):
                    ids = torch.arange(span.start, span.start + span.size)
                    frozen.append(Freeze(ids if path in decisions.held_whole else ids[readers[ids]], reason))
        return [item for item in frozen if len(item.ids)]

    def _notes(self) -> tuple[str, ...]:
        unused = [name for name, _ in self.model.named_parameters() if name not in self.used]
        notes = list(self.notes)
        if unused:
            notes.append(f"never used in the trace, left as they are: {', '.join(unused)}")
        return tuple(notes)

    def _observe(self, recorder: Recorder, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        context = Context(self.space, recorder, func, args, kwargs, output, self.calls, self.norms)
        for tensor in context.tensors():
            name = self.names.get(id(tensor))
            if name is not None:
                self.used.add(name)
        outputs = tensors_out(output)
        if not outputs:
            return
        if not outputs[0].numel():
            context.freeze_inputs(f"meets an empty tensor in {context.where}: trace with other example inputs")
            return
        rule = rules.rule_for(func)
        before = context.info(outputs[0])
        if rule is None:
            reason = f"passes an operator without a rule, {context.where}"
            if any(context.info(tensor).layers for tensor in context.tensors()):
                self.notes[f"no rule for {context.where}: the channels that reach it are not pruned"] = None
            infos = [context.freeze_inputs(reason)] * len(outputs)
        else:
            result = rule(context)
            infos = result if isinstance(result, list) else [result] * len(outputs)
        if func._schema.is_mutable:
            self._check_aliases(recorder, context, outputs[0], before, infos[0])
        for tensor, info in zip(outputs, infos, strict=True):
            if id(tensor) not in self.names:
                recorder.set_info(tensor, info)

    def _check_aliases(self, recorder: Recorder, context: Context, tensor: Tensor, before: Info, after: Info) -> None:
        """A write through one view changes the others: they get the labels, or those cannot be followed."""
        if _same(before.layers, after.layers):
            return
        for alias in recorder.aliases(tensor):
            info = recorder.info(alias)
            if all(_spans(alias, tensor, layer) for layer in after.layers) and (info.layers or info.uniform):
                recorder.set_info(alias, self._written(alias, info, after))
            else:
                for layer in (*info.layers, *after.layers):
                    self.space.freeze(layer, f"is written through a view by {context.where}")

    def _written(self, alias: Tensor, info: Info, after: Info) -> Info:
        """Labels of a tensor, part of whose positions were written: what was there and what came are tied."""
        layers = []
        for layer in after.layers:
            dims = signature(layer)
            values = region(layer, dims)
            for old in info.layers:
                if signature(old) == dims:
                    self.space.tie(region(old, dims) >> 1, values >> 1)
                    values = values | (region(old, dims) & 1)
            layers.append(values.expand(alias.shape))
        kept = [old for old in info.layers if signature(old) not in {signature(layer) for layer in layers}]
        return Info((*layers, *kept), data=True)


def _same(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def _spans(alias: Tensor, view: Tensor, layer: Tensor) -> bool:
    """Whether two views of one storage have the same channels: they differ in positions only."""
    return alias.dim() == view.dim() and all(
        alias.shape[d] == view.shape[d] and alias.stride(d) == view.stride(d) for d in signature(layer)
    )
