"""`prune`: a checkpoint becomes a smaller one that computes what the masked model computes."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning import LightningDataModule, LightningModule, seed_everything
from rich.console import Console
from torch import Tensor, nn

from lightning_prune.cli.cost_table import DENSE, PRUNED, print_costs, print_latency
from lightning_prune.cli.graph import Parser
from lightning_prune.cli.models import Architecture, add_options, architecture, example_inputs, one_sample, origin_of
from lightning_prune.criteria import Criterion, criterion_from
from lightning_prune.criteria.scoring import Scores, score
from lightning_prune.errors import ModelError, NoEffectWarning, NotReconstructedWarning, PlanError, PruningError
from lightning_prune.experiments.runner import quiet
from lightning_prune.files import check_writable
from lightning_prune.graph import ChannelGraph, trace
from lightning_prune.measure import samples_in
from lightning_prune.model_state.preservation import copy_without_masks
from lightning_prune.plan import Plan
from lightning_prune.reconstruction.checkpoint import save
from lightning_prune.reconstruction.lossless import LosslessReport
from lightning_prune.reconstruction.small_model import reconstruct_
from lightning_prune.report.table import print_line
from lightning_prune.selection import Budget, GlobalRatio, LayerRatio, Reach, Selection
from lightning_prune.selection.explanation import explain

REPEATS = 20  # passes timed

_PROG = "lightning-prune prune"
_USAGE = """lightning-prune prune CHECKPOINT (--model NAME | --config TASK.yaml) [--criterion l1]
                             [--ratio 0.5 | --budget flops=0.5] [--out pruned.pt] [--explain]"""


def run(argv: Sequence[str]) -> int:
    """`lightning-prune prune CHECKPOINT --config TASK.yaml --criterion jre --ratio 0.5`."""
    options, rest = _parser().parse_known_args(argv)
    criterion, selection = criterion_from(options.criterion), _selection(options)
    out = Path(options.out)
    if Path(options.checkpoint).exists() and out.exists() and out.samefile(options.checkpoint):
        raise ModelError(f"--out {out} is the checkpoint itself; write to another file")
    if not options.explain:
        check_writable(out)
    known = architecture(options, rest, _PROG, origin_of(options.checkpoint))
    model, plan = known.load(options.checkpoint)
    if plan is not None:
        raise ModelError(f"{options.checkpoint} is pruned already; prune the dense checkpoint it came from, further")
    inputs = example_inputs(options.input, known)
    scores = _scores(model, known, criterion, inputs, options)
    graph = trace(model, inputs)
    scores = score(model, graph, criterion) if scores is None else scores
    deployed = one_sample(options.input, inputs)  # what a latency is of
    plan, reach = _plan(graph, scores, selection, model, deployed, options)
    console = Console()
    if options.explain:
        told = explain(model, graph, plan, inputs, reach=reach)
        console.print(f"{told}\n\nNothing was done.", highlight=False, markup=False, soft_wrap=True)
        return 0
    small = copy_without_masks(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotReconstructedWarning)  # told below
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
    try:
        save(out, small, plan, input=shape, origin=known.origin, settings=settings)
    except OSError as error:
        raise PruningError(f"cannot write {out}: {error.strerror or error}") from error
    print_line(console, f"pruned model: {out}", "bold")
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog=_PROG,
        usage=_USAGE,
        description="Prune a checkpoint. The smaller model is checked against the masked one before it is written.",
        epilog="With --config, the other options are those of lightning-prune fit, as --model.KEY=VALUE.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="of Lightning (--config), or a state dict (--model)")
    parser.add_argument("--criterion", default="l1", metavar="NAME", help="l1, fpgm, jre, ...; default: l1")
    parser.add_argument(
        "--score-batches", type=int, metavar="N", help="of the training data, for criteria that need it"
    )
    parser.add_argument("--ratio", type=float, metavar="SHARE", help="of channels removed; default: 0.5")
    parser.add_argument("--per-layer", action="store_true", help="that share of every layer, not of the network")
    parser.add_argument(
        "--budget", metavar="COST=N", help="flops=, params= (share that remains); latency_ms= (of a sample)"
    )
    parser.add_argument(
        "--coupling", choices=("joint", "union", "intersection"), default="joint", help="default: joint"
    )
    parser.add_argument("--round-to", type=int, default=1, metavar="N", help="channels kept are multiples of it")
    parser.add_argument(
        "--ignore", action="append", default=[], metavar="LAYER", help="leave it whole; a pattern; repeat"
    )
    parser.add_argument("--out", default="pruned.pt", metavar="FILE", help="default: pruned.pt")
    parser.add_argument("--explain", action="store_true", help="say what would be done, and do nothing")
    add_options(parser)
    return parser


def _selection(options: argparse.Namespace) -> Selection:
    constraints: dict[str, Any] = {"round_to": options.round_to, "ignore": tuple(options.ignore)}
    if options.budget is None:
        kind = LayerRatio if options.per_layer else GlobalRatio
        return kind(0.5 if options.ratio is None else options.ratio, **constraints)
    if options.ratio is not None or options.per_layer:
        raise PlanError("--budget decides how many channels go; leave out --ratio and --per-layer")
    costs: dict[str, Any] = {}
    for part in options.budget.split(","):
        name, _, value = part.partition("=")
        try:
            costs[name] = float(value)
        except ValueError as error:
            raise PlanError(f"--budget takes COST=NUMBER, such as flops=0.5, got '{part}'") from error
        if name not in ("flops", "params", "latency_ms"):
            raise PlanError(f"--budget knows flops, params and latency_ms, got '{name}'")
    return Budget(**costs, **constraints, repeats=REPEATS)


def _scores(
    model: nn.Module, known: Architecture, criterion: Criterion, inputs: Any, options: argparse.Namespace
) -> Scores | None:
    """By passes over the recipe's training data, as `fit` does it; None for criteria that look at weights only."""
    if not criterion.needs_forward:
        return None
    if not isinstance(model, LightningModule) or known.data is None:
        raise ModelError(
            f"{options.criterion} is computed on data and a loss, which come from a recipe: pass --config TASK.yaml "
            "with a data: section, or use a criterion that looks at weights only, such as l1"
        )
    return _scored_on(known.data, model, criterion, inputs, options.score_batches)


