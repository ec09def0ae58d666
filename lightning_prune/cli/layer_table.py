"""The layers of `lightning-prune measure --layers` as a table."""

from __future__ import annotations

from rich.console import Console

from lightning_prune.cli.tables import Head, print_line, print_table
from lightning_prune.measure import LayerTime, Machine, ModelTime
from lightning_prune.report.table import TIMES


def print_layers(
    console: Console, after: ModelTime, machine: Machine, before: ModelTime | None = None, *, most: int = 20
) -> None:
    """Print the layers that take the most time, in the order in which they run, and the rest in one row.

    Args:
        console: where to.
        after: of the pruned model, or of the only one.
        machine: its limits.
        before: of the dense model.
        most: layers with a row of their own.
    """
    dense = {} if before is None else {layer.name: layer for layer in before.layers}

    def weight(layer: LayerTime) -> float:
        twin = dense.get(layer.name)
        return max(after.share(layer), before.share(twin) if before is not None and twin is not None else 0.0)

    leading = set(sorted(after.layers, key=weight, reverse=True)[:most])
    rows = [_row(layer, dense.get(layer.name), after, machine, before) for layer in after.layers if layer in leading]
    others = [layer for layer in after.layers if layer not in leading]
    if others:
        names = {layer.name for layer in others}
        was = None if before is None else sum(x.latency.median for x in before.layers if x.name in names)
        rows.append(_sum(f"{len(others)} other layers", sum(x.latency.median for x in others), was, after, before))
    rows.append(_sum("between layers", after.outside, None if before is None else before.outside, after, before))
    rows.append(_sum("together", after.total, None if before is None else before.total, after, before))

    compared = before is not None
    heads = [Head("layer"), Head("channels\nor kind", optional=True)]
    heads += [Head("dense\nms"), Head("pruned\nms"), Head("times\nfaster")] if compared else [Head("ms")]
    heads += [Head("share")]
    heads += [Head("FLOPs\nfewer"), Head("bytes\nfewer", optional=True)] if compared else [Head("MFLOPs")]
    heads += [Head("FLOPs\nper byte", optional=True), Head("GFLOP/s", optional=True), Head("limit"), Head("of\nlimit")]
    print_table(console, heads, rows, last="bold")
    print_line(
        console,
        f"this machine on {machine.threads} {'thread' if machine.threads == 1 else 'threads'}, measured just now: "
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


def _row(
    layer: LayerTime, twin: LayerTime | None, after: ModelTime, machine: Machine, before: ModelTime | None
) -> list[str]:
    now = layer.latency.median
    rate = f"{layer.flops / now / 1e6:,.1f}" if now and layer.flops else ""
    return [
        layer.name,
        "→".join(map(str, layer.channels)) or layer.kind,
        *_times(now, None if twin is None else twin.latency.median, before is not None),
        f"{100 * after.share(layer):.1f} %",
        *(
            [f"{layer.flops / 1e6:,.1f}"]
            if before is None
            else [_fewer(layer.flops, twin.flops if twin else None), _fewer(layer.bytes, twin.bytes if twin else None)]
        ),
        f"{layer.intensity:.1f}",
        rate,
        layer.bound(machine),
        f"{100 * layer.reach(machine):.0f} %",
    ]


def _sum(name: str, now: float, was: float | None, after: ModelTime, before: ModelTime | None) -> list[str]:
    blank = [""] if before is None else ["", ""]
    share = f"{100 * now / after.total:.1f} %"
    return [name, "", *_times(now, was, before is not None), share, *blank, "", "", "", ""]


def _times(now: float, was: float | None, compared: bool) -> list[str]:
    if not compared:
        return [f"{now:,.3f}"]
    if was is None:
        return ["", f"{now:,.3f}", ""]
    return [f"{was:,.3f}", f"{now:,.3f}", f"{was / now:.2f}{TIMES}" if now else ""]


def _fewer(now: int, was: int | None) -> str:
    return f"{was / now:.2f}{TIMES}" if now and was else ""
