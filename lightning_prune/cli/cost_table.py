"""What models cost, as tables: before pruning, after it, and how many times less that is."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise, product
from typing import Any

from rich.console import Console
from torch import nn

from lightning_prune.engines import Engine, engine_from
from lightning_prune.measure import (
    Latency,
    compare_latency,
    count_params,
    measure,
    measure_memory,
    state_size,
    thread_count,
    with_samples,
)
from lightning_prune.report.table import MISSING, TIMES, Column, Entry, Table, print_line

DENSE, PRUNED = "dense", "pruned"

SMALL = 1e5  # below, thousands are counted instead of millions

Models = dict[str, nn.Module]


def print_costs(console: Console, models: Models, inputs: Any) -> None:
    """Print what follows from the shapes of one model or of two, such as a dense and a pruned one."""
    flops = [measure(model, inputs).flops for model in models.values()]
    costs = (
        (Column("parameters", "{}"), [count_params(model, trainable=False) for model in models.values()]),
        (Column("MACs", "{}"), [found["macs"] for found in flops]),
        (Column("FLOPs", "ptflops, {}", optional=True), [found["ptflops"] for found in flops]),
        (Column("FLOPs", "paper, {}"), [found["paper"] for found in flops]),
        (Column("activations", "{}B", optional=True), [measure_memory(model, inputs) for model in models.values()]),
        (Column("on disk", "{}B"), [state_size(model) for model in models.values()]),
    )
    columns, entries = [Column("")], [[*models, *(["times less"] if len(models) > 1 else [])]]
    for column, values in costs:
        unit, divisor = ("k", 1e3) if min(values) < SMALL else ("M", 1e6)
        columns.append(replace(column, unit=column.unit.format(unit)))
        times = [f"{before / after:.2f}{TIMES}" if after else "" for before, after in pairwise(values)]
        entries.append([*(f"{value / divisor:,.2f}" for value in values), *times])
    console.print(Table(tuple(columns), tuple(zip(*entries, strict=True)), {2: "key"}))
    print_line(console, "MACs and FLOPs per sample; activations alive at once, of the whole batch", "dim")


def print_latency(
    console: Console,
    models: Models,
    inputs: Any,
    sizes: Sequence[int],
    threads: Sequence[int | None],
    repeats: int,
    engine: str | Engine = "eager",
) -> None:
    """Print how long a pass takes, for every number of samples and of threads."""
    both = len(models) > 1
    flops = {name: measure(model, inputs).flops["paper"] for name, model in models.items()} if both else {}
    columns = [Column("batch size"), Column("threads"), *(Column(name, "ms") for name in models)]
    if both:
        columns += [Column("times\nfaster"), Column("of the FLOPs'\npromise")]
    rows, most, cores = [], 0, core_count()
    for size, count in product(sizes, threads):
        batch = with_samples(inputs, size) if size else inputs
        with thread_count(count) as running:
            pairs = {name: (model, batch) for name, model in models.items()}
            found = compare_latency(pairs, engine=engine, repeats=repeats)
        most = max(most, running)
        row: list[str | int | Entry] = [size or MISSING, running, *map(latency_cell, found.values())]
        if both:
            before, after = models
            gain = found[before].median / found[after].median
            promise = flops[before] / max(1, flops[after])
            row += [f"{gain:.2f}{TIMES}", f"{100 * gain / promise:.0f} %"]
        rows.append(tuple(row))
    console.print(Table(tuple(columns), tuple(rows)))
    note = f"latency, engine {engine_from(engine).name}: median ± half the interquartile range of {repeats} passes"
    print_line(console, f"{note}{', models timed in turns' if both else ''}", "dim")
    if most > cores:
        text = f"more threads than the {cores} {plural('core', cores)} of this process wait for one another"
        print_line(console, text, "yellow")


def latency_cell(latency: Latency) -> Entry:
    """Median and half the distance of the quartiles: a ± promises half a width."""
    return Entry(f"{latency.median:,.2f}", f"{latency.iqr / 2:.2f}")


def core_count() -> int:
    """Cores that this process may use; not of the machine, where a container has fewer."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def plural(noun: str, count: int) -> str:
    """The noun, with an s unless there is one."""
    return noun if count == 1 else f"{noun}s"
