"""The `lightning-prune` command: one table of sub-commands, each imported only when it is called.

Here: what a command line says, how it is refused, and what is printed. Not here: what is computed; every command is a
few calls of functions that notebooks call too, whole studies among them (experiments/).
"""

from __future__ import annotations

import errno
import importlib
import importlib.metadata
import os
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_prune.cli.options import PARSERS
from lightning_prune.cli.parser import UsageError
from lightning_prune.errors import PruningError, UnknownRecipeError, did_you_mean, first_line, is_out_of_memory

# By name: what it does, and `module:function` in this folder, which takes the options that `PARSERS` made of the
# remaining arguments, or these themselves.
COMMANDS = {
    "fit": ("Train; with a prune recipe score, mask and reconstruct too.", "training:fit"),
    "validate": ("Evaluate on the validation set.", "training:validate"),
    "test": ("Evaluate on the test set.", "training:test"),
    "prune": ("Prune a checkpoint; checked to be lossless, then written.", "prune:run"),
    "channels": ("Show old and new channels of a pruned file.", "channels:run"),
    "measure": ("Parameters, FLOPs and latency, layer by layer too.", "measure:run"),
    "latency-table": ("Time every layer over its widths, on an engine; minutes.", "latency_table:run"),
    "export": ("Write ONNX or torch.export, checked by running it.", "export:run"),
    "quantize": ("Write a model in 8 bits, compared with float32.", "quantize:run"),
    "sensitivity": ("What masking one layer alone costs; ratios of layers.", "sensitivity:run"),
    "graph": ("Show which channels go together; table and picture.", "graph:run"),
    "recipes": ("List the recipes that ship with the package.", "recipes:show"),
    "experiment": ("Train, prune and fine-tune in both orders; write a report.", "studies:experiment"),
    "compare": ("Compare criteria on one trained model.", "studies:compare"),
    "reproduce": ("Run a published table or figure, ours beside theirs.", "reproduce:run"),
    "demo": ("Prune a small ResNet on real digits, start to end.", "studies:demo"),
}


_UNREAD = 141  # as shells say it of SIGPIPE
_NO_ROOM = errno.ENOSPC, errno.EDQUOT, errno.EFBIG


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command and return its exit status: 0, 1 for a failed run, 2 for wrong usage, 130 for Ctrl-C.

    A run that SIGTERM has stopped ends with 143. Where what reads its output has left, as ``head`` does, the command
    ends without a word, with 141.

    Example:
        >>> main(["fitt"])  # on standard error: did you mean 'fit'?
        2
    """
    try:
        status = _run(argv)
    except SystemExit as stop:
        if (stopped := _stopped(stop)) is not None:
            return stopped
        if not isinstance(stop.__context__, BrokenPipeError) and _is_read():  # else rich has met it, and exits
            raise
        return _UNREAD
    except BrokenPipeError:
        if _is_read("\n"):  # it was another pipe
            raise
        return _UNREAD
    except OSError as error:  # of help and the version
        if error.errno not in _NO_ROOM:
            raise
        status = _fail(f"cannot write to standard output: {error.strerror}", status=1)
    try:
        return status if _is_read() else _UNREAD
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        _close_output()
        return status or _fail(f"cannot write to standard output: {error.strerror}", status=1)


def _stopped(stop: SystemExit) -> int | None:
    """The status of a run that a signal has stopped: Lightning ends it with 1 at Ctrl-C, and with 0 at SIGTERM."""
    if isinstance(stop.__context__, KeyboardInterrupt):
        return _fail("interrupted", status=130)
    if type(stop).__name__ == "SIGTERMException":  # of Lightning, which need not be there
        return _fail("terminated", status=143)
    return None


def _is_read(more: str = "") -> bool:
    """Whether standard output takes what is still to be written; where it does not, it is closed without an error."""
    if sys.stdout is None:  # closed from the start
        return True
    try:
        sys.stdout.write(more)
        sys.stdout.flush()
    except BrokenPipeError:
        _close_output()
        return False
    return True


def _close_output() -> None:
    """Let what is left of standard output go nowhere, or Python complains at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(argv: Sequence[str] | None) -> int:
    if argv is None:
        sys.path.append("")  # the user's own modules, which a script in bin/ would not see; last, to shadow nothing
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help", "help"):
        _show_help()
        return 0
    if name == "--version":
        sys.stdout.write(f"lightning-prune {importlib.metadata.version('lightning-prune')}\n")
        return 0
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS)
        return _fail(f"'{name}' is no command.{hint} Commands: {', '.join(COMMANDS)}.", status=2)

    module, function = COMMANDS[name][1].split(":")
    try:
        given = PARSERS[name](rest) if name in PARSERS else rest
        return getattr(importlib.import_module(f"lightning_prune.cli.{module}"), function)(given) or 0
    except PruningError as error:
        return _fail(str(error), status=2 if isinstance(error, (UnknownRecipeError, UsageError)) else 1)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return _fail(f"out of memory: {first_line(error)}; smaller images or batches need less", status=1)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        what = error.filename or "what this run logs and saves"
        return _fail(f"cannot write {what}: {error.strerror}; make room, then go on (fit: --ckpt_path last)", status=1)
    except KeyboardInterrupt:
        return _fail("interrupted", status=130)  # as shells say it


def _fail(message: str, status: int) -> int:
    sys.stderr.write(f"error: {message}\n")
    return status


def _show_help() -> None:
    console = Console(highlight=False, markup=False)
    console.print("Channel pruning for PyTorch Lightning.\n\nusage: lightning-prune COMMAND [options]")
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    for name, (summary, _) in COMMANDS.items():
        table.add_row(Text(f"  {name}", "bold"), summary)
    console.print(table)
    console.print(
        "\n  lightning-prune fit --config task/resnet18_digits.yaml --config prune/jre.yaml\n\n"
        "Options of a command: lightning-prune COMMAND --help",
        soft_wrap=True,
    )
