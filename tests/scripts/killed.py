"""Kills a run at given moments, resumes it every time, and runs it once in one go; run by callbacks/test_killed.py.

python -m tests.scripts.killed FOLDER
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import ModelCheckpoint

import lightning_prune.criteria.scorer
import lightning_prune.reconstruction.masks
import lightning_prune.reconstruction.small_model
from lightning_prune.callbacks import PruneCallback
from lightning_prune.schedule import Gradual
from tests.callbacks.helpers import Task, loader


def die(*_: Any, **__: Any) -> None:
    """As a machine does that loses its power."""
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(owner: Any, name: str, number: int, first: Callable[..., Any] | None = None) -> None:
    """Die in the n-th call of a function, after ``first``."""
    original, calls = getattr(owner, name), [0]

    def counted(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == number:
            (first or original)(*args, **options)
            die()
        return original(*args, **options)

    setattr(owner, name, counted)


MOMENTS: dict[str, Callable[[], None]] = {
    "first scoring": lambda: at_call(lightning_prune.criteria.scorer.Scorer, "update", 2),
    "first masking": lambda: at_call(lightning_prune.reconstruction.masks.MaskHandle, "apply_", 1),
    "first fine-tuning": lambda: at_call(Task, "training_step", 6),
    "later scoring": lambda: at_call(lightning_prune.criteria.scorer.Scorer, "update", 6),
    "later masking": lambda: at_call(lightning_prune.reconstruction.masks.MaskHandle, "_hold", 14),
    "reconstruction": lambda: at_call(lightning_prune.reconstruction.small_model, "cut_", 1),
    "writing": lambda: at_call(
        torch, "save", 1, lambda content, stream: (stream.write(b"PK, and no more"), stream.flush())
    ),
    "fine-tuning": lambda: at_call(Task, "training_step", 7),
}


def fit(folder: Path, result: Path) -> None:
    torch.manual_seed(0)
    task = Task("adamw")
    checkpoints = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_last=True)
    trainer = Trainer(
        max_epochs=5,
        callbacks=[PruneCallback("jre", 0.5, schedule=Gradual(3), reconstruct="during"), checkpoints],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    last = folder / "last.ckpt"
    trainer.fit(task, loader(), loader(8, shuffle=False), ckpt_path=last if last.exists() else None)
    torch.save(task.state_dict(), result)


def forked(work: Callable[[], None]) -> int:
    """Run in a process of its own; by which signal it ended."""
    process = os.fork()
    if not process:
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def main(folder: Path) -> None:
    """All moments, one after the other, in one run."""
    if forked(lambda: fit(folder / "whole", folder / "whole.pt")):
        raise SystemExit("the run in one go failed")
    for name, arm in MOMENTS.items():
        code = forked(lambda: (arm(), fit(folder / "broken", folder / "never.pt")))  # noqa: B023
        if code != -signal.SIGKILL:
            raise SystemExit(f"{name}: ended with {code}, not killed")
        print(name, sorted(path.name for path in (folder / "broken").glob("*")))  # noqa: T201
    if forked(lambda: fit(folder / "broken", folder / "broken.pt")):
        raise SystemExit("the last resumption failed")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
