"""Fits in one or two processes and writes what came out; run by tests/callbacks/test_processes.py.

python -m tests.scripts.processes FOLDER PROCESSES
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from lightning_prune.callbacks import (
    DistillationCallback,
    GroupSparsityCallback,
    MaskingCallback,
    PruneCallback,
    ScoringCallback,
)
from lightning_prune.errors import CallbackError
from lightning_prune.schedule import Gradual, Rounds
from lightning_prune.selection import LayerRatio, Question, Selection
from lightning_prune.selection.base import ByLayer
from tests.callbacks.helpers import Task, loader

RUNS: dict[str, dict[str, Any]] = {
    "before": {"reconstruct": "before"},
    "during": {"reconstruct": "during", "schedule": Gradual(2)},
    "after": {"reconstruct": "after"},
    "union": {"reconstruct": "before", "coupling": "union"},
    "unused": {"reconstruct": "during", "schedule": Gradual(2)},
    "distilled": {"reconstruct": "before"},
    "sparse": {"reconstruct": "before", "start": 1},
}


@dataclass(repr=False, eq=False, kw_only=True)
class Differs(Selection):
    """What is chosen by measuring comes out otherwise in every process."""

    measures_time = True

    def _kept(self, question: Question) -> ByLayer:
        gone = 1 + (torch.distributed.get_rank() if torch.distributed.is_initialized() else 0)
        return {name: {"": scores.argsort().argsort() >= gone} for name, scores in question.whole.items()}


RUNS["longer scoring"] = {"reconstruct": "before", "update_weights": True, "score_epochs": 2}
RUNS["static graph"] = {"reconstruct": "during", "schedule": Gradual(2)}
RUNS["accumulated"] = {"reconstruct": "during", "schedule": Rounds(6, batches=1)}
DDP: dict[str, dict[str, Any]] = {  # else unused parameters are looked for
    "static graph": {"static_graph": True},
    "accumulated": {"gradient_as_bucket_view": True},
}
RUNS["measured"] = {"reconstruct": "before", "selection": Differs()}
RESUMED = ("before", "during", "after", "longer scoring")


class FrozenStatistics(Task):
    """Batch statistics differ between a whole batch and its halves, so that they stay as they are here."""

    def __init__(self, unused: bool) -> None:
        super().__init__()
        if unused:
            self.unused = nn.Linear(2, 2).double()

    def on_train_epoch_start(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()

    def train_dataloader(self) -> DataLoader:
        """Every process its part of each global batch of 8; Lightning's own sampler would shuffle."""
        processes, rank = self.trainer.world_size, self.trainer.global_rank
        whole = loader(32, shuffle=False).dataset
        sampler = DistributedSampler(whole, processes, rank, shuffle=False)
        return DataLoader(whole, 8 // processes, sampler=sampler)

    val_dataloader = train_dataloader


class Direct(FrozenStatistics):
    """Calls itself, as DistributedDataParallel does too when it runs training_step, which all processes wait in.

    No example is set: it is found by running that step.
    """

    def __init__(self, unused: bool) -> None:
        super().__init__(unused)
        self.example_input_array = None

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        logits = self(batch[0])
        self.all_gather(logits.detach())
        return F.cross_entropy(logits, batch[1])


class Spoil(Callback):
    """The weights of another process change behind everybody's back."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_rank == 1:
            with torch.no_grad():
                for parameter in pl_module.parameters():
                    parameter.copy_(parameter.flatten().flip(0).view_as(parameter))


def new_trainer(folder: Path, name: str, processes: int, *callbacks: Any) -> Trainer:
    wrapping = DDP.get(name, {"find_unused_parameters": True})
    many = {"strategy": DDPStrategy(**wrapping), "devices": processes} if processes > 1 else {}
    return Trainer(
        max_epochs=2,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=CSVLogger(folder, name) if name == "distilled" else False,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        use_distributed_sampler=False,
        accumulate_grad_batches=2 if name == "accumulated" else 1,
        **(many or {"devices": 1}),
    )


def every_epoch(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "{epoch}", auto_insert_metric_name=False, save_top_k=-1)


def main(folder: Path, processes: int) -> None:
    """All runs; process 0 writes the weights, scores and plans."""
    for name, options in RUNS.items():
        torch.manual_seed(0)
        task = Direct(False) if name == "distilled" else FrozenStatistics(name == "unused")
        prune = PruneCallback("jre", 0.5, **options)
        extra: list[Callback] = [DistillationCallback()] if name == "distilled" else []
        if name == "sparse":
            extra.append(GroupSparsityCallback(0.1, selection=LayerRatio(0.5)))
        if name in RESUMED:
            extra.append(every_epoch(folder / f"{name}-{processes}"))
        trainer = new_trainer(folder, name, processes, *extra, prune)
        trainer.fit(task)
        result = {
            "state": task.state_dict(),
            "scores": prune.scoring.history[0][1].to_dict(),
            "plan": prune.masking.plan.to_dict(),
            "lossless": prune.reconstruction.lossless.passed,
        }
        torch.save(result, folder / f"{name}-{processes}-{trainer.global_rank}.pt")
    for name in RESUMED:
        torch.manual_seed(7)
        task = FrozenStatistics(False)
        files = every_epoch(folder / f"{name}-{processes}")
        prune = PruneCallback("jre", 0.5, **RUNS[name])
        trainer = new_trainer(folder, name, processes, files, prune)
        trainer.fit(task, ckpt_path=folder / f"{name}-{processes}" / "0.ckpt")
        result = {"state": task.state_dict(), "scores": prune.scoring.history[0][1].to_dict()}
        torch.save(result, folder / f"{name}-{processes}-{trainer.global_rank}-resumed.pt")
    if processes > 1:
        torch.manual_seed(0)
        task = FrozenStatistics(False)
        scoring = ScoringCallback("l1")
        trainer = new_trainer(folder, "refused", processes, Spoil(), scoring, MaskingCallback())
        try:
            trainer.fit(task)
        except CallbackError as error:
            (folder / f"refused-{trainer.global_rank}.txt").write_text(str(error))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]), int(sys.argv[2]))
    if torch.distributed.is_initialized():  # Lightning leaves gloo's threads running; at exit they may end in abort()
        torch.distributed.destroy_process_group()
