"""`prune`: a checkpoint becomes a smaller one that computes what the masked model computes."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pytorch_lightning import LightningModule
from rich.console import Console
from torch import Tensor, nn

from lightning_prune.cli.architecture import Architecture, Checkpoint, architecture
from lightning_prune.cli.cost_table import DENSE, PRUNED, print_costs, print_latency
from lightning_prune.cli.parser import Parser
from lightning_prune.criteria import Criterion, criterion_from
from lightning_prune.criteria.scoring import Scores, score
from lightning_prune.errors import ModelError, NoEffectWarning, NotReconstructedWarning, PlanError, UnreachedWarning
from lightning_prune.experiments.runner import Runner, quiet
from lightning_prune.files import check_writable
from lightning_prune.graph import ChannelGraph, trace
from lightning_prune.graph.unreached import note_of
from lightning_prune.measure import samples_in
from lightning_prune.model_state.preservation import copy_without_masks
from lightning_prune.plan import Coupling, Plan
from lightning_prune.reconstruction.checkpoint import save
from lightning_prune.reconstruction.lossless import LosslessReport
from lightning_prune.reconstruction.small_model import reconstruct_
from lightning_prune.report.table import print_line
from lightning_prune.selection import Budget, GlobalRatio, LayerRatio, Selection
from lightning_prune.selection.explanation import explain

REPEATS = 20  # passes timed
_COSTS = ("flops", "params", "latency_ms")
_USAGE = """lightning-prune prune CHECKPOINT (--model NAME | --config TASK.yaml) [--criterion l1]
                             [--ratio 0.5 | --budget flops=0.5] [--out pruned.pt] [--explain]"""


def run(argv: Sequence[str]) -> int:
    """`lightning-prune prune CHECKPOINT --config TASK.yaml --criterion jre --ratio 0.5`."""
    options = _parser().parse_with_fit_options(argv)
    criterion, selection = criterion_from(options.criterion), _selection(options)
    source, out = Path(options.checkpoint), options.out
    if source.exists() and out.exists() and out.samefile(source):
        raise ModelError(f"--out {out} is the checkpoint itself; write to another file")
    if not options.explain:
        check_writable(out)
    checkpoint = Checkpoint.read(options.checkpoint)
    if checkpoint.pruned:
        raise ModelError(f"{source} is pruned already; prune the dense checkpoint it came from, further")
    known = architecture(options, checkpoint)
    model, inputs, deployed = known.load(checkpoint), known.example_inputs(), known.deployed_inputs()
    graph, scores = _scored(model, known, criterion, options)
    about: dict[str, Any] = {"coupling": options.coupling, "model": model, "example_inputs": deployed}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)
        plan = selection.select(graph, scores, **about)
    if not plan:
        raise PlanError(f"nothing is removed by {_asked(options)}; there is nothing to write")
    console = Console()
    if options.explain:
        reach = selection.reach(graph, scores, **about) if isinstance(selection, Budget) else None
        text = explain(model, graph, plan, inputs, reach=reach)
        console.print(f"{text}\n\nNothing was done.", highlight=False, markup=False, soft_wrap=True)
        return 0
    small = copy_without_masks(model)
    with warnings.catch_warnings():
        for told_below in (NotReconstructedWarning, UnreachedWarning):
            warnings.simplefilter("ignore", told_below)
        lossless = reconstruct_(small, graph, plan, example_inputs=inputs)
    assert lossless is not None
    console.print()
    models = {DENSE: model, PRUNED: small}
    print_costs(console, models, deployed)
    console.print()
    print_latency(console, models, deployed, [samples_in(deployed)], [None], REPEATS)
    console.print()
    _show(console, graph, plan, lossless, options)
    settings = f"{criterion!r}, {selection!r}, coupling {options.coupling!r}"
    shape = list(inputs.shape) if isinstance(inputs, Tensor) else None
    save(out, small, plan, input=shape, origin=known.origin, settings=settings)
    print_line(console, f"pruned model: {out}", "bold")
    return 0


def _parser() -> Parser:
    parser = Parser(
        "prune",
        usage=_USAGE,
        description="Prune a checkpoint. The smaller model is checked against the masked one before it is written.",
        epilog="With --config, the other options are those of lightning-prune fit, as --model.KEY=VALUE.",
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="of Lightning (--config), or a state dict (--model)")
    add("--criterion", default="l1", metavar="NAME", help="l1, fpgm, jre, ...; default: l1")
    add("--score-batches", type=int, metavar="N", help="of the training data, for criteria that need it")
    amount = parser.add_mutually_exclusive_group().add_argument
    amount("--ratio", type=float, default=0.5, metavar="SHARE", help="of channels removed; default: 0.5")
    costs = "flops=, params= (share that remains); latency_ms= (of a sample)"
    amount("--budget", type=_budget, metavar="COST=N", help=costs)
    add("--per-layer", action="store_true", help="that share of every layer, not of the network")
    add("--coupling", choices=get_args(Coupling), default="joint", help="default: joint")
    add("--round-to", type=int, default=1, metavar="N", help="channels kept are multiples of it")
    add("--ignore", action="append", default=[], metavar="LAYER", help="leave it whole; a pattern; repeat")
    add("--out", type=Path, default=Path("pruned.pt"), metavar="FILE", help="default: pruned.pt")
    add("--explain", action="store_true", help="say what would be done, and do nothing")
    parser.add_model_options()
    return parser


def _budget(words: str) -> dict[str, float]:
    costs = {}
    for part in words.split(","):
        name, _, value = part.partition("=")
        try:
            costs[name] = float(value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"takes COST=NUMBER, such as flops=0.5, got '{part}'") from error
        if name not in _COSTS:
            raise argparse.ArgumentTypeError(f"knows flops, params and latency_ms, got '{name}'")
    return costs


def _selection(options: argparse.Namespace) -> Selection:
    constraints: dict[str, Any] = {"round_to": options.round_to, "ignore": tuple(options.ignore)}
    if options.budget is None:
        return (LayerRatio if options.per_layer else GlobalRatio)(options.ratio, **constraints)
    if options.per_layer:
        raise PlanError("--budget decides how many channels go; leave out --per-layer")
    return Budget(**options.budget, **constraints, repeats=REPEATS)


def _scored(
    model: nn.Module, known: Architecture, criterion: Criterion, options: argparse.Namespace
) -> tuple[ChannelGraph, Scores]:
    """Trace and score: on the recipe's training data, as `fit` does it, or on weights alone where they are enough."""
    inputs = known.example_inputs()
    if not criterion.needs_forward:
        graph = trace(model, inputs)
        return graph, score(model, graph, criterion)
    if not isinstance(model, LightningModule) or known.data is None:
        raise ModelError(
            f"{options.criterion} is computed on data and a loss, which come from a recipe: pass --config TASK.yaml "
            "with a data: section, or use a criterion that looks at weights only, such as l1"
        )
    with quiet():
        runner = Runner(known.data, accelerator="cpu")
        return runner.score(model, criterion, batches=options.score_batches, example_inputs=inputs)


