"""`quantize`: a checkpoint as a file in 8 bits; dense and pruned, in float and in 8 bits, in one table."""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path

from pytorch_lightning import LightningModule
from rich.console import Console

from lightning_prune.cli.architecture import Checkpoint, architecture
from lightning_prune.cli.cost_table import DENSE, PRUNED, plural
from lightning_prune.errors import ModelError
from lightning_prune.experiments.quantized import QuantizationSettings, QuantizationStudy, compare_quantized
from lightning_prune.measure import thread_count
from lightning_prune.report.table import print_line


def run(options: argparse.Namespace) -> int:
    """`lightning-prune quantize CHECKPOINT [PRUNED] --config TASK.yaml --out net.int8.onnx`."""
    files = [Checkpoint.read(path) for path in (options.checkpoint, options.pruned) if path is not None]
    if len(files) == 2 and files[0].pruned:
        raise ModelError(f"of two checkpoints the first is the dense one, and {files[0].path} is pruned")
    known = architecture(options, *files)
    if known.data is None or not isinstance(known.dense, LightningModule):
        raise ModelError("calibration needs data: the TASK of --config has no data: section")
    tasks: dict[str, LightningModule] = {}
    for file in files:
        task = known.load(file)
        assert isinstance(task, LightningModule)
        name = PRUNED if file.pruned else DENSE
        tasks[Path(file.path).stem if name in tasks else name] = task
    settings = QuantizationSettings(
        batches=options.calibration_batches,
        metric=options.metric,
        method=options.method,
        ignore=tuple(options.ignore),
        cpu=options.cpu,
        repeats=options.repeats,
    )
    console = Console()
    with thread_count(options.threads) as threads:
        study = compare_quantized(tasks, known.data, options.out, settings)
    _show(console, study, options, threads)
    return 0


def _show(console: Console, study: QuantizationStudy, options: argparse.Namespace, threads: int) -> None:
    console.print()
    console.print(study.table())
    data = {"test": "test", "val": "validation"}[study.stage]
    runs = f"in ONNX Runtime, {threads} {plural('thread', threads)}"
    print_line(console, f"{runs}: {study.metric} of the {data} data; latency of 1 sample", "dim")
    console.print()
    for before, file in pairwise(study.files):
        if (report := file.report) is not None:
            same = "" if report.agreement is None else f", the same answer in {report.agreement:.1%}"
            print_line(console, f"{file.model}, int8: outputs are off by {report.rel_error:.1%} in norm{same}")
            if report.float_operators:
                left = ", ".join(f"{count} {name}" for name, count in report.float_operators.items())
                print_line(console, f"left in float: {left}", indent="  ")
            if file.latency.median > before.latency.median:
                print_line(console, f"{file.model}: 8 bits are SLOWER here than float32", "yellow")
    kept = study.files[-1].report
    assert kept is not None
    how = f"calibrated on {kept.samples:,} training samples by {options.method}; weights of {kept.weight_bits} bits"
    print_line(console, how)
    print_line(console, f"{study.files[-1].model} model in 8 bits: {options.out}", "bold")
