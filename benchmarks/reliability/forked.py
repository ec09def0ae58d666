"""Work in a child process that shares what its parent has imported."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

HEAVY = ("torch._dynamo", "torch.export", "torch.onnx", "onnx", "onnxscript", "matplotlib.pyplot", "sklearn.datasets")
TRACEBACK = "Traceback (most recent call last)"


def import_all() -> None:
    """What any command needs, so that no child takes seconds to import it again."""
    from lightning_prune.cli import COMMANDS

    for name in HEAVY:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for _, place in COMMANDS.values():
        importlib.import_module(f"lightning_prune.cli.{place.partition(':')[0]}")


def start(work: Callable[[], int | None], said: Path) -> int:
    """Fork; standard output and error go to ``said``; returns the child's number."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        stream = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = work() or 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:  # noqa: BLE001  # as the interpreter would
        traceback.print_exc()
        code = 1
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def end(child: int, limit: float) -> int | None:
    """Its exit status, negative for a signal; None if it had to be killed after ``limit`` seconds."""
    until = time.monotonic() + limit
    while time.monotonic() < until:
        number, status = os.waitpid(child, os.WNOHANG)
        if number:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def run(work: Callable[[], int | None], said: Path, limit: float = 180) -> int | None:
    """Both."""
    return end(start(work, said), limit)
