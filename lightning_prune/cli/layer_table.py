"""The layers of `lightning-prune measure --layers` as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console

from lightning_prune.cli.cost_table import DENSE, PRUNED, plural
from lightning_prune.measure import LayerTime, Machine, ModelTime
from lightning_prune.report.table import TIMES, Column, Table, print_line

LAYER = (Column("layer"), Column("channels\nor kind", optional=True))
ALONE = (Column("ms"), Column("share"), Column("MFLOPs"))
COMPARED = (
    *(Column(DENSE, "ms"), Column(PRUNED, "ms"), Column("times\nfaster"), Column("share")),
    *(Column("FLOPs\nfewer"), Column("bytes\nfewer", optional=True)),
)
LIMIT = (
    *(Column("FLOPs\nper byte", optional=True), Column("GFLOP/s", optional=True), Column("limit"), Column("of\nlimit")),
)


def print_layers(
    console: Console,
    after: ModelTime,
    machine: Machine,
    before: ModelTime | None = None,
    *,
    names: Sequence[str] = (DENSE, PRUNED),
    most: int = 20,
) -> None:
    """Print the layers that take the most time, in the order in which they run, and the rest in one row.

    ``names`` are of the two models, where there are two.
    """
    sides = [after] if before is None else [after, before]
    shares = [{layer.name: side.share(layer) for layer in side.layers} for side in sides]
    ranked = sorted(after.layers, key=lambda layer: max(side.get(layer.name, 0.0) for side in shares), reverse=True)
    leading = set(ranked[:most])
    dense = {} if before is None else {layer.name: layer for layer in before.layers}
    rows = [_layer(layer, dense.get(layer.name), after.total, machine) for layer in after.layers if layer in leading]
    others = {layer.name for layer in after.layers if layer not in leading}
    if others:
        rest = (sum(layer.latency.median for layer in side.layers if layer.name in others) for side in sides)
        rows.append(_times(f"{len(others)} other layers", after.total, *rest))
    rows.append(_times("between layers", after.total, *(side.outside for side in sides)))
    rows.append(_times("together", after.total, *(side.total for side in sides)))

    columns = (*LAYER, *(ALONE if before is None else COMPARED), *LIMIT)
    filled = tuple(tuple(row.get(column.title, "") for column in columns) for row in rows)
    if before is not None:
        named = dict(zip((DENSE, PRUNED), names, strict=True))
        columns = tuple(replace(column, title=named.get(column.title, column.title)) for column in columns)
    console.print(Table(columns, filled, {len(rows) - 1: "key"}))
    print_line(
        console,
        f"this machine on {machine.threads} {plural('thread', machine.threads)}, measured just now: "
        f"{machine.flops / 1e9:.1f} GFLOP/s in a matrix product, {machine.bandwidth / 1e9:.1f} GB/s in a copy, so a "
        f"balance of {machine.balance:.1f} FLOPs per byte; the call of a layer alone takes {1e6 * machine.call:.0f} to "
        f"{1e6 * machine.product_call:.0f} µs",
        "dim",
    )
    print_line(
        console,
        "limit: whichever of FLOPs, bytes and calls asks for the most time at that pace; of limit: that time over the "
        "time taken; times are medians",
        "dim",
    )


def _layer(layer: LayerTime, twin: LayerTime | None, total: float, machine: Machine) -> dict[str, str]:
    """What the columns hold, by their titles."""
    now = layer.latency.median
    return {
        **_times(layer.name, total, now, None if twin is None else twin.latency.median),
        "channels\nor kind": "→".join(map(str, layer.channels)) or layer.kind,
        "MFLOPs": f"{layer.flops / 1e6:,.1f}",
        "FLOPs\nfewer": _factor(None if twin is None else twin.flops, layer.flops),
        "bytes\nfewer": _factor(None if twin is None else twin.bytes, layer.bytes),
        "FLOPs\nper byte": f"{layer.intensity:.1f}",
        "GFLOP/s": f"{layer.flops / now / 1e6:,.1f}" if now and layer.flops else "",
        "limit": layer.bound(machine),
        "of\nlimit": f"{100 * layer.reach(machine):.0f} %",
    }


def _times(name: str, total: float, now: float, was: float | None = None) -> dict[str, str]:
    return {
        "layer": name,
        "ms": f"{now:,.3f}",
        DENSE: "" if was is None else f"{was:,.3f}",
        PRUNED: f"{now:,.3f}",
        "times\nfaster": _factor(was, now),
        "share": f"{100 * now / total:.1f} %",
    }


def _factor(before: float | None, after: float) -> str:
    return f"{before / after:.2f}{TIMES}" if before is not None and after else ""
