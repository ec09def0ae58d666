"""One model of the sweep from building to the checks of the reconstructed model: one row of plain data."""

from __future__ import annotations

import copy
import ctypes
import gc
import io
import pickle
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lightning_prune as lp
from benchmarks.zoo import peer
from benchmarks.zoo.families import Entry
from benchmarks.zoo.models import Case, RawHeads, call, equal, outputs, prepare, to_double, told, train_step

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
        row |= {"size": case.size, "dense_trains": case.trains}
        try:
            row["outcome"] = _ours(session, case)
        except RefusedError as error:
            row["outcome"] = f"refused: {error}"
        except lp.PruningError as error:
            row["outcome"] = f"refused: {told(error)}"
        except Exception as error:  # noqa: BLE001
            row["outcome"] = f"error: {told(error)}"
        if options.peer:
            emit({**row, "peer": {"outcome": "error: crashed or ran out of time"}})
            del case
            try:
                row["peer"] = peer.compare(prepare(entry), entry, options.ratio, options.repeats)
            except Exception as error:  # noqa: BLE001
                row["peer"] = {"outcome": f"error: {told(error)}"}
    return row


def _ours(session: Session, case: Case) -> str:
    """Fill the row; returns the outcome."""
    row, model, inputs = session.row, case.model, case.inputs
    row["params"] = lp.measure.count_params(model, trainable=False)
    before = session.timed("forward", lambda: outputs(model, inputs))
    graph = _trace(session, model, inputs, before)
    _describe(row, graph)
    scores = session.timed("score", lambda: lp.score(model, graph, lp.L1()))
    plan = session.timed("select", lambda: lp.LayerRatio(session.options.ratio).select(graph, scores))
    _check_small(session, case, session.timed("reconstruct", lambda: lp.reconstruct(model, graph, plan)), graph, plan)
    row["shrunk_channels"] = round(plan.ratio, 4)
    return session.timed("verify", lambda: _verify(session, model.double(), graph, plan, to_double(inputs)))


def _check_small(session: Session, case: Case, small: nn.Module, graph: lp.ChannelGraph, plan: Any) -> None:
    """Everything that the reconstructed model must be able to do in float32."""
    model, inputs = case.model, case.inputs
    session.row["params_after"] = lp.measure.count_params(small, trainable=False)
    after = outputs(small, inputs)
    session.check("copies", lambda: _copies(model, small, inputs, after, lambda: lp.reconstruct(model, graph, plan)))
    # A detector's own count depends on how many boxes it happens to find.
    session.check("flops", lambda: [lp.measure.count_flops(session.heads(m), inputs) for m in (model, small)])
    session.check("train_step", lambda: train_step(small, inputs) if case.trains else None)
    small.zero_grad(set_to_none=True)
    if session.options.export:
        session.check("export", lambda: _export(model, small.eval(), inputs))
    if session.options.memory:
        session.check("memory", lambda: _memory(model, inputs))


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
        sum(len(value) for name, value in vars(module).items() if name.endswith("_hooks")) for module in model.modules()
    ]
    hooks += [len(p._backward_hooks or ()) for p in model.parameters()]
    buffers = [b.detach().double().nan_to_num().sum().item() for b in model.buffers()]
    flags = [(p.grad is None, p.requires_grad, p.data_ptr()) for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    everywhere = len(nn.modules.module._global_forward_hooks) + len(nn.modules.module._global_forward_pre_hooks)
    return [modes, hooks, buffers, flags, everywhere, torch.get_rng_state().tolist(), torch.is_grad_enabled()]


def _describe(row: Row, graph: lp.ChannelGraph) -> None:
    prunable = [group for group in graph.groups if group.prunable]
    channels = sum(group.size for group in graph.groups)
    row["groups"], row["prunable_groups"] = len(graph.groups), len(prunable)
    row["prunable_share"] = round(sum(group.size for group in prunable) / channels, 4) if channels else 0.0
    row["reasons"] = dict(Counter(_kind_of(group.reason) for group in graph.groups if not group.prunable))
    row["notes"] = [note[:300] for note in graph.notes][:8]
    if not prunable:
        raise RefusedError(f"no group can be pruned: {row['reasons']}")


def _kind_of(reason: str | None) -> str:
    """A reason without the place where it happened, so that equal ones are counted together."""
    text = re.sub(r"(?:\s(?:at|in|of|by|with|module|layer|parameter))*\s'[^']*'", "", f" {reason or ''}")
    return " ".join(text.split())[:160]


def _copies(
    model: nn.Module, small: nn.Module, inputs: Any, after: list[torch.Tensor], again: Callable[[], nn.Module]
) -> bool | str:
    """Deep copy, pickle, and a state dict loaded into a second reconstruction: the same outputs each."""
    second = again()
    for parameter in second.parameters():
        parameter.data.fill_(0.1)
    buffer = io.BytesIO()
    torch.save(small.state_dict(), buffer)
    buffer.seek(0)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    others = {"deep copy": copy.deepcopy(small), "state dict": second}
    if _pickles(model):
        others["pickle"] = pickle.loads(pickle.dumps(small))
    differ = [f"{name} differs" for name, other in others.items() if not equal(after, outputs(other, inputs))]
    return "; ".join(differ) or True


def _pickles(model: nn.Module) -> bool:
    """Whether the dense model can be pickled; only its structure matters."""
    try:
        pickle.dumps(model)
    except Exception:  # noqa: BLE001
        return False
    return True


def _export(model: nn.Module, small: nn.Module, inputs: Any) -> bool | None:
    """True if the reconstructed model exports; None if the dense one does not either."""
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    try:
        torch.export.export(model.eval(), args, strict=False)
    except Exception:  # noqa: BLE001
        return None
    program = torch.export.export(small, args, strict=False)
    with torch.no_grad():
        return len(list(program.graph.nodes)) > 0


def _memory(model: nn.Module, inputs: Any) -> list[float]:
    """MiB above the start at the peak of a forward, and of a trace (Linux: peak of the resident set).

    The worker's allocator is told to hand memory back at once (`runner.RETURN_MEMORY`), or reuse would hide it.
    """
    found = []
    for run in (lambda: outputs(model, inputs), lambda: lp.trace(model, inputs)):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", "ascii")
        start = _status("VmRSS")
        run()
        found.append(round((_status("VmHWM") - start) / 1024, 1))
    return found


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def _verify(session: Session, model: nn.Module, graph: lp.ChannelGraph, plan: Any, inputs: Any) -> str:
    """Masked against reconstructed in float64, raw heads for detection."""
    row = session.row
    small = lp.reconstruct(model, graph, plan)
    with torch.no_grad():
        if not all(bool(t.isfinite().all()) for t in outputs(session.heads(small), inputs)):
            return "error: outputs are not finite, nothing can be compared"
    try:
        row["effect"] = lp.check_lossless(session.heads(model), session.heads(small), inputs).max_rel_error
        with lp.mask_(model, graph, plan):
            report = lp.check_lossless(session.heads(model), session.heads(small), inputs)
    except lp.PruningError as error:
        return f"wrong: {told(error)}"
    row["max_rel_error"] = report.max_rel_error
    if session.entry.suite == "detection":
        with torch.no_grad():  # to the boxes; Keypoint R-CNN accepts no targets in float64
            call(small.eval(), inputs[:1])
    return "pruned" if report.passed else f"wrong: relative error {report.max_rel_error:.1e}"
