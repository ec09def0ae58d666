"""`compare`: several criteria on one trained model, in one table and one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from pytorch_lightning import LightningDataModule, seed_everything
from rich.console import Console

from lightning_prune.cli.parser import CONFIG_FLAGS, Parser, list_of
from lightning_prune.cli.training import build_task
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

TASK = "task/resnet18_digits.yaml"


def run(argv: Sequence[str]) -> int:
    """`lightning-prune compare --criteria l1,jre --ratios 0.5,0.7 --seeds 0,1,2 --out DIR [--config TASK]`."""
    parser = _parser()
    options, rest = parser.parse_known_args(argv)
    if not any(word.partition("=")[0] in CONFIG_FLAGS for word in rest):
        rest = ["--config", TASK, *rest]
    check_request(options.criteria, options.ratios, options.seeds, options.selection, options.epochs)
    seed_everything(options.train_seed, verbose=False)  # the model draws its first weights when it is built
    built = build_task(rest, parser.prog)
    if not isinstance(built.data, LightningDataModule):
        raise PruningError("the configuration names no data; add a data: section, as task/resnet18_digits.yaml has")
    console = Console()
    task_settings = {part: built.config.get(part) for part in ("model", "data")}
    if options.checkpoint:
        load_dense(options.checkpoint, built.task)
    else:
        epochs = built.config["trainer"]["max_epochs"]
        if not isinstance(epochs, int) or epochs < 1:
            raise PruningError("how long to train? Set --trainer.max_epochs, or name a trained model with --checkpoint")
        console.print(f"Dense model: {epochs} epochs", highlight=False)
        seeded = {"task": task_settings, "seed": options.train_seed}
        now = trained_once(built.task, built.data, epochs, options.output, seeded)
        text = "trained" if now else f"found in {options.output}, not trained again"
        console.print(text, highlight=False, soft_wrap=True)

    def show(outcome: Cell | Refusal) -> None:
        about = f"{outcome.criterion} at {outcome.ratio:g}"
        if isinstance(outcome, Refusal):
            text = f"{about}: refused"
        else:
            text = f"{about}, seed {outcome.seed}: {outcome.before:.2%}, then {outcome.after:.2%}"
        console.print(text, highlight=False, soft_wrap=True)

    settings = {name: value for name, value in vars(options).items() if name not in ("checkpoint", "train_seed")}
    comparison = compare_criteria(built.task, built.data, task_settings=task_settings, on_outcome=show, **settings)
    files = write_comparison(comparison, options.output)
    console.print()
    print_comparison(comparison, console)
    console.print("\nWritten: " + "  ".join(map(str, files.values())), highlight=False, soft_wrap=True)
    return 0 if comparison.cells else 1


def _parser() -> Parser:
    parser = Parser(
        "compare",
        description="Prune one trained model by several criteria, fine-tune in the same way, compare.",
        epilog="Everything else is an option of lightning-prune fit, such as --config task/vgg16_cifar10.yaml or "
        "--trainer.max_epochs (of dense training); its Trainer's other options do not apply. Cells that an earlier run "
        "of the same settings has computed are not computed again.",
    )
    add = parser.add_argument
    add("--criteria", type=list_of(str), default=["l1", "l2", "fpgm", "taylor", "jre"], help="names, with commas")
    add("--ratios", type=list_of(float), default=[0.3, 0.5, 0.7], help="shares removed; default 0.3,0.5,0.7")
    add("--seeds", type=list_of(int), default=[0, 1, 2], help="of scoring batches and fine-tuning; default 0,1,2")
    add("--out", dest="output", type=Path, default=Path("runs/compare"), metavar="DIR", help="default runs/compare")
    add("--checkpoint", metavar="CKPT", help="trained weights; without it the task is trained once and kept in --out")
    add("--epochs", type=int, default=5, help="of fine-tuning; default 5")
    add("--lr", type=float, help="first learning rate of fine-tuning; default: the task's own")
    add("--selection", choices=get_args(SelectionName), default="global", help="what a ratio is of; default global")
    add("--coupling", choices=get_args(Coupling), default="joint", help="default joint")
    add("--score-batches", type=int, metavar="N", help="default: one pass over the training data")
    add("--metric", default="acc", help="name of the logged metric; default acc")
    add("--train-seed", type=int, default=0, metavar="N", help="of the dense training; default 0")
    return parser
