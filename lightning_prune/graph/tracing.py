"""Trace any eager model: run it once, follow its channels through every operator."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lightning_prune.errors import TraceError, first_line
from lightning_prune.graph import computed_weights, rules
from lightning_prune.graph.aliases import meet_aliases
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.entry_points import EntryPoint, entry_points, is_forward
from lightning_prune.graph.groups import Group
from lightning_prune.graph.label_space import LabelSpace
from lightning_prune.graph.labels import TensorInfo
from lightning_prune.graph.model_checks import check_traceable
from lightning_prune.graph.operator_call import OperatorCall, OperatorRecorder
from lightning_prune.graph.plain_numbers import PlainNumber, note_numbers
from lightning_prune.graph.rehearse import settle
from lightning_prune.graph.rescaled_means import decide, only_averages
from lightning_prune.graph.rules.movement import nothing_of
from lightning_prune.graph.running import (
    RunningModules,
    by_operators,
    normalise_mode,
    remembered,
    tensors_in,
    untouched,
    watch_training_flag,
)
from lightning_prune.graph.traced import Traced
from lightning_prune.graph.trial import Ran
from lightning_prune.graph.unreached import meet_unreached
from lightning_prune.graph.widths import Widths
from lightning_prune.model_state.attention import narrow_
from lightning_prune.model_state.preservation import copy_sharing_tensors, copy_without_masks, folding

OUTPUT = "reaches the model's output"


def trace(
    model: nn.Module,
    example_inputs: Any,
    *,
    also: Sequence[Any] = (),
    statistics: bool = False,
    known: Sequence[Group] = (),
) -> ChannelGraph:
    """Find which channels of a model go together, and which cannot go at all.

    A copy of the model runs once in eval mode under a dispatch mode that sees every operator, and once more in train
    mode if its code asks which one it is in (auxiliary heads exist only there; batch norm and dropout stay in eval).
    What these runs say is united. Then it is tried out with fewer channels and at another size, see
    `lightning_prune.graph.rehearse`. The model, its gradients and the random state are left as they were.

    Args:
        model: any eager module.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.
        also: what else will run: further inputs (that take another branch, say), and callables that are given a copy
            of the model (``lambda model: model.head(model.backbone(x))``).
        statistics: let channels go although a statistic over them (layer norm, softmax over channels) changes:
            those groups are prunable then, but not without loss (`Group.statistics` says why).
        known: groups of an earlier trace, in the numbers of today: what went together goes together again, where the
            model's code leaves a choice (whole groups of a convolution, or one filter of each).

    Raises:
        TraceError: the model does not run on these inputs.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
        >>> graph = trace(model, torch.zeros(1, 3, 8, 8))
        >>> [(group.name, group.size, group.prunable) for group in graph.groups]
        [('0', 8, True), ('3', 4, False)]
    """
    check_traceable(model)
    copied = copy_without_masks(model) if folding(model) else copy_sharing_tensors(model)
    narrow_(copied)
    tracer = _Tracer(copied, statistics, known)
    entries = entry_points(example_inputs, also)
    forward = [entry for entry in entries if is_forward(entry)]
    with untouched(copied):
        before = remembered(copied)
        ran = tracer.run_all(forward)
        new = {name for name, _ in copied.named_buffers()} - {name for name, _ in model.named_buffers()}
        if (remembered(copied) != before or tracer.kept) and not new:  # the next runs take other paths: those count
            for own, name, value in tracer.kept:
                own[name] = value
            model, tracer = copied, _Tracer(copied, statistics, known)
            ran = tracer.run_all(forward)
        ran += tracer.run_all(entry for entry in entries if not is_forward(entry))
    graph, stuck, others = tracer.settled(model, ran)
    wider = [replace(other, required=False) for other in others[:1]]
    # Code that runs at another size only; heads whose number cannot change, but perhaps their width.
    for more, narrow in ((wider, ()), ([], tracer.space.whole & (tracer.space.met | stuck))):
        if more or narrow:
            tracer = _Tracer(copied, statistics, known, narrow)
            with untouched(copied):
                ran = tracer.run_all(entries)
                tracer.run_all(more)
            graph = max(graph, tracer.settled(model, ran)[0], key=_free)
    return graph


def _free(graph: ChannelGraph) -> int:
    return sum(group.size * len(group.layers) for group in graph.prunable_groups)


class _Tracer:
    """One label space filled by one or several runs of the same model."""

    def __init__(
        self, model: nn.Module, statistics: bool, known: Sequence[Group], narrow: Collection[str] = ()
    ) -> None:
        self.model, self.statistics, self.known_groups = model, statistics, known
        self.space = LabelSpace(narrow=frozenset(narrow))
        self.notes: dict[str, None] = {}
        self.used: set[str] = set()
        self.reached: set[str] = set()  # not merely averaged, or counted in a penalty on weights
        self._derived: dict[int, tuple[Tensor, set[str]]] = {}
        self.untraced: list[str] = []
        self.widths = Widths(model)
        self.deployed: set[str] = set()
        self.users: dict[str, set[str]] = {}  # of a parameter, the modules whose code met it, not only averaged it
        self.runs = 0
        self.numbers: list[PlainNumber] = []  # of the last entry point: what operators got,
        self.operators: list[Any] = []  # all that ran,
        self.leading: list[int] = []  # the leading sizes of what it returned,
        self.left = False  # and whether it left anything behind in the model
        self.kept: list[tuple[dict[str, Any], str, Any]] = []  # states that a run leaves in attributes
        self.names: dict[int, str] = {}
        self.known: dict[Tensor, TensorInfo] = {}
        self.computed = computed_weights.computed_weights(model)
        kernels = computed_weights.kernels(model)
        twins = computed_weights.twins(model)
        parameters = dict(model.named_parameters())
        for name, tensor in {**parameters, **dict(model.named_buffers())}.items():
            self.names[id(tensor)] = name
            dims = 2 if id(tensor) in kernels else None
            twin = self.known.get(twins[id(tensor)]) if id(tensor) in twins else None
            buffer = name not in parameters
            self.known[tensor] = self.space.label_parameter(name, tensor, buffer=buffer, dims=dims, twin=twin)

    def run_all(self, entries: Iterable[EntryPoint]) -> list[Ran]:
        """Those that ran, with the train flags with which they did."""
        found = []
        for entry in entries:
            self.numbers, self.operators, self.leading, self.left = [], [], [], False
            if modes := self.run(entry):
                found.append(Ran(entry, modes, None if self.left else self.numbers, self.leading, self.operators))
        return found

    def run(self, entry: EntryPoint) -> list[bool]:
        """Run an entry point in its modes; those in which it ran."""
        if entry.modes:
            return [training for training in entry.modes if self._run(entry, training, required=entry.required)]
        with watch_training_flag() as asked:
            modes = [False] if self._run(entry, False, required=entry.required) else []
        if asked and self._run(entry, True, required=False):  # train mode may need targets
            modes.append(True)
        return modes

    def _run(self, entry: EntryPoint, training: bool, *, required: bool) -> bool:
        """Run the model under the recorder; whether it got to the end. What ran until a failure counts too."""
        entry = entry.own()
        running = RunningModules(self.model)
        recorder = OperatorRecorder(self.space, self.known, running, self._observe, self.runs)
        recorder.unknown = TensorInfo(data=entry.opaque)
        recorder.step = "" if is_forward(entry) else entry.name
        self.runs += 1
        for tensor in tensors_in(entry.inputs):
            recorder.set_info(tensor, TensorInfo(data=True))
        before, self.used = self.used, set()
        self._derived.clear()
        try:
            with self.widths.noting(running.stack, recorder), running, recorder:
                normalise_mode(self.model, training=training)  # what it folds or drops is recorded too
                output = entry.run(self.model, running)
                kept = recorder.originals.kept()
                self.left |= bool(kept)
                self.kept += [item for item in kept if recorder.labelled_zeros and tensors_in(item[2])]
        except Exception as error:
            mode = "train" if training else "eval"
            if not required:
                what = "not traced" if entry.name == "forward" else f"{entry.name} is not traced to its end"
                note = f"{what} in {mode} mode: {first_line(error)}"
                self.notes[note] = None
                if entry.modes and not entry.borrowed:
                    self.untraced.append(note)
                return False
            raise TraceError(self._failure(entry, error, recorder.module)) from error
        finally:
            self.used |= recorder.assignments.paths
            self.reached |= self.used if is_forward(entry) else set()  # steps also average and penalise weights
            self.deployed |= self.used if entry.deployed else set()
            self.used |= before
        outputs = tensors_in(output)
        self.leading += [len(tensor) for tensor in outputs if tensor.dim()]
        for tensor in outputs:
            for labels in recorder.info(tensor).labels:
                self.space.freeze(labels.ids, OUTPUT if is_forward(entry) else f"reaches what {entry.name} returns")
        return True

    def settled(self, model: nn.Module, ran: list[Ran]) -> tuple[ChannelGraph, frozenset[str], list[EntryPoint]]:
        """See `settle`, once everything is recorded."""
        self.space.tie_as(self.known_groups)
        averaged = self.used - self.reached
        unreached = meet_unreached(self.space, self.model, self.names, self.reached, averaged, self.widths.ends)
        for one in unreached:
            if one.twin is not None:
                self.widths.repeat(one.path, one.twin)
        traced = Traced(
            self.model,
            self.space,
            self.widths,
            shapes={self.names[id(tensor)]: tuple(tensor.shape) for tensor in self.known},
            deployed=self.deployed,
            notes=tuple(self.notes),
            computed=self.computed,
            unreached=unreached,
            untraced=tuple(self.untraced),
            rescaled=decide(self.space, self.model, self.names, self.users),
            statistics=self.statistics,
        )
        with by_operators():
            return settle(model, ran, traced.propose)

    def _failure(self, entry: EntryPoint, error: Exception, module: str) -> str:
        place = f" in module {module!r}" if module else ""
        if is_forward(entry):
            what = "the example inputs" if entry.name == "forward" else entry.name
            return (
                f"the model does not run on {what}{place}: {type(error).__name__}: {error}. "
                "Pass inputs as the model's forward takes them: a tensor, a tuple, or a dict of keyword arguments."
            )
        return (
            f"{entry.name} does not run{place}: {type(error).__name__}: {error}. It is called with a copy of the model "
            "and must run that one, not a model that it remembers."
        )

    def _observe(self, call: OperatorCall) -> None:
        self._note_used(call)
        self.operators.append(call.func)
        note_numbers(call.func, call.args, call.kwargs, call.recorder.modules, self.numbers)
        if not call.outputs:
            if call.func._schema.is_mutable:
                call.freeze_inputs(f"passes an operator without a rule, {call.where}")
            return
        if not call.outputs[0].numel():
            if call.name == "slice":  # no prefix tokens
                call.recorder.set_info(call.outputs[0], nothing_of(call))
                return
            call.freeze_inputs(f"meets an empty tensor in {call.where}: trace with other example inputs")
            return
        before = call.info(call.outputs[0])
        if rule := rules.rule_for(call.func):
            result = rule(call)
        else:
            if any(call.info(tensor).labels for tensor in call.tensors):
                self.notes[f"no rule for {call.where}: the channels that reach it are not pruned"] = None
            result = call.freeze_inputs(f"passes an operator without a rule, {call.where}", keep=True)
        infos = result if isinstance(result, list) else [result]
        infos += [TensorInfo(data=infos[0].data)] * (len(call.outputs) - len(infos))
        if call.func._schema.is_mutable:
            if call.recorder.assignments.owns(call.outputs[0]):
                infos[0] = call.recorder.assignments.write(call, before, infos[0])
            else:
                meet_aliases(call, before, infos[0])
        for tensor, info in zip(call.outputs, infos, strict=True):
            if id(tensor) not in self.names:
                call.recorder.set_info(tensor, info)
        self._note_reached(call, infos)

    def _note_used(self, call: OperatorCall) -> None:
        named = [self.names[id(tensor)] for tensor in call.tensors if id(tensor) in self.names]
        self.used.update(named)
        if named and not only_averages(call, named):
            for name in named:
                self.users.setdefault(name, set()).add(call.recorder.module)

    def _note_reached(self, call: OperatorCall, infos: list[TensorInfo]) -> None:
        """Parameters that meet data, or are used by their own module; else what is computed of them is remembered."""
        found = {self.names[id(tensor)] for tensor in call.tensors if id(tensor) in self.names}
        found |= {name for tensor in call.tensors for name in self._derived.get(id(tensor), (None, ()))[1]}
        if not found:
            return
        if any(call.info(tensor).data for tensor in call.tensors):
            self.reached |= found
            return
        here = call.recorder.module
        self.reached |= {name for name in found if here and name.startswith(f"{here}.")}
        for tensor, info in zip(call.outputs, infos, strict=True):
            if info.labels and id(tensor) not in self.names:
                self._derived[id(tensor)] = tensor, found
