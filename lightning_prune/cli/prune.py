"""`prune`: a checkpoint becomes a smaller one that computes what the masked model computes."""

from __future__ import annotations

import argparse
import shlex
import warnings
from typing import Any

from rich.console import Console
from torch import Tensor, nn

from lightning_prune.cli.architecture import Architecture, Checkpoint, architecture, naming_input
from lightning_prune.cli.constraints import constraint_words, constraints_of
from lightning_prune.cli.cost_table import DENSE, PRUNED, print_costs, print_latency
from lightning_prune.cli.criterion import criterion_of
from lightning_prune.cli.parser import UsageError
from lightning_prune.criteria import Criterion
from lightning_prune.criteria.scores import Scores
from lightning_prune.criteria.scoring import score
from lightning_prune.errors import ModelError, NoEffectWarning, NotReconstructedWarning, PlanError, UnreachedWarning
from lightning_prune.files import check_writable
from lightning_prune.graph import ChannelGraph, trace
from lightning_prune.graph.unreached import note_of
from lightning_prune.measure import LatencyTable, samples_in
from lightning_prune.model_state.preservation import copy_without_masks
from lightning_prune.plan import Plan
from lightning_prune.reconstruction.checkpoint import save
from lightning_prune.reconstruction.lossless import LosslessReport
from lightning_prune.reconstruction.small_model import reconstruct_
from lightning_prune.report.table import print_line
from lightning_prune.selection import Budget, FixedPlan, GlobalRatio, LayerRatio, Reach, Selection, TableChoice
from lightning_prune.selection.budget import RemovalOrder
from lightning_prune.selection.explanation import explain

REPEATS = 20  # passes timed for a budget
SHOWN = 10  # passes timed for the table


def run(options: argparse.Namespace) -> int:
    """`lightning-prune prune CHECKPOINT --config TASK.yaml --criterion jre --ratio 0.5`."""
    criterion, selection = criterion_of(options.criterion), _selection(options)
    out = options.out
    _check_options(options, criterion)
    checkpoint = Checkpoint.read(options.checkpoint)
    if checkpoint.pruned:
        raise ModelError(f"{options.checkpoint} is pruned already; prune the dense checkpoint it came from, further")
    known = architecture(options, checkpoint)
    model, inputs, deployed = known.load(checkpoint), known.example_inputs(), known.deployed_inputs()
    with naming_input(inputs):
        graph, scores = _scored(model, known, criterion, options)
    given = selection.given if isinstance(selection, FixedPlan) else Plan({}, options.coupling)
    about: dict[str, Any] = {"coupling": given.coupling, "model": model, "example_inputs": deployed}
    found: Reach | TableChoice | None = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)
        if isinstance(selection, Budget) and selection.table is not None:
            found = selection.by_table(graph, scores, **about)
            plan = found.plan
        else:
            plan = selection.select(graph, scores, batch_norm=given.batch_norm, **about)
    if not plan:
        raise PlanError(f"nothing is removed by {_asked(options)}; there is nothing to write")
    console = Console()
    if options.explain:
        if isinstance(selection, Budget) and found is None:
            found = selection.reach(graph, scores, **about)
        text = explain(model, graph, plan, inputs, reach=found)
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
    print_latency(console, models, deployed, [samples_in(deployed)], [None], SHOWN, options.engine)
    console.print()
    _show(console, graph, plan, lossless, options)
    if found is not None:
        print_line(console, str(found))
    if known.prunes:
        print_line(console, "the PruneCallback of --config is for fit; here --criterion and --ratio count", "yellow")
    settings = f"{criterion!r}, {selection!r}, coupling {plan.coupling!r}"
    shape = list(inputs.shape) if isinstance(inputs, Tensor) else None
    save(out, small, plan, input=shape, origin=known.origin, settings=settings)
    print_line(console, f"pruned model: {out}", "bold")
    print_line(console, f"old and new channels: lightning-prune channels {shlex.quote(str(out))}", "dim")
    return 0


def _check_options(options: argparse.Namespace, criterion: Criterion) -> None:
    """Refuse what can be refused before anything is read."""
    if not options.explain:
        check_writable(options.out)
    if options.score_batches is not None and not criterion.needs_forward:
        raise UsageError(f"--score-batches does nothing for {options.criterion}, which looks at weights only")


