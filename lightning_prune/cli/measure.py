"""`measure`: parameters, FLOPs and latency, before and after pruning, and layer by layer what sets the pace."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from lightning_prune.cli.architecture import Architecture, Checkpoint, architecture, check_memory, naming_input
from lightning_prune.cli.cost_table import DENSE, PRUNED, Models, plural, print_costs, print_latency
from lightning_prune.cli.layer_table import print_layers
from lightning_prune.cli.named_objects import is_object_path
from lightning_prune.cli.parser import UsageError
from lightning_prune.measure import explain_speed, measure_machine, samples_in, thread_count, time_layers, with_samples
from lightning_prune.report.table import print_line

_FILES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")


def run(options: argparse.Namespace) -> int:
    """`lightning-prune measure MODEL [PRUNED] [--layers]`."""
    models, inputs = models_of(options.models, options)
    sizes = options.batch_sizes or [samples_in(inputs)]
    if sizes != [samples_in(inputs)] and not samples_in(inputs):
        raise UsageError("--batch-sizes: the example inputs are no batch")
    if options.layers and options.engine != "eager":
        raise UsageError(
            f"--layers times modules of PyTorch, and {options.engine} runs none: leave out --engine, or make a table "
            "of its layers with lightning-prune latency-table"
        )
    if sizes[0] and isinstance(inputs, Tensor):
        check_memory((max(sizes), *inputs.shape[1:]))
    console = Console()
    console.print()
    batch = with_samples(inputs, sizes[0]) if sizes[0] else inputs
    with naming_input(inputs):
        print_costs(console, models, batch)
    console.print()
    print_latency(console, models, inputs, sizes, options.threads or [None], options.repeats, options.engine)
    if options.layers:
        _print_by_layer(console, models, batch, options, f"batch size {sizes[0]}, " if sizes[0] else "")
    return 0


def models_of(paths: Sequence[str], options: argparse.Namespace) -> tuple[Models, Any]:
    """The models of these files, of which the first may be a model's name, dense before pruned; and inputs for them."""
    known, files = asked_for(paths, options)
    files.sort(key=lambda file: file.pruned)
    models = {} if any(not file.pruned for file in files) or len(files) == 2 else {DENSE: known.dense.eval()}
    names = [PRUNED if file.pruned else DENSE for file in files]
    if len(files) == 2 and names[0] == names[1]:  # two dense ones, or two pruned ones
        names = _told_apart([Path(file.path) for file in files])
    models |= dict(zip(names, map(known.load, files), strict=True))
    return models, known.deployed_inputs(*files)


def _told_apart(paths: list[Path]) -> list[str]:
    """The shortest names that differ."""
    for names in ([path.stem for path in paths], [path.name for path in paths], list(map(str, paths))):
        if len(set(names)) == len(names):
            return names
    raise UsageError(f"{paths[0]} is named twice; name two files, or one")


def asked_for(paths: Sequence[str], options: argparse.Namespace) -> tuple[Architecture, list[Checkpoint]]:
    """The dense model, and these files, of which the first may be the model's name."""
    if len(paths) > 2:
        raise UsageError(f"at most two models, dense and pruned, can be measured at once, got {' '.join(paths)}")
    if paths and options.model is None and not options.config:
        first = paths[0]  # a file, or meant to be one, or else a name
        meant = "/" in first or first.endswith(_FILES)
        if (not Path(first).is_file() and (is_object_path(first) or not meant)) or first.endswith(".py"):
            options.model, paths = first, paths[1:]
    files = [Checkpoint.read(path) for path in paths]
    return architecture(options, *files), files


def _print_by_layer(console: Console, models: Models, batch: Any, options: argparse.Namespace, size: str) -> None:
    with thread_count(options.threads[0] if options.threads else None):
        machine = measure_machine()
        times = time_layers({name: (model, batch) for name, model in models.items()}, repeats=options.repeats)
    *before, after = times.values()
    was = before[0] if before else None
    console.print()
    print_line(console, f"layer by layer, {size}{machine.threads} {plural('thread', machine.threads)}", "bold")
    print_layers(console, after, machine, was, names=tuple(times), most=options.top)
    console.print()
    if before and {DENSE, PRUNED} != {*times}:
        print_line(console, f"{[*times][-1]}:")
        was = None  # of two dense models, or two pruned ones, the words for a dense and a pruned one would be wrong
    for finding in explain_speed(after, machine, was):
        style = {"speed": "bold", "timers": "dim"}.get(finding.kind, "")
        print_line(console, f"- {finding.text}", style, indent="  ")
