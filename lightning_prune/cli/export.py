"""`export`: a checkpoint as ONNX or as a torch.export program, checked by running it."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from lightning_prune.cli.cost_table import latency_cell
from lightning_prune.cli.measure import models_of
from lightning_prune.cli.parser import Parser
from lightning_prune.export import SUFFIX, ExportReport, export
from lightning_prune.measure import samples_in
from lightning_prune.report.table import TIMES, Column, Table, print_line


def run(argv: Sequence[str]) -> int:
    """`lightning-prune export CHECKPOINT --format onnx --out net.onnx`."""
    parser = Parser("export", description="Write a model to a file that runs without this package.")
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="pruned or dense weights; or a model's name, as it is built")
    add("--format", choices=tuple(SUFFIX), default="onnx", help="default: onnx")
    add("--out", metavar="FILE", required=True, help="ending in .onnx or .pt2")
    add("--dynamic-batch", action="store_true", help="leave the number of samples open")
    add("--repeats", type=int, default=20, metavar="N", help="passes timed; default: 20")
    parser.add_model_options()
    options = parser.parse_with_fit_options(argv)
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