def _selection(options: argparse.Namespace) -> Selection:
    if options.plan:
        if options.engine != "eager" or options.latency_table:
            raise UsageError("--engine and --latency-table are for --budget latency_ms=MILLISECONDS")
        if options.per_layer or constraint_words(options) or options.coupling != "joint":
            raise UsageError(
                "--plan says all; leave out --per-layer, --round-to, --min-channels, --ignore and --coupling"
            )
        return FixedPlan(plan=options.plan)
    constraints = constraints_of(options)
    if "latency_ms" not in (options.budget or {}) and (options.engine != "eager" or options.latency_table):
        raise UsageError("--engine and --latency-table are for --budget latency_ms=MILLISECONDS")
    if options.layer_ratios is not None:
        if options.per_layer:
            raise UsageError("--layer-ratios says how many channels go of every layer; leave out --per-layer")
        return LayerRatio.load(options.layer_ratios, **constraints)
    if options.budget is None:
        return (LayerRatio if options.per_layer else GlobalRatio)(options.ratio, **constraints)
    table = options.latency_table and LatencyTable.load(options.latency_table, force=options.force_table)
    timed = {"engine": options.engine, "table": table}
    order: RemovalOrder = "share" if options.per_layer else "score"
    return Budget(**options.budget, **constraints, **timed, order=order, repeats=REPEATS)


def _scored(
    model: nn.Module, known: Architecture, criterion: Criterion, options: argparse.Namespace
) -> tuple[ChannelGraph, Scores]:
    """Trace and score: on the recipe's training data, as `fit` does it, or on weights alone where they are enough."""
    inputs = known.example_inputs()
    if not criterion.needs_forward:
        graph = trace(model, inputs, statistics=options.statistics)
        return graph, score(model, graph, criterion)
    if known.data is None:
        raise ModelError(
            f"{options.criterion} is computed on data and a loss, which come from a recipe: pass --config TASK.yaml "
            "with a data: section, or use a criterion that looks at weights only, such as l1"
        )
    from pytorch_lightning import LightningModule

    from lightning_prune.experiments.runner import Runner, quiet

    assert isinstance(model, LightningModule)  # known by a recipe, as its data
    settings = {"batches": options.score_batches, "example_inputs": inputs, "statistics": options.statistics}
    with quiet():
        return Runner(known.data, accelerator="cpu").score(model, criterion, **settings)


def _asked(options: argparse.Namespace) -> str:
    """What decides how many channels go, in the command line's words."""
    costs = ",".join(f"{name}={value:g}" for name, value in (options.budget or {}).items())
    if options.plan:
        return f"--plan {options.plan}"
    amount = f"--ratio {options.ratio:g}" if options.layer_ratios is None else f"--layer-ratios {options.layer_ratios}"
    words = [f"--budget {costs}" if costs else amount]
    words += [f"--engine {options.engine}"] * (options.engine != "eager")
    words += [f"--latency-table {options.latency_table}"] * (options.latency_table is not None)
    words += ["--force-table"] * options.force_table
    words += ["--per-layer"] * options.per_layer
    return " ".join([*words, *constraint_words(options)])


def _show(
    console: Console, graph: ChannelGraph, plan: Plan, lossless: LosslessReport, options: argparse.Namespace
) -> None:
    verdict = f"max relative error {lossless.max_rel_error:.1e} in {lossless.dtype}, against the masked model"
    lossy = {graph.group(name).statistics for name, group in plan.groups.items() if group.removed} - {None}
    if plan.lossless and not lossy:
        print_line(console, f"lossless: {verdict}", "green")
    else:
        by = "--statistics" if lossy else "the plan"
        print_line(console, f"NOT lossless, by choice of {by}: {verdict}", "yellow")
    gone = sum(len(group.removed) for name, group in plan.groups.items() if name not in lossless.left)
    total = sum(group.size for group in graph.groups)
    by = f"{_asked(options)}, coupling {plan.coupling}"
    by = by if options.plan else f"{options.criterion}, {by}"
    print_line(console, f"{gone:,} of {total:,} channels removed by {by}")
    if graph.unreached:
        print_line(console, note_of(graph.unreached), "yellow")
    for group, why in lossless.left.items():
        print_line(console, f"left whole: {group}: {why}", indent="  ")
