"""Is the pruned model faster, and if not, why: said in words from the times of its layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_prune.graph.describe import shortened
from lightning_prune.measure.layers import LayerTime, Machine, ModelTime

LANES = 8  # float32 numbers in an AVX2 register; AVX-512 holds two of them
FAR = 3  # times as long as any limit asks for
TIMES = "\N{MULTIPLICATION SIGN}"
LEAST = 0.01  # share of the time below which nothing is said
POOLS = ("MaxPool2d", "AvgPool2d")  # of PyTorch: element by element, but over channels where those come last
Kind = Literal[
    "speed", "shortfall", "not shrunk", "slower", "memory", "call", "pooling", "far", "lanes", "outside", "timers"
]

_CALL = "so little is done there that the call takes longer than the arithmetic or the memory would"
_FAR = (
    f"over {FAR} times as long as FLOPs, bytes or calls ask for: kernels that do not suit the shape, as is common with "
    "few channels or small maps; other batch sizes, and ONNX Runtime, bring in other kernels"
)
_POOLING = (
    f"pooling, over {FAR} times as long as its bytes ask for: PyTorch goes element by element unless channels come "
    "last in memory; model.to(memory_format=torch.channels_last), or ONNX Runtime, goes many at a time"
)
_MEMORY = (
    "bound by memory, below this machine's balance of {:.1f} FLOPs per byte; only fewer bytes help: larger batches "
    "where weights are most of them, norms and activations fused into convolutions elsewhere (ONNX Runtime, "
    "torch.compile)"
)
_LANES = f"channel counts that are no multiple of {LANES} leave up to {{:.0f}} % of the SIMD lanes empty"
_ROUND_TO = f"; pruning with round_to={LANES} (--round-to {LANES}) fills them"
_WHOLE = "did not shrink, as many FLOPs as in the dense model; `lightning-prune graph` says what cannot be pruned"
_SLOWER = "fewer FLOPs than in the dense model, and yet slower by more than the spread"
_OUTSIDE = "{:.0f} % of the time between the layers: additions, reshapes, functional calls, Python and the timers"


@dataclass(frozen=True)
class Finding:
    """One answer to where the time goes.

    Attributes:
        kind: ``speed`` (the whole model), ``shortfall`` (the time that the FLOPs promised to save, by class of layer),
            ``not shrunk`` (layers with all their FLOPs), ``slower`` (fewer FLOPs, more time), ``memory`` and ``call``
            (what limits the layers, see `LayerTime.bound`), ``far`` (more than `FAR` times as long as any limit asks
            for, which then explains nothing; ``pooling`` where that is the reason), ``lanes`` (channel counts that are
            no multiple of `LANES`, though pruning chose them), ``outside`` (between the layers), ``timers`` (their
            overhead).
        share: of a pass of the (pruned) model; 1 for ``speed``, and of ``lanes`` what filling them could save at most.
        text: in words.
        layers: that it is about, slowest first.
    """

    kind: Kind
    share: float
    text: str
    layers: tuple[str, ...] = ()


def explain_speed(after: ModelTime, machine: Machine, before: ModelTime | None = None) -> tuple[Finding, ...]:
    """Say what sets the pace of a model, and how much of what pruning promises it delivers.

    Findings overlap: a layer may be bound by memory and not have shrunk.

    Args:
        after: of the pruned model, or of the only one.
        machine: from `measure_machine`, with the same number of threads.
        before: of the dense model, from the same call of `time_layers`.

    Returns:
        The whole model's speed and shortfall if there is a ``before``, then what takes the largest share first, the
        timers last.

    Example:
        >>> from torch import nn, zeros
        >>> from lightning_prune.measure import measure_machine, time_layers
        >>> times = time_layers({"": (nn.Sequential(nn.Conv2d(3, 9, 3)), zeros(1, 3, 64, 64))})[""]
        >>> [finding.layers for finding in explain_speed(times, measure_machine()) if finding.kind == "lanes"]
        [('0',)]
    """
    layers = sorted(after.layers, key=lambda layer: -layer.latency.median)
    dense = {} if before is None else {layer.name: layer for layer in before.layers}
    twins = [(layer, dense[layer.name]) for layer in layers if layer.name in dense]
    near = [layer for layer in layers if layer.reach(machine) * FAR >= 1]  # a limit explains only what comes near it
    far = [layer for layer in layers if layer not in near]
    memory = _MEMORY.format(machine.balance)
    odd = [layer for layer in layers if empty_lanes(layer) and _is_chosen(layer, dense)]
    lost = sum(layer.latency.median * empty_lanes(layer) for layer in odd) / after.total
    lanes = _LANES.format(100 * lost / after.share(*odd) if odd else 0) + (_ROUND_TO if dense else "")
    found = [
        _about("memory", after, [layer for layer in near if layer.bound(machine) == "memory"], memory),
        _about("call", after, [layer for layer in near if layer.bound(machine) == "call"], _CALL),
        _about("pooling", after, [layer for layer in far if layer.kind in POOLS], _POOLING),
        _about("far", after, [layer for layer in far if layer.kind not in POOLS], _FAR),
        _about("not shrunk", after, [now for now, was in twins if was.flops and now.flops >= was.flops], _WHOLE),
        _about("slower", after, [now for now, was in twins if now.flops < was.flops and _is_slower(now, was)], _SLOWER),
        _about("lanes", after, odd, lanes, lost),
        Finding("outside", after.outside / after.total, _OUTSIDE.format(100 * after.outside / after.total)),
    ]
    said = sorted((finding for finding in found if finding.share >= LEAST), key=lambda finding: -finding.share)
    overall = () if before is None else (_speed(before, after), *_shortfall(before, after))
    return (*overall, *said, _timers(before, after))


def empty_lanes(layer: LayerTime) -> float:
    """Share of a layer's arithmetic that is padding to whole registers, at most; not of three colours coming in."""
    chosen = [count for place, count in enumerate(layer.channels) if place or count > LANES]
    return 1 - math.prod(count / (LANES * math.ceil(count / LANES)) for count in chosen)


