"""Seconds until a command line is done."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from benchmarks import seconds
from benchmarks.zoo.runner import ROOT, Row

PYTHON = "import lightning_prune"
#: Seconds at most, by the words after ``lightning-prune``; None: help that jsonargparse makes of signatures, which have
#: to be imported.
TARGETS = {
    PYTHON: 0.1, "--help": 0.3, "prune --help": 0.5, "measure --help": 0.5, "export --help": 0.5, "graph --help": 0.5,
    "recipes --help": 0.5, "compare --help": 0.5, "experiment --help": None, "demo --help": None, "fit --help": None,
    "prune resnet18.pt --model resnet18": 6.0,
}  # fmt: skip


def measure(repeats: int) -> Iterator[Row]:
    """A row per command: the median of some fresh processes, files and byte code read once before."""
    with tempfile.TemporaryDirectory() as folder:
        build = "import torch, torchvision; torch.save(torchvision.models.resnet18().state_dict(), 'resnet18.pt')"
        _run(["-c", build], folder)
        for words, target in TARGETS.items():
            line = ["-c", words] if words == PYTHON else ["-m", "lightning_prune.cli", *words.split()]
            times = [seconds(lambda line=line: _run(line, folder)) for _ in range(repeats + 1)][1:]
            row = {"key": f"command/{words}", "suite": "command", "name": words, "target": target}
            yield row | {"seconds": round(median(times), 3)}


def _run(line: list[str], folder: str) -> None:
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(Path.home())}
    subprocess.run([sys.executable, *line], cwd=folder, env=environment, check=True, capture_output=True)
