"""`export`: a checkpoint as ONNX or as a torch.export program, checked by running it."""

from __future__ import annotations

import argparse

from rich.console import Console

from lightning_prune.cli.cost_table import latency_cell
from lightning_prune.cli.measure import models_of
from lightning_prune.export import ExportReport, export
from lightning_prune.measure import samples_in
from lightning_prune.report.table import TIMES, Column, Table, print_line


def run(options: argparse.Namespace) -> int:
    """`lightning-prune export CHECKPOINT --format onnx --out net.onnx`."""
    models, inputs = models_of([options.checkpoint], options)
    model = list(models.values())[-1]  # of a dense and a pruned one
    report = export(
        model, inputs, options.out, format=options.format, dynamic_batch=options.dynamic_batch, repeats=options.repeats
    )
    _show(Console(), report, samples_in(inputs))
    return 0


def _show(console: Console, report: ExportReport, samples: int) -> None:
    runner = "ONNX Runtime" if report.format == "onnx" else "torch.export"
    gain = report.model_latency.median / report.exported_latency.median
    columns = Column("runs in"), Column("latency", "ms"), Column("times\nfaster")
    rows = (
        ("PyTorch, eager", latency_cell(report.model_latency), ""),
        (runner, latency_cell(report.exported_latency), f"{gain:.2f}{TIMES}"),
    )
    console.print()
    console.print(Table(columns, rows, {1: "key"}))
    console.print()
    batches = " and ".join(map(str, report.batch_sizes))
    error = f"max relative error {report.max_rel_error:.1e} at batch size {batches} (accepted: {report.tolerance:.0e})"
    print_line(console, f"same outputs: {error}", "green")
    print_line(console, f"{report.path}: {report.size_bytes / 1e6:,.2f} MB", "bold")
    note = f"median ± half the interquartile range at batch size {samples}, timed in turns on the CPU"
    print_line(console, f"latency: {note}", "dim")
