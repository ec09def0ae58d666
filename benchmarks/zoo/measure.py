"""One model of the sweep from building to the checks of the reconstructed model: one row of plain data."""

from __future__ import annotations

import copy
import re
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

import lightning_prune as lp
from benchmarks.zoo import peer
from benchmarks.zoo.checks import copies, export, memory
from benchmarks.zoo.families import Entry
from benchmarks.zoo.models import (
    Case,
    RawHeads,
    call,
    equal,
    is_users,
    label,
    outputs,
    prepare,
    to_double,
    told,
    train_step,
)  # fmt: skip

Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What is measured beyond the usual."""

    peer: bool = False
    export: bool = False
    memory: bool = False
    repeats: int = 1  # rounds of the timing against the peer
    ratio: float = 0.5  # share of every layer that goes


class RefusedError(Exception):
    """The library said no, with a reason."""


@dataclass
class Session:
    """A row being filled; seconds per step beside it."""

    entry: Entry
    options: Options
    row: Row = field(default_factory=dict)

    def timed(self, step: str, function: Callable[[], Any]) -> Any:
        """The function's value; its seconds go into the row."""
        start = time.perf_counter()
        value = function()
        self.row["seconds"][step] = round(time.perf_counter() - start, 4)
        return value

    def heads(self, model: nn.Module) -> nn.Module:
        """What is compared: the raw heads of a detector, else the model."""
        return RawHeads(model) if self.entry.suite == "detection" else model

    def check(self, name: str, function: Callable[[], bool | None]) -> None:
        """True, False, None (the dense model cannot do it either), or how it failed."""
        try:
            self.row[name] = function()
        except Exception as error:  # noqa: BLE001 - any failure is a result
            self.row[name] = told(error)


def sweep_one(entry: Entry, options: Options, emit: Callable[[Row], None] = lambda _: None) -> Row:
    """Everything about one model. ``emit`` receives the row before steps that may hang."""
    session = Session(entry, options, {**asdict(entry), "key": entry.key, "seconds": {}, "outcome": "error: cut short"})
    row = session.row
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer.warm_up(peer=options.peer)
        try:
            case = session.timed("build", lambda: prepare(entry))
        except Exception as error:  # noqa: BLE001
            row["outcome"] = f"error: the dense model: {told(error)}"
            return row
        row |= {"size": list(case.size) if isinstance(case.size, tuple) else case.size, "dense_trains": case.trains}
        try:
            row["outcome"] = _ours(session, case)
        except RefusedError as error:
            row["outcome"] = f"refused: {error}"
        except lp.PruningError as error:
            row["outcome"] = f"refused: {told(error)}"
        except Exception as error:  # noqa: BLE001
            row["outcome"] = f"error: {told(error)}"
            row["traceback"] = traceback.format_exc(limit=-6)
        if row["outcome"].startswith(("wrong", "error")):
            row["prune"] = _as_users_see_it(entry, options)
        if options.peer:
            emit({**row, "peer": {"outcome": "error: crashed or ran out of time"}})
            del case
            try:
                row["peer"] = peer.compare(prepare(entry), entry, options.ratio, options.repeats)
            except Exception as error:  # noqa: BLE001
                row["peer"] = {"outcome": f"error: {told(error)}"}
    return row


def _as_users_see_it(entry: Entry, options: Options) -> str:
    """What `lightning_prune.prune`, which checks its own result, makes of a model that is wrong or fails here."""
    case = prepare(entry)
    try:
        lp.prune(case.model, case.inputs, criterion=lp.L1(), ratio=options.ratio)
    except lp.PruningError as error:
        return f"refused: {told(error)}"
    except Exception as error:  # noqa: BLE001
        return f"error: {told(error)}"
    return "pruned"


def _ours(session: Session, case: Case) -> str:
    """Fill the row; returns the outcome."""
    row, model, inputs = session.row, case.model, case.inputs
    row["params"] = lp.measure.count_params(model, trainable=False)
    before = session.timed("forward", lambda: outputs(model, inputs))
    graph = _trace(session, model, inputs, before)
    _describe(row, model, graph)
    scores = session.timed("score", lambda: lp.score(model, graph, lp.L1()))
    plan = session.timed("select", lambda: lp.LayerRatio(session.options.ratio).select(graph, scores))
    _check_small(session, case, session.timed("reconstruct", lambda: lp.reconstruct(model, graph, plan)), graph, plan)
    row["removed"] = round(1 - row["params_after"] / row["params"], 4)
    row["shrunk_channels"] = round(plan.ratio, 4)
    return session.timed("verify", lambda: _verify(session, case, graph, plan))


def _check_small(session: Session, case: Case, small: nn.Module, graph: lp.ChannelGraph, plan: Any) -> None:
    """Everything that the reconstructed model must be able to do in float32."""
    model, inputs = case.model, case.inputs
    session.row["params_after"] = lp.measure.count_params(small, trainable=False)
    after = outputs(small, inputs)
    session.check("copies", lambda: copies(model, small, inputs, after, lambda: lp.reconstruct(model, graph, plan)))
    # A detector's own count depends on how many boxes it happens to find.
    session.check("flops", lambda: [lp.measure.count_flops(session.heads(m), inputs) for m in (model, small)])
    session.check("train_step", lambda: train_step(small, inputs) if case.trains else None)
    small.zero_grad(set_to_none=True)
    if session.options.export:
        session.check("export", lambda: export(model, small.eval(), inputs))
    if session.options.memory:
        session.check("memory", lambda: memory(model, inputs))


