"""`experiment` and `demo`: the whole job from one YAML file, with the report at the end."""

from __future__ import annotations

from collections.abc import Sequence

from pytorch_lightning import seed_everything
from rich.console import Console

from lightning_prune.cli.recipes import resolve
from lightning_prune.cli.training import ExplainingParser
from lightning_prune.experiments.orders import compare_orders
from lightning_prune.report import print_report
from lightning_prune.report.html import write_report

DEMO = "experiment/resnet18_digits_jre.yaml"


def run(argv: Sequence[str]) -> int:
    """`lightning-prune experiment --config experiment/NAME.yaml`."""
    resolved, _ = resolve(argv)
    parser = ExplainingParser(prog="lightning-prune experiment", allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file or shipped recipe")
    parser.add_function_arguments(compare_orders, fail_untyped=False)
    parsed = parser.parse_args(resolved)
    seed_everything(parsed.seed, verbose=False)  # the model draws its first weights when it is built
    config = parser.instantiate_classes(parsed)
    arguments = {name: value for name, value in vars(config).items() if name != "config"}
    report = compare_orders(**arguments)
    files = write_report(report, config.output)
    console = Console()
    print_report(report, console)
    console.print(f"Report: {files['html']}   pruned model: {config.output}/pruned.pt", highlight=False, soft_wrap=True)
    return 0


def demo(argv: Sequence[str]) -> int:
    """`lightning-prune demo`: the shipped experiment on scikit-learn's digits; options override it."""
    return run(["--config", DEMO, *argv])
