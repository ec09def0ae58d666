"""`experiment` and `demo`: the whole job from one YAML file, with the report at the end."""

from __future__ import annotations

from collections.abc import Sequence

from pytorch_lightning import seed_everything
from rich.console import Console

from lightning_prune.cli.config_errors import ExplainingParser
from lightning_prune.cli.recipes import resolve
from lightning_prune.experiments.orders import OrderSettings, compare_orders
from lightning_prune.report import print_report
from lightning_prune.report.html import write_report

DEMO = "experiment/resnet18_digits_jre.yaml"


def run(argv: Sequence[str]) -> int:
    """`lightning-prune experiment --config experiment/NAME.yaml`."""
    resolved, _ = resolve(argv)
    parser = ExplainingParser(prog="lightning-prune experiment", allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file or shipped recipe")
    study = parser.add_function_arguments(compare_orders, skip={"settings"}, fail_untyped=False)
    parser.add_class_arguments(OrderSettings, fail_untyped=False)
    parsed = parser.parse_args(resolved)
    seed_everything(parsed.seed, verbose=False)  # the model draws its first weights when it is built
    arguments = vars(parser.instantiate_classes(parsed))
    del arguments["config"]
    subject = {name: arguments.pop(name) for name in study}
    settings = OrderSettings(**arguments)
    report = compare_orders(**subject, settings=settings)
    files = write_report(report, settings.output)
    console = Console()
    print_report(report, console)
    console.print(
        f"Report: {files['html']}   pruned model: {settings.output}/pruned.pt", highlight=False, soft_wrap=True
    )
    return 0


def demo(argv: Sequence[str]) -> int:
    """`lightning-prune demo`: the shipped experiment on scikit-learn's digits; options override it."""
    return run(["--config", DEMO, *argv])
