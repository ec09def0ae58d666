"""`compare`: several criteria on one trained model, in one table and one picture."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pytorch_lightning import LightningDataModule, seed_everything
from rich.console import Console

from lightning_prune.cli.graph import Parser
from lightning_prune.cli.training import BuiltTask, build_task
from lightning_prune.errors import PruningError
from lightning_prune.experiments.comparison import (
    Cell,
    Refusal,
    compare_criteria,
    print_comparison,
    trained_once,
    write_comparison,
)
from lightning_prune.experiments.comparison.run import SelectionName, check_request
from lightning_prune.plan import Coupling
from lightning_prune.reconstruction.checkpoint import load_dense

T = TypeVar("T")
TASK = "task/resnet18_digits.yaml"
_PROG = "lightning-prune compare"


def run(argv: Sequence[str]) -> int:
    """`lightning-prune compare --criteria l1,jre --ratios 0.5,0.7 --seeds 0,1,2 --out DIR [--config TASK]`."""
    options, rest = _parser().parse_known_args(argv)
    if not any(word.partition("=")[0] in ("--config", "-c") for word in rest):
        rest = ["--config", TASK, *rest]
    check_request(options.criteria, options.ratios, options.seeds, options.selection, options.epochs)
    seed_everything(options.train_seed, verbose=False)  # the model draws its first weights when it is built
    built = build_task(rest, _PROG)
    if not isinstance(built.data, LightningDataModule):
        raise PruningError("the configuration names no data; add a data: section, as task/resnet18_digits.yaml has")
    console = Console()
    note = {part: built.config.get(part) for part in ("model", "data")}  # what a cell depends on besides weights
    if options.checkpoint:
        load_dense(options.checkpoint, built.task)
    else:
        _train(built, options, note, console)

    def told(cell: Cell | Refusal) -> None:
        if isinstance(cell, Refusal):
            console.print(f"{cell.criterion} at {cell.ratio:g}: refused", highlight=False)
        else:
            says = f"{cell.criterion} at {cell.ratio:g}, seed {cell.seed}: {cell.before:.2%}, then {cell.after:.2%}"
            console.print(says, highlight=False, soft_wrap=True)

    comparison = compare_criteria(
        built.task,
        built.data,
        options.criteria,
        ratios=options.ratios,
        seeds=options.seeds,
        output=options.out,
        epochs=options.epochs,
        lr=options.lr,
        selection=options.selection,
        coupling=options.coupling,
        score_batches=options.score_batches,
        metric=options.metric,
        note=note,
        told=told,
    )
    files = write_comparison(comparison, options.out)
    console.print()
    print_comparison(comparison, console)
    console.print("\nWritten: " + "  ".join(map(str, files.values())), highlight=False, soft_wrap=True)
    return 0 if comparison.cells else 1


def _train(built: BuiltTask, options: argparse.Namespace, note: Any, console: Console) -> None:
    epochs = built.config["trainer"]["max_epochs"]
    if not isinstance(epochs, int) or epochs < 1:
        raise PruningError("how long to train? Set --trainer.max_epochs, or name a trained model with --checkpoint")
    assert built.data is not None
    console.print(f"Dense model: {epochs} epochs", highlight=False)
    now = trained_once(built.task, built.data, epochs, options.out, {"task": note, "seed": options.train_seed})
    console.print("trained" if now else f"found in {options.out}, not trained again", highlight=False, soft_wrap=True)


def _listed(kind: Callable[[str], T]) -> Callable[[str], list[T]]:
    def parse(text: str) -> list[T]:
        return [kind(part.strip()) for part in text.split(",") if part.strip()]

    parse.__name__ = f"list of {kind.__name__}"  # argparse names it in errors
    return parse


def _parser() -> Parser:
    parser = Parser(
        prog=_PROG,
        description="Prune one trained model by several criteria, fine-tune in the same way, compare.",
        epilog="Everything else is an option of lightning-prune fit, such as --config task/vgg16_cifar10.yaml or "
        "--trainer.max_epochs (of dense training); its Trainer's other options do not apply. Cells that an earlier run "
        "of the same settings has computed are not computed again.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--criteria", type=_listed(str), default=["l1", "l2", "fpgm", "taylor", "jre"], help="names, with commas")
    add("--ratios", type=_listed(float), default=[0.3, 0.5, 0.7], help="shares removed; default 0.3,0.5,0.7")
    add("--seeds", type=_listed(int), default=[0, 1, 2], help="of scoring batches and fine-tuning; default 0,1,2")
    add("--out", type=Path, default=Path("runs/compare"), metavar="DIR", help="default runs/compare")
    add("--checkpoint", metavar="CKPT", help="trained weights; without it the task is trained once and kept in --out")
    add("--epochs", type=int, default=5, help="of fine-tuning; default 5")
    add("--lr", type=float, help="first learning rate of fine-tuning; default: the task's own")
    add("--selection", choices=get_args(SelectionName), default="global", help="what a ratio is of; default global")
    add("--coupling", choices=get_args(Coupling), default="joint", help="default joint")
    add("--score-batches", type=int, metavar="N", help="default: one pass over the training data")
    add("--metric", default="acc", help="name of the logged metric; default acc")
    add("--train-seed", type=int, default=0, metavar="N", help="of the dense training; default 0")
    return parser
