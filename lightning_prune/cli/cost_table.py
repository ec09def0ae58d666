"""What models cost, as tables: before pruning, after it, and how many times less that is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from torch import nn

from lightning_prune.cli.tables import Head, print_line, print_table
from lightning_prune.layer_timing import thread_count
from lightning_prune.measurement import (
    Latency,
    compare_latency,
    count_params,
    flops_by_convention,
    measure_memory,
    state_size,
    with_samples,
)
from lightning_prune.report.table import MISSING, TIMES

DENSE, PRUNED = "dense", "pruned"

Models = dict[str, nn.Module]


def print_costs(console: Console, models: Models, inputs: Any) -> None:
    """Print what follows from the shapes of one model, or of a dense and a pruned one."""
    heads = [
        Head(""),
        Head("parameters\nM"),
        Head("MACs\nM"),
        Head("FLOPs\nptflops, M", optional=True),
        Head("FLOPs\npaper, M"),
        Head("activations\nMB", optional=True),
        Head("on disk\nMB"),
    ]
    flops = {name: flops_by_convention(model, inputs) for name, model in models.items()}
    costs = [
        (
            count_params(model, trainable=False),
            *(flops[name][convention] for convention in ("macs", "ptflops", "paper")),
            measure_memory(model, inputs),
            state_size(model),
        )
        for name, model in models.items()
    ]
    rows = [[name, *(f"{value / 1e6:,.2f}" for value in cost)] for name, cost in zip(models, costs, strict=True)]
    if len(costs) > 1:
        pairs = zip(*costs, strict=True)
        rows.append(["times less", *(f"{before / after:.2f}{TIMES}" if after else "" for before, after in pairs)])
    print_table(console, heads, rows, last="cyan" if len(costs) > 1 else "")
    print_line(console, "MACs and FLOPs per sample; activations alive at once, of the whole batch", "dim")


def print_latency(
    console: Console,
    models: Models,
    inputs: Any,
    sizes: Sequence[int],
    threads: Sequence[int | None],
    repeats: int,
) -> None:
    """Print how long a pass takes, for every number of samples and of threads."""
    both = len(models) > 1
    flops = {name: flops_by_convention(model, inputs)["paper"] for name, model in models.items()}
    heads = [Head("batch size"), Head("threads"), *(Head(f"{name}\nms") for name in models)]
    if both:
        heads += [Head("times\nfaster"), Head("of the FLOPs'\npromise")]
    rows = []
    for size in sizes:
        batch = with_samples(inputs, size) if size else inputs
        for count in threads:
            with thread_count(count) as running:
                pairs = {name: (model, batch) for name, model in models.items()}
                found = compare_latency(pairs, repeats=repeats)
            row = [str(size or MISSING), str(running), *(latency_cell(found[name]) for name in models)]
            if both:
                gain = found[DENSE].median / found[PRUNED].median
                promise = flops[DENSE] / max(1, flops[PRUNED])
                row += [f"{gain:.2f}{TIMES}", f"{100 * gain / promise:.0f} %"]
            rows.append(row)
    print_table(console, heads, rows)
    note = f"latency on the CPU: median ± half the interquartile range of {repeats} passes"
    print_line(console, f"{note}{', models timed in turns' if both else ''}", "dim")


def latency_cell(latency: Latency) -> str:
    """Median and half the distance of the quartiles: a ± promises half a width."""
    return f"{latency.median:,.2f} ± {latency.iqr / 2:.2f}"