def _about(kind: Kind, times: ModelTime, layers: Sequence[LayerTime], text: str, lost: float | None = None) -> Finding:
    """``lost``: the share at most, where it is not all the time of the layers."""
    names = tuple(layer.name for layer in layers)
    share, most = (times.share(*layers), "") if lost is None else (lost, "up to ")
    said = f"{most}{100 * share:.0f} % of the time in {shortened(names, 50)}: {text}" if names else ""
    return Finding(kind, share, said, names)


def _is_slower(now: LayerTime, was: LayerTime) -> bool:
    """By more than the spread."""
    return now.latency.median > was.latency.median + (now.latency.iqr + was.latency.iqr) / 2


def _is_chosen(layer: LayerTime, dense: Mapping[str, LayerTime]) -> bool:
    """Whether pruning, where there was one, left a number of channels that does not fill the lanes."""
    before = dense[layer.name].channels if layer.name in dense else (0,) * len(layer.channels)
    return any(now != was and now % LANES for now, was in zip(layer.channels, before, strict=True))


def _speed(before: ModelTime, after: ModelTime) -> Finding:
    gain = before.latency.median / after.latency.median
    text = f"{gain:.2f}{TIMES} faster" if gain >= 1 else f"{1 / gain:.2f}{TIMES} SLOWER"
    if before.flops and after.flops:
        promised = before.flops / after.flops
        was, now = (sum(layer.bytes for layer in times.layers) or 1 for times in (before, after))
        text += f" with {promised:.2f}{TIMES} fewer FLOPs and {was / now:.2f}{TIMES} fewer bytes"
        if promised > 1:
            text += f": {100 * gain / promised:.0f} % of what the FLOPs promise"
    return Finding("speed", 1.0, text)


def _shortfall(before: ModelTime, after: ModelTime) -> tuple[Finding, ...]:
    """Of a pass, what is more than the dense time by the ratio of FLOPs, and the classes of layers that it is in."""
    if not before.flops or not after.flops:
        return ()
    left = after.flops / before.flops
    late = after.total - left * before.total
    if late < LEAST * after.total:
        return ()
    parts: dict[str, float] = {"between the layers": after.outside - left * before.outside}
    for times, share in ((after, 1.0), (before, -left)):
        for layer in times.layers:
            parts[f"in {layer.kind}"] = parts.get(f"in {layer.kind}", 0.0) + share * layer.latency.median
    most = sorted(parts.items(), key=lambda part: -part[1])[:3]
    told = ", ".join(f"{milliseconds:,.2f} {where}" for where, milliseconds in most if milliseconds > 0)
    text = f"{late:,.2f} of {after.total:,.2f} ms are more than the FLOPs promise: {told}"
    return (Finding("shortfall", late / after.total, text),)


def _timers(before: ModelTime | None, after: ModelTime) -> Finding:
    sides = {"": after} if before is None else {"dense ": before, "pruned ": after}
    added = [f"{side}{100 * times.overhead:+.1f} %" for side, times in sides.items()]
    text = "timers around the layers changed a pass by " + ", ".join(added) + "; nothing was subtracted"
    return Finding("timers", max(0.0, after.overhead), text)
