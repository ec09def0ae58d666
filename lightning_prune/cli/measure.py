"""`measure`: parameters, FLOPs and latency, before and after pruning, and layer by layer what sets the pace."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from lightning_prune.cli.cost_table import DENSE, PRUNED, Models, plural, print_costs, print_latency
from lightning_prune.cli.graph import Parser
from lightning_prune.cli.layer_table import print_layers
from lightning_prune.cli.models import add_options, architecture, example_inputs, is_pruned, one_sample, origin_of
from lightning_prune.errors import ModelError
from lightning_prune.measure import explain_speed, measure_machine, samples_in, thread_count, time_layers, with_samples
from lightning_prune.reconstruction.checkpoint import read_file
from lightning_prune.report.table import print_line

_PROG = "lightning-prune measure"
_USAGE = """lightning-prune measure NAME [PRUNED] [--arg KEY=VALUE ...] [--input 1 3 224 224] [--layers]
       lightning-prune measure [CHECKPOINT] [PRUNED] (--model NAME | --config TASK.yaml) [--layers]"""


def run(argv: Sequence[str]) -> int:
    """`lightning-prune measure MODEL [PRUNED] [--layers]`."""
    options, rest = _parser().parse_known_args(argv)
    models, inputs = models_of(options.models, options, rest, _PROG)
    sizes = options.batch_sizes or [samples_in(inputs)]
    if sizes != [samples_in(inputs)] and not samples_in(inputs):
        raise ModelError("--batch-sizes: the example inputs are no batch")
    console = Console()
    console.print()
    batch = with_samples(inputs, sizes[0]) if sizes[0] else inputs
    print_costs(console, models, batch)
    console.print()
    print_latency(console, models, inputs, sizes, options.threads or [None], options.repeats)
    if options.layers:
        with thread_count(options.threads[0] if options.threads else None):
            machine = measure_machine()
            times = time_layers({name: (model, batch) for name, model in models.items()}, repeats=options.repeats)
        *before, after = times.values()
        dense = before[0] if before else None
        console.print()
        size = f"batch size {sizes[0]}, " if sizes[0] else ""
        print_line(console, f"layer by layer, {size}{machine.threads} {plural('thread', machine.threads)}", "bold")
        print_layers(console, after, machine, dense, most=options.top)
        console.print()
        for finding in explain_speed(after, machine, dense):
            style = {"speed": "bold", "timers": "dim"}.get(finding.kind, "")
            print_line(console, f"- {finding.text}", style, indent="  ")
    return 0


def models_of(paths: Sequence[str], options: argparse.Namespace, rest: Sequence[str], prog: str) -> tuple[Models, Any]:
    """The models that a command line names, dense before pruned, and inputs for them.

    Args:
        paths: files, of which the first may be the name of a model instead.
        options: with those of `add_options`.
        rest: options that belong to the configuration.
        prog: the command, for its errors.

    Raises:
        PruningError: one of its kinds, naming what cannot be found, read or built.
    """
    if len(paths) > 2:
        raise ModelError(f"at most two models, dense and pruned, can be measured at once, got {' '.join(paths)}")
    if paths and options.model is None and not options.config and not _is_file(paths[0]):
        options.model, paths = paths[0], paths[1:]
    contents = [read_file(path) for path in paths]
    known = architecture(options, rest, prog, "".join(origin_of(path) for path in paths))
    inputs = one_sample(options.input, example_inputs(options.input, known, *paths))
    loaded = [known.load(path)[0] for path in paths]
    if len(loaded) == 2:
        return {DENSE: loaded[0], PRUNED: loaded[1]}, inputs
    if loaded and is_pruned(contents[0]):
        return {DENSE: known.dense.eval(), PRUNED: loaded[0]}, inputs
    return {DENSE: loaded[0] if loaded else known.dense.eval()}, inputs


def model_of(path: str, options: argparse.Namespace, rest: Sequence[str], prog: str) -> tuple[nn.Module, Any]:
    """The one model that a command line names, and inputs for it."""
    models, inputs = models_of([path], options, rest, prog)
    return list(models.values())[-1], inputs


def _parser() -> Parser:
    parser = Parser(
        prog=_PROG,
        usage=_USAGE,
        description="Measure what a model costs on this machine, before and after pruning; on the CPU.",
        epilog="With --config, the other options are those of lightning-prune fit, as --model.KEY=VALUE.",
        allow_abbrev=False,
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help="a model's name or a checkpoint; then a pruned one")
    parser.add_argument("--batch-sizes", type=_counts, metavar="1,8", help="default: that of --input, or 1")
    parser.add_argument("--threads", type=_counts, metavar="1,2", help="default: as torch is set")
    parser.add_argument("--repeats", type=_count, default=20, metavar="N", help="passes timed per model; default: 20")
    parser.add_argument("--layers", action="store_true", help="layer by layer, and what sets the pace")
    parser.add_argument("--top", type=_count, default=20, metavar="N", help="layers shown; default: 20")
    add_options(parser)
    return parser


def _count(word: str) -> int:
    if not word.isascii() or not word.isdigit() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got '{word}'")
    return int(word)


def _counts(words: str) -> list[int]:
    return [_count(word) for word in words.split(",")]


def _is_file(word: str) -> bool:
    """Or meant to be one; then the error is that there is none."""
    return Path(word).is_file() or "/" in word or word.endswith((".pt", ".pth", ".ckpt", ".bin"))
