"""`lightning-prune` in one of several processes, which may be killed at a given moment; run by tests/cli/test_nodes.py.

DIES=RANK:MOMENT python -m tests.scripts.nodes ARGUMENTS
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from fsspec.implementations.local import LocalFileOpener
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loops.training_epoch_loop import _TrainingEpochLoop

import lightning_prune.criteria.scorer
from lightning_prune.cli import main
from tests.cli.tiny import TinyData
from tests.scripts.killed import at_call

MOMENTS: dict[str, Callable[[], None]] = {
    "scoring": lambda: at_call(lightning_prune.criteria.scorer.Scorer, "update", 2),
    "fine-tuning": lambda: at_call(_TrainingEpochLoop, "advance", 3),  # two batches an epoch
    "writing": lambda: at_call(LocalFileOpener, "write", 3, lambda file, data: file.f.write(data[: len(data) // 2])),
}


class Data(TinyData):
    def val_dataloader(self):
        return self.train_dataloader()


class Kept(Callback):
    """Every process notes the weights that it ends with and the folder that it would write to."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        kept = {"state": pl_module.state_dict(), "folder": trainer.logger.log_dir}
        torch.save(kept, f"kept-{trainer.global_rank}.pt")


def arm(dies: str) -> None:
    """Once: the run that is started after it goes through."""
    rank, _, moment = dies.partition(":")
    died = Path(f"died while {moment}")
    if rank == (os.environ.get("RANK") or os.environ.get("SLURM_PROCID")) and not died.exists():
        died.touch()
        MOMENTS[moment]()


if __name__ == "__main__":
    if "DIES" in os.environ:
        arm(os.environ["DIES"])
    sys.exit(main(sys.argv[1:]))