def _asked(options: argparse.Namespace) -> str:
    """What decides how many channels go, in the command line's words."""
    costs = ",".join(f"{name}={value:g}" for name, value in (options.budget or {}).items())
    words = [f"--budget {costs}" if costs else f"--ratio {options.ratio:g}"]
    words += ["--per-layer"] * options.per_layer
    words += [f"--round-to {options.round_to}"] * (options.round_to != 1)
    return " ".join([*words, *(f"--ignore {layer}" for layer in options.ignore)])


def _show(
    console: Console, graph: ChannelGraph, plan: Plan, lossless: LosslessReport, options: argparse.Namespace
) -> None:
    verdict = f"max relative error {lossless.max_rel_error:.1e} in {lossless.dtype}, against the masked model"
    if plan.lossless:
        print_line(console, f"lossless: {verdict}", "green")
    else:
        print_line(console, f"NOT lossless, by choice of the plan: {verdict}", "yellow")
    gone = sum(len(group.removed) for name, group in plan.groups.items() if name not in lossless.left)
    total = sum(group.size for group in graph.groups)
    by = f"{options.criterion}, {_asked(options)}, coupling {options.coupling}"
    print_line(console, f"{gone:,} of {total:,} channels removed by {by}")
    if graph.unreached:
        print_line(console, note_of(graph.unreached), "yellow")
    for group, why in lossless.left.items():
        print_line(console, f"left whole: {group}: {why}", indent="  ")
