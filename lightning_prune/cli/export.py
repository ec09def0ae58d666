"""`export`: a checkpoint as ONNX or as a torch.export program, checked by running it."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from lightning_prune.cli.cost_table import latency_cell
from lightning_prune.cli.graph import Parser
from lightning_prune.cli.measure import model_of
from lightning_prune.cli.models import add_options
from lightning_prune.export import SUFFIX, ExportReport, export
from lightning_prune.measure import samples_in
from lightning_prune.report.table import TIMES, Column, Table, print_line

_PROG = "lightning-prune export"


def run(argv: Sequence[str]) -> int:
    """`lightning-prune export CHECKPOINT --format onnx --out net.onnx`."""
    parser = Parser(
        prog=_PROG, description="Write a model to a file that runs without this package.", allow_abbrev=False
    )
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="pruned or dense weights; or a model's name, as it is built"
    )
    parser.add_argument("--format", choices=tuple(SUFFIX), default="onnx", help="default: onnx")
    parser.add_argument("--out", metavar="FILE", required=True, help="ending in .onnx or .pt2")
    parser.add_argument("--dynamic-batch", action="store_true", help="leave the number of samples open")
    parser.add_argument("--repeats", type=int, default=20, metavar="N", help="passes timed; default: 20")
    add_options(parser)
    options, rest = parser.parse_known_args(argv)
    model, inputs = model_of(options.checkpoint, options, rest, _PROG)
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
    print_line(
        console,
        f"same outputs: max relative error {report.max_rel_error:.1e} at batch size {batches} "
        f"(accepted: {report.tolerance:.0e})",
        "green",
    )
    print_line(console, f"{report.path}: {report.size_bytes / 1e6:,.2f} MB", "bold")
    print_line(
        console,
        f"latency: median ± half the interquartile range at batch size {samples}, timed in turns on the CPU",
        "dim",
    )
