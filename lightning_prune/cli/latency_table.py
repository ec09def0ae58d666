"""`latency-table`: time every layer of a model over its widths, here or by a script on another machine."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lightning_prune.cli.architecture import naming_input
from lightning_prune.cli.cost_table import core_count, plural
from lightning_prune.cli.measure import models_of
from lightning_prune.engines import engine_from
from lightning_prune.files import check_writable
from lightning_prune.graph import trace
from lightning_prune.measure import LatencyTable, LayerKind, layer_calls, make_table, write_profile_kit
from lightning_prune.report.table import Column, Table, print_line

SHARES = (1.0, 0.75, 0.5, 0.25)
SHOWN = 8  # layers


def run(options: argparse.Namespace) -> int:
    """`lightning-prune latency-table MODEL --engine onnxruntime --out table.json`."""
    models, inputs = models_of([options.checkpoint], options)
    model = next(iter(models.values())).eval()  # dense
    console = Console()
    if options.kit is not None:
        with naming_input(inputs):
            graph = trace(model, inputs)
        script = write_profile_kit(options.kit, model, inputs, threads=options.threads, graph=graph)
        print_line(console, f"{script.parent}: copy it to the other machine and run", "bold")
        print_line(console, f"python {script.name}   (Python 3.8, numpy, onnxruntime)", indent="  ")
        print_line(console, "there, then bring back the table.json that it writes", "dim")
        return 0
    check_writable(options.out)
    engine = engine_from(options.engine)
    with naming_input(inputs):
        graph = trace(model, inputs)
    started = time.perf_counter()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task(f"layers in {engine.name}")
        table = make_table(
            model,
            inputs,
            engine=engine,
            threads=options.threads,
            graph=graph,
            coarse=options.coarse or None,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    table.save(options.out)
    seconds = time.perf_counter() - started
    console.print()
    calls = Counter(call.kind for call in layer_calls(model, inputs))
    _show(console, table, calls)
    print_line(console, f"{options.out}: {_size(table)} in {seconds:.0f} s", "bold")
    where = f"{table.machine['gpu'] or table.machine['cpu']}, {table.threads} {plural('thread', table.threads)}"
    versions = ", ".join(f"{name} {version}" for name, version in table.versions.items())
    print_line(console, f"{where}; {versions}", "dim")
    if table.threads > core_count():
        print_line(
            console, f"more threads than the {core_count()} cores of this process wait for one another", "yellow"
        )
    return 0


def _size(table: LatencyTable) -> str:
    points = sum(surface.milliseconds.size for layer in table.layers.values() for surface in layer.surfaces)
    layers = len(table.layers)
    return f"{layers} {plural('kind', layers)} of layers, {points:,} {plural('point', points)}"


def _show(console: Console, table: LatencyTable, calls: Counter[LayerKind]) -> None:
    """The kinds that take the most time, at full and at smaller widths."""
    full = {kind: calls[kind] * float(table.time(kind, *times.largest)) for kind, times in table.layers.items()}
    kinds = sorted(full, key=lambda kind: full[kind], reverse=True)[:SHOWN]
    columns = (
        Column("layer", left=True),
        Column("channels"),
        Column("times"),
        *(Column(f"{100 * share:.0f} %", "ms") for share in SHARES),
    )
    rows = []
    for kind in kinds:
        into, out = table.layers[kind].largest
        at = [(max(1, round(share * into)), max(1, round(share * out))) for share in SHARES]
        times = [f"{float(table.time(kind, *channels)):.3f}" for channels in at]
        rows.append((str(kind), f"{into}→{out}", str(calls[kind]), *times))
    console.print(Table(columns, tuple(rows)))
    print_line(
        console, "of one call, at this share of the channels in and out; the kinds that take the most time", "dim"
    )
