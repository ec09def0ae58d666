"""The `lightning-prune` command: one table of sub-commands, each imported only when it is called.

Here: what a command line says, how it is refused, and what is printed. Not here: what is computed; every command is a
few calls of functions that notebooks call too, whole studies among them (experiments/).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_prune.cli.parser import did_you_mean
from lightning_prune.errors import PruningError, UnknownRecipeError


class Command(NamedTuple):
    """A sub-command: what it does, and `module:function`, which takes the remaining arguments."""

    summary: str
    function: str


COMMANDS = {
    "fit": Command("Train; with a prune recipe also score, mask and reconstruct.", "lightning_prune.cli.training:fit"),
    "validate": Command("Evaluate on the validation set.", "lightning_prune.cli.training:validate"),
    "test": Command("Evaluate on the test set.", "lightning_prune.cli.training:test"),
    "prune": Command("Prune a checkpoint; checked to be lossless, then written.", "lightning_prune.cli.prune:run"),
    "measure": Command("Parameters, FLOPs and latency, layer by layer too.", "lightning_prune.cli.measure:run"),
    "export": Command("Write ONNX or torch.export, checked by running it.", "lightning_prune.cli.export:run"),
    "graph": Command("Show which channels of a model go together; table and picture.", "lightning_prune.cli.graph:run"),
    "recipes": Command("List the recipes that ship with the package.", "lightning_prune.cli.recipes:show"),
    "experiment": Command(
        "Train, prune and fine-tune in both orders; write a report.", "lightning_prune.cli.experiment:run"
    ),
    "compare": Command("Compare criteria on one trained model.", "lightning_prune.cli.compare:run"),
    "demo": Command("Prune a small ResNet on real digits, start to end.", "lightning_prune.cli.experiment:demo"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command and return its exit status: 0, 1 for a failed run, 2 for wrong usage, 130 for Ctrl-C.

    Example:
        >>> main(["fitt"])  # on standard error: did you mean 'fit'?
        2
    """
    if argv is None:
        sys.path.append("")  # the user's own modules, which a script in bin/ would not see; last, to shadow nothing
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help", "help"):
        _show_help()
        return 0
    if name == "--version":
        Console().print(f"lightning-prune {importlib.metadata.version('lightning-prune')}", highlight=False)
        return 0
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS)
        return _fail(f"'{name}' is no command.{hint} Commands: {', '.join(COMMANDS)}.", status=2)

    module, function = COMMANDS[name].function.split(":")
    try:
        status = getattr(importlib.import_module(module), function)(rest)
    except UnknownRecipeError as error:
        return _fail(str(error), status=2)
    except PruningError as error:
        return _fail(str(error), status=1)
    except KeyboardInterrupt:
        return _fail("interrupted", status=130)  # as shells say it
    return int(status or 0)


def _fail(message: str, status: int) -> int:
    sys.stderr.write(f"error: {message}\n")
    return status


def _show_help() -> None:
    console = Console()
    console.print("Channel pruning for PyTorch Lightning.\n", highlight=False)
    console.print(escape("usage: lightning-prune COMMAND [options]"), highlight=False)
    table = Table(box=None, show_header=False, padding=(0, 2))
    for name, command in COMMANDS.items():
        table.add_row(f"[bold]{name}[/bold]", command.summary)
    console.print(table)
    console.print(
        "\n  lightning-prune fit --config task/resnet18_digits.yaml --config prune/jre.yaml\n\n"
        "Options of a command: lightning-prune COMMAND --help",
        highlight=False,
        soft_wrap=True,
    )