def _trace(session: Session, model: nn.Module, inputs: Any, before: list[torch.Tensor]) -> lp.ChannelGraph:
    """Trace a model in mixed modes, and see that nothing of it changed."""
    modules = list(model.modules())
    for position, module in enumerate(modules):
        module.training = position % 3 == 0
    first = next(model.parameters())
    first.grad = torch.full_like(first, 2.0)
    state = _state(model)
    try:
        graph = session.timed("trace", lambda: lp.trace(model, inputs))
    except Exception:
        first.grad = None
        raise
    same = _state(model) == state and bool((first.grad == 2.0).all())
    first.grad = None
    session.row["no_trace_left"] = same and equal(before, outputs(model, inputs))
    return graph


def _state(model: nn.Module) -> list[Any]:
    """Modes, hooks, gradients, flags, random state and buffers' values, comparable."""
    hooks = [
        sum(len(value or ()) for name, value in vars(module).items() if name.endswith("_hooks"))
        for module in model.modules()
    ]
    hooks += [len(p._backward_hooks or ()) for p in model.parameters()]
    buffers = [b.detach().double().nan_to_num().sum().item() for b in model.buffers()]
    flags = [(p.grad is None, p.requires_grad, p.data_ptr()) for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    everywhere = len(nn.modules.module._global_forward_hooks) + len(nn.modules.module._global_forward_pre_hooks)
    return [modes, hooks, buffers, flags, everywhere, torch.get_rng_state().tolist(), torch.is_grad_enabled()]


def _describe(row: Row, model: nn.Module, graph: lp.ChannelGraph) -> None:
    prunable = [group for group in graph.groups if group.prunable]
    channels = sum(group.size for group in graph.groups)
    row["groups"], row["prunable_groups"] = len(graph.groups), len(prunable)
    row["prunable_share"] = round(sum(group.size for group in prunable) / channels, 4) if channels else 0.0
    row["reasons"] = dict(Counter(_kind_of(group.reason) for group in graph.groups if not group.prunable))
    row["kept_by_reason"] = _kept(model, graph)
    row["notes"] = [note[:300] for note in graph.notes][:8]
    if not prunable:
        raise RefusedError(f"no group can be pruned: {row['reasons']}")


def _kept(model: nn.Module, graph: lp.ChannelGraph) -> dict[str, float]:
    """Share of the parameters in layers whose channels stay, by reason: the five largest."""
    kept: Counter[str] = Counter()
    for group in graph.groups:
        if not group.prunable:
            modules = [model.get_submodule(name) for name in {layer.name for layer in group.layers}]
            kept[_kind_of(group.reason)] += sum(p.numel() for m in modules for p in m.parameters(recurse=False))
    whole = sum(p.numel() for p in model.parameters())
    return {reason: round(count / whole, 4) for reason, count in kept.most_common(5)}


def _kind_of(reason: str | None) -> str:
    """A reason without the place where it happened, so that equal ones are counted together."""
    text = re.sub(r"(?:\s(?:at|in|of|by|with|module|layer|parameter))*\s'[^']*'", "", f" {reason or ''}")
    return " ".join(text.split())[:160]


def _verify(session: Session, case: Case, graph: lp.ChannelGraph, plan: Any) -> str:
    """Masked against reconstructed in float64, raw heads for detection, on the traced inputs and on others."""
    row, model = session.row, _in_double(session, case)
    small = lp.reconstruct(model, graph, plan)
    traced = label(2, case.size) if is_users(session.entry) else "traced"
    given = {traced: case.inputs, **case.others}
    if "dtype" not in row:
        given = {name: to_double(inputs) for name, inputs in given.items()}
    with torch.no_grad():
        if not all(bool(t.isfinite().all()) for t in outputs(session.heads(model), given[traced])):
            return "error: outputs are not finite, nothing can be compared"
    heads, small_heads, row["checked"], passed = session.heads(model), session.heads(small), {}, True
    with suppress(lp.PruningError):  # other outputs in number or shape: an effect without doubt
        row["effect"] = lp.check_lossless(heads, small_heads, given[traced]).max_rel_error
    try:
        with lp.mask_(model, graph, plan):
            for name, inputs in given.items():
                report = lp.check_lossless(heads, small_heads, inputs)
                row["checked"][name] = report.max_rel_error
                passed = passed and report.passed
    except lp.PruningError as error:
        return f"wrong: {told(error)}"
    row["max_rel_error"] = max(row["checked"].values())
    if session.entry.suite == "detection":
        with torch.no_grad():  # to the boxes; Keypoint R-CNN accepts no targets in float64
            call(small.eval(), given[traced][:1])
    return "pruned" if passed else f"wrong: relative error {row['max_rel_error']:.1e}"


def _in_double(session: Session, case: Case) -> nn.Module:
    """The model in float64; as it is if it does not run in that type, which the row then says."""
    model = copy.deepcopy(case.model).double()
    try:
        for inputs in (case.inputs, *case.others.values()):
            outputs(model, to_double(inputs))
    except Exception:  # noqa: BLE001 - whatever it raises
        session.row["dtype"] = "float32"
        return case.model
    return model