def _scored_on(
    data: LightningDataModule, task: LightningModule, criterion: Criterion, inputs: Any, batches: int | None
) -> Scores:
    from pytorch_lightning import Callback, Trainer

    from lightning_prune.callbacks import ScoringCallback

    class Stop(Callback):
        """After scoring, before the first step."""

        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
            trainer.should_stop = True

    scoring = ScoringCallback(criterion, score_batches=batches, example_inputs=inputs)
    seed_everything(0, verbose=False)  # as `fit` does: which batches come first is drawn
    with quiet():
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=1,
            num_sanity_val_steps=0,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            callbacks=[scoring, Stop()],
        )
        trainer.fit(task, data)
    task.trainer = None  # or every copy of the task would copy it too
    task.eval()
    assert scoring.scores is not None
    return scoring.scores


def _plan(
    graph: ChannelGraph,
    scores: Scores,
    selection: Selection,
    model: nn.Module,
    inputs: Any,
    options: argparse.Namespace,
) -> tuple[Plan, Reach | None]:
    """What is kept, and how far a budget reaches.

    Raises:
        PlanError: the budget cannot be met, or nothing is removed.
    """
    reach = None
    if isinstance(selection, Budget):
        reach = selection.reach(graph, scores, model=model, example_inputs=inputs, coupling=options.coupling)
        if not reach.met:
            nearest = ",".join(f"{name}={value:g}" for name, value in reach.nearest.items())
            found = "; ".join(str(reach).splitlines())
            raise PlanError(f"the budget cannot be met; the nearest that can: --budget {nearest} ({found})")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)
        plan = selection.select(graph, scores, coupling=options.coupling, model=model, example_inputs=inputs)
    if not plan:
        raise PlanError(f"nothing is removed by {_asked(options)}; there is nothing to write")
    return plan, reach


def _asked(options: argparse.Namespace) -> str:
    """What decides how many channels go, in the command line's words."""
    ratio = 0.5 if options.ratio is None else options.ratio
    words = [f"--ratio {ratio:g}" if options.budget is None else f"--budget {options.budget}"]
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
    for group, why in lossless.left.items():
        print_line(console, f"left whole: {group}: {why}", indent="  ")
