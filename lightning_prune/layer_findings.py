"""Is the pruned model faster, and if not, why: said in words from the times of its layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_prune.graph.describe import shortened
from lightning_prune.layer_timing import LayerTime, Machine, ModelTime

LANES = 8  # float32 numbers in an AVX2 register; AVX-512 holds two of them
LEAST = 0.01  # share of the time below which nothing is said
Kind = Literal["speed", "not shrunk", "slower", "memory", "call", "lanes", "outside", "timers"]


@dataclass(frozen=True)
class Finding:
    """One answer to where the time goes.

    Attributes:
        kind: ``speed`` (the whole model), ``not shrunk`` (layers with all their FLOPs), ``slower`` (fewer FLOPs, more
            time), ``memory`` and ``call`` (what limits the layers, see `LayerTime.bound`), ``lanes`` (channel counts
            that are no multiple of `LANES`), ``outside`` (between the layers), ``timers`` (their overhead).
        share: of a timed pass of the (pruned) model; 1 for ``speed``.
        text: in words.
        layers: that it is about, slowest first.
    """

    kind: Kind
    share: float
    text: str
    layers: tuple[str, ...] = ()


def explain_speed(after: ModelTime, machine: Machine, before: ModelTime | None = None) -> tuple[Finding, ...]:
    """Say what sets the pace of a model, and how much of what pruning promises it delivers.

    Findings overlap: a layer may be bound by memory and have an odd number of channels.

    Args:
        after: of the pruned model, or of the only one.
        machine: from `measure_machine`, with the same number of threads.
        before: of the dense model, from the same call of `time_layers`.

    Example:
        >>> from torch import nn, zeros
        >>> from lightning_prune.layer_timing import measure_machine, time_layers
        >>> times = time_layers({"": (nn.Sequential(nn.Conv2d(3, 9, 3)), zeros(1, 3, 64, 64))})[""]
        >>> [finding.layers for finding in explain_speed(times, measure_machine()) if finding.kind == "lanes"]
        [('0',)]
    """
    layers = sorted(after.layers, key=lambda layer: -layer.latency.median)
    dense = {} if before is None else {layer.name: layer for layer in before.layers}
    found = [
        _about("memory", after, [layer for layer in layers if layer.bound(machine) == "memory"], _memory(machine)),
        _about("call", after, [layer for layer in layers if layer.bound(machine) == "call"], _CALL),
        _about("lanes", after, [layer for layer in layers if _uneven(layer)], _LANES),
        _about("not shrunk", after, [layer for layer in layers if _whole(layer, dense)], _WHOLE),
        _about("slower", after, [layer for layer in layers if _slower(layer, dense)], _SLOWER),
        _outside(after),
    ]
    said = sorted((finding for finding in found if finding.share >= LEAST), key=lambda finding: -finding.share)
    overall = () if before is None else (_speed(before, after),)
    return (*overall, *said, _timers(before, after))


_CALL = "so little is done there that the call takes longer than the arithmetic or the memory would"
_LANES = (
    f"channel counts that are no multiple of {LANES} leave SIMD lanes empty; pruning with round_to={LANES} avoids them"
)
_WHOLE = "did not shrink, as many FLOPs as in the dense model; `lightning-prune graph` says what cannot be pruned"
_SLOWER = "fewer FLOPs than in the dense model, and yet slower by more than the spread"
_OUTSIDE = "between the layers: additions, reshapes, functional calls, Python and the timers"


def _outside(times: ModelTime) -> Finding:
    share = times.outside / times.timed.median
    return Finding("outside", share, f"{_percent(share)} {_OUTSIDE}")


def _memory(machine: Machine) -> str:
    return (
        f"bound by memory, below this machine's balance of {machine.balance:.0f} FLOPs per byte; there only fewer "
        "bytes help, such as norms and activations fused into convolutions (ONNX Runtime, torch.compile)"
    )


def _about(kind: Kind, times: ModelTime, layers: Sequence[LayerTime], text: str) -> Finding:
    names = tuple(layer.name for layer in layers)
    if not names:
        return Finding(kind, 0.0, "")
    share = times.share(*layers)
    return Finding(kind, share, f"{_percent(share)} in {shortened(names, 50)}: {text}", names)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} % of the time"


def _uneven(layer: LayerTime) -> bool:
    return any(channels % LANES for channels in layer.channels[1:]) or any(
        channels % LANES and channels > LANES
        for channels in layer.channels[:1]  # three colours are given, not chosen
    )


def _whole(layer: LayerTime, dense: Mapping[str, LayerTime]) -> bool:
    twin = dense.get(layer.name)
    return twin is not None and bool(twin.flops) and layer.flops >= twin.flops


def _slower(layer: LayerTime, dense: Mapping[str, LayerTime]) -> bool:
    twin = dense.get(layer.name)
    if twin is None or layer.flops >= twin.flops:
        return False
    spread = (layer.latency.iqr + twin.latency.iqr) / 2
    return layer.latency.median > twin.latency.median + spread


def _speed(before: ModelTime, after: ModelTime) -> Finding:
    gain = before.latency.median / after.latency.median
    if not after.flops or not before.flops:
        return Finding("speed", 1.0, f"{_factor(gain)}")
    promised = before.flops / after.flops
    moved, kept = _total_bytes(before.layers), _total_bytes(after.layers)
    text = f"{_factor(gain)} with {promised:.2f}x fewer FLOPs and {moved / kept:.2f}x fewer bytes"
    if promised > 1:
        text += f": {100 * gain / promised:.0f} % of what the FLOPs promise"
    return Finding("speed", 1.0, text)


def _total_bytes(layers: Iterable[LayerTime]) -> int:
    return sum(layer.bytes for layer in layers) or 1


def _factor(gain: float) -> str:
    return f"{gain:.2f}x faster" if gain >= 1 else f"{1 / gain:.2f}x SLOWER"


def _timers(before: ModelTime | None, after: ModelTime) -> Finding:
    added = [f"{100 * times.overhead:+.1f} %" for times in (before, after) if times is not None]
    text = "timers around the layers changed a pass by " + ", ".join(added) + "; nothing was subtracted"
    return Finding("timers", max(0.0, after.overhead), text)
