"""`prune`: a checkpoint becomes a smaller one that computes what the masked model computes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning import LightningDataModule, LightningModule, seed_everything
from rich.console import Console
from torch import Tensor, nn

from lightning_prune.checkpoint import save
from lightning_prune.cli.cost_table import DENSE, PRUNED, print_costs, print_latency
from lightning_prune.cli.graph import ModelError, Parser
from lightning_prune.cli.models import Architecture, add_options, architecture, example_inputs, origin_of
from lightning_prune.cli.tables import print_line
from lightning_prune.criteria import Criterion, criterion_from
from lightning_prune.errors import PlanError, PruningError
from lightning_prune.explanation import explain
from lightning_prune.graph import trace
from lightning_prune.measurement import samples_in
from lightning_prune.pipeline import PruneResult, prune
from lightning_prune.running import quiet
from lightning_prune.scoring import Scores, score
from lightning_prune.selection import Budget, GlobalRatio, LayerRatio, Selection

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
    known = architecture(options, rest, _PROG, origin_of(options.checkpoint))
    model, plan = known.load(options.checkpoint)
    if plan is not None:
        raise ModelError(f"{options.checkpoint} is pruned already; prune the dense checkpoint it came from, further")
    inputs = example_inputs(options.input, known)
    scores = _scores(model, known, criterion, inputs, options.score_batches)
    if options.explain:
        _explain(model, inputs, criterion, scores, selection, options)
        return 0
    result = prune(model, inputs, criterion=criterion, selection=selection, coupling=options.coupling, scores=scores)
    if not result.plan:
        raise PlanError(f"nothing is removed by {selection!r}: there is nothing to write")
    settings = f"{criterion!r}, {selection!r}, coupling {options.coupling!r}"
    console = Console()
    _show(console, model, result, inputs, settings)
    _save(out, result, inputs, known, settings)
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
    parser.add_argument("--budget", metavar="COST=N", help="flops= or params= (share that remains), latency_ms=")
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
    return Budget(**costs, **constraints)


def _scores(
    model: nn.Module, known: Architecture, criterion: Criterion, inputs: Any, batches: int | None
) -> Scores | None:
    """By passes over the recipe's training data, as `fit` does it; None for criteria that look at weights only."""
    if not criterion.needs_forward:
        return None
    if not isinstance(model, LightningModule) or known.data is None:
        raise ModelError(
            f"{criterion!r} is computed on data and a loss, which come from a recipe: pass --config TASK.yaml, or use "
            "a criterion that looks at weights only, such as l1"
        )
    return _scored_on(known.data, model, criterion, inputs, batches)


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


def _explain(
    model: nn.Module,
    inputs: Any,
    criterion: Criterion,
    scores: Scores | None,
    selection: Selection,
    options: argparse.Namespace,
) -> None:
    graph = trace(model, inputs)
    scores = score(model, graph, criterion) if scores is None else scores
    console, reach = Console(), None
    if isinstance(selection, Budget):
        reach = selection.reach(graph, scores, model=model, example_inputs=inputs, coupling=options.coupling)
        if not reach.met:
            console.print(str(reach), highlight=False, markup=False, soft_wrap=True)
            raise PlanError(f"the budget cannot be met; the nearest that can: {_budget(reach.nearest)}")
    plan = selection.select(graph, scores, coupling=options.coupling, model=model, example_inputs=inputs)
    told = explain(graph, plan, model, inputs, reach=reach)
    console.print(f"{told}\n\nNothing was done.", highlight=False, markup=False, soft_wrap=True)


def _budget(nearest: dict[str, float]) -> str:
    return f"--budget {','.join(f'{name}={value:g}' for name, value in nearest.items())}"


def _show(console: Console, model: nn.Module, result: PruneResult, inputs: Any, settings: str) -> None:
    models = {DENSE: model, PRUNED: result.model}
    console.print()
    print_costs(console, models, inputs)
    console.print()
    print_latency(console, models, inputs, [1] if samples_in(inputs) else [0], [None], REPEATS)
    console.print()
    found = result.lossless
    verdict = f"max relative error {found.max_rel_error:.1e} in {found.dtype}, against the masked model"
    if result.plan.lossless:
        print_line(console, f"lossless: {verdict}", "green")
    else:
        print_line(console, f"NOT lossless, by choice of the plan: {verdict}", "yellow")
    print_line(console, settings)
    for group, why in found.left.items():
        print_line(console, f"left whole: {group}: {why}", indent="  ")


def _save(out: Path, result: PruneResult, inputs: Any, known: Architecture, settings: str) -> None:
    shape = list(inputs.shape) if isinstance(inputs, Tensor) else None
    try:
        save(out, result.model, result.plan, input=shape, origin=known.origin, settings=settings)
    except OSError as error:
        raise PruningError(f"cannot write {out}: {error.strerror or error}") from error
