"""What a command need not import, which is most of the time until it answers. Nothing is timed."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import get_args

import torch
from torch import nn

from lightning_prune import criteria
from lightning_prune.cli import COMMANDS, options
from lightning_prune.cli.option_types import CRITERIA
from lightning_prune.criteria import criterion_from
from lightning_prune.engines import ENGINES
from lightning_prune.experiments.comparison.run import SelectionName
from lightning_prune.export import Format
from lightning_prune.export.loading import ONNX_ENGINES
from lightning_prune.plan import Coupling
from lightning_prune.quantization import Cpu, Method

HEAVY = ("torch", "numpy", "jsonargparse", "networkx", "jinja2")
TRAINING = (
    "pytorch_lightning",
    "lightning_fabric",
    "torchmetrics",
    "sklearn",
    "scipy",
    "pandas",
    "wandb",
    "torchvision",
)
REST = ("matplotlib", "PIL", "jsonargparse", "pycocotools", "onnx", "tensorboard")

NET = """
from torch import nn

def net():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
"""


def imported(folder: Path, lines: list[list[str]], of: tuple[str, ...]) -> str:
    """Which of these modules a fresh process has imported after these command lines."""
    code = f"""
import contextlib, io, sys
sys.path.append("")
from lightning_prune.cli import main
for line in {lines}:
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            status = main(line)
        except SystemExit as stop:
            status = stop.code
    assert not status, line
print(sorted(set({of}) & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=folder)
    return done.stdout.strip() or done.stderr


def test_help_needs_no_torch(tmp_path: Path) -> None:
    own = [name for name in COMMANDS if name in options.PARSERS or name == "recipes"]
    assert len(own) == 11
    assert imported(tmp_path, [["--help"], *([name, "--help"] for name in own)], HEAVY + TRAINING + REST) == "[]"


def test_prune_by_name_needs_no_lightning(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(NET)
    torch.save(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).state_dict(), tmp_path / "dense.pt")
    line = ["prune", "dense.pt", "--model", "own.net", "--input", "1", "3", "8", "8"]
    assert imported(tmp_path, [line], TRAINING + REST) == "[]"


def test_choices_are_those_of_the_library() -> None:
    assert get_args(Coupling) == options.COUPLINGS
    assert get_args(Format) == options.FORMATS
    assert get_args(Method) == options.METHODS
    assert get_args(Cpu) == options.CPUS
    assert tuple(ENGINES) == options.ENGINES
    assert ONNX_ENGINES == options.ONNX_ENGINES
    assert get_args(SelectionName) == options.SELECTIONS
    own = {type(criterion_from(name)) for name in CRITERIA}
    assert own == {cls for cls in vars(criteria).values() if isinstance(cls, type) and is_named(cls)}


def is_named(cls: type) -> bool:
    """Whether a criterion can be built without arguments, as one that is named is."""
    return issubclass(cls, criteria.Criterion) and not inspect.isabstract(cls)
