"""`experiment`, `demo` and `compare`: whole studies, from a YAML file or the options of `fit`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from pytorch_lightning import LightningDataModule, seed_everything
from rich.console import Console

from lightning_prune.cli.config_errors import ExplainingParser, title_groups
from lightning_prune.cli.criterion import criterion_of
from lightning_prune.cli.recipes import resolve
from lightning_prune.cli.run_folder import new_folder
from lightning_prune.cli.training import build_task
from lightning_prune.errors import PlanError, PruningError
from lightning_prune.experiments.comparison import (
    Cell,
    Refusal,
    compare_criteria,
    print_comparison,
    trained_once,
    write_comparison,
)
from lightning_prune.experiments.comparison.run import check_request
from lightning_prune.experiments.orders import OrderSettings, compare_orders
from lightning_prune.reconstruction.checkpoint import load_dense
from lightning_prune.report import print_report
from lightning_prune.report.html import write_report

DEMO = "experiment/resnet18_digits_jre.yaml"
TASK = "task/resnet18_digits.yaml"
_OF_COMMAND = ("checkpoint", "train_seed", "fit_options", "prog")  # options that are no settings of the comparison


def experiment(argv: Sequence[str]) -> int:
    """`lightning-prune experiment --config experiment/NAME.yaml`."""
    about = "Train a task, prune it, fine-tune it in both orders, and write a report of all that was measured."
    return _experiment("experiment --config STUDY.yaml", about, argv)


def demo(argv: Sequence[str]) -> int:
    """`lightning-prune demo`: the shipped experiment on scikit-learn's digits; options override it."""
    about = "Train, prune and fine-tune a ResNet-18 on scikit-learn's digits, in four minutes; nothing is fetched."
    return _experiment("demo", about, ["--config", DEMO, *argv])


def _experiment(command: str, about: str, argv: Sequence[str]) -> int:
    resolved, _ = resolve(argv)
    prog, usage = f"lightning-prune {command.split()[0]}", f"lightning-prune {command} [--KEY VALUE ...]"
    parser = ExplainingParser(prog=prog, usage=usage, description=about, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file or shipped recipe")
    study = parser.add_function_arguments(compare_orders, skip={"settings"}, fail_untyped=False)
    parser.add_class_arguments(OrderSettings, fail_untyped=False)
    title_groups(parser, {compare_orders.__name__: "what is studied", OrderSettings.__name__: "how it is run"})
    parsed = parser.parse_args(resolved)
    OrderSettings(seed=parsed.seed)  # refuses what no generator takes
    seed_everything(parsed.seed, verbose=False)  # the model draws its first weights when it is built
    arguments = vars(parser.instantiate_classes(parsed))
    del arguments["config"]
    subject = {name: arguments.pop(name) for name in study}
    settings = OrderSettings(**{**arguments, "output": str(new_folder(arguments["output"]))})
    report = compare_orders(**subject, settings=settings)
    files = write_report(report, settings.output)
    console = Console(highlight=False)
    print_report(report, console)
    console.print(f"Report: {files['html']}   pruned model: {settings.output}/pruned.pt", soft_wrap=True)
    return 0


def compare(options: argparse.Namespace) -> int:
    """`lightning-prune compare --criteria l1,jre --ratios 0.5,0.7 --seeds 0,1,2 --out DIR [--config TASK]`."""
    rest = options.fit_options
    if "--config" not in rest:
        rest = ["--config", TASK, *rest]
    names: list[str] = options.criteria
    if again := [name for name in names if names.count(name) > 1]:
        raise PlanError(f"criterion {again[0]!r} is named twice")
    options.criteria = {name: criterion_of(name) for name in names}
    check_request(options.criteria, options.ratios, options.seeds, options.selection, options.epochs)
    seed_everything(options.train_seed, verbose=False)  # the model draws its first weights when it is built
    built = build_task(rest, options.prog)
    if not isinstance(built.data, LightningDataModule):
        raise PruningError("the configuration names no data; add a data: section, as task/resnet18_digits.yaml has")
    console = Console(highlight=False)
    task_settings = {part: built.config.get(part) for part in ("model", "data")}
    if options.checkpoint:
        load_dense(options.checkpoint, built.task)
    else:
        epochs = built.config["trainer"]["max_epochs"]
        if not isinstance(epochs, int) or epochs < 1:
            raise PruningError("how long to train? Set --trainer.max_epochs, or name a trained model with --checkpoint")
        console.print(f"Dense model: {epochs} epochs")
        seeded = {"task": task_settings, "seed": options.train_seed}
        now = trained_once(built.task, built.data, epochs, options.output, seeded)
        console.print("trained" if now else f"found in {options.output}, not trained again", soft_wrap=True)

    def show(outcome: Cell | Refusal) -> None:
        found = ": refused"
        if isinstance(outcome, Cell):
            found = f", seed {outcome.seed}: {outcome.before:.2%}, then {outcome.after:.2%}"
        console.print(f"{outcome.criterion} at {outcome.ratio:g}{found}", soft_wrap=True)

    settings = {name: value for name, value in vars(options).items() if name not in _OF_COMMAND}
    comparison = compare_criteria(built.task, built.data, task_settings=task_settings, on_outcome=show, **settings)
    files = write_comparison(comparison, options.output)
    console.print()
    print_comparison(comparison, console)
    console.print("\nWritten: " + "  ".join(map(str, files.values())), soft_wrap=True)
    return 0 if comparison.cells else 1
