"""Runs of segmentation and detection in one or two processes; run by tests/tasks/test_task_processes.py.

python -m tests.scripts.task_processes FOLDER PROCESSES
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from lightning_prune.data.modules import segmentation_batch
from lightning_prune.tasks import SegmentationTask
from tests.tasks.helpers import listed, make_trainer, oracle_task, pictures, sure


def masked_pictures() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Eight images whose masks hold other classes at even places, one process's, than at odd ones."""
    samples = []
    for k in range(8):
        mask = torch.randint(2, (16, 16)) + 2 * (k % 2)
        mask[0] = 255
        samples.append((torch.rand(3, 16, 16), mask))
    return samples


def runs() -> dict[str, tuple[LightningModule, list[Any], Any]]:
    """Task, samples and what makes a batch of them."""
    torch.manual_seed(0)
    frozen = {"optimizer": lambda params: torch.optim.SGD(params, lr=0.0), "lr_scheduler": "constant"}
    segmentation = SegmentationTask(nn.Conv2d(3, 4, 3, padding=1), 4, input_size=(3, 16, 16), **frozen)
    samples = pictures(8)
    answers = []
    for _, target in samples:
        moved = {"boxes": target["boxes"] + 8 * torch.rand_like(target["boxes"]), "labels": target["labels"]}
        answers.append(sure(moved, 0.1 + 0.9 * torch.rand(len(target["labels"]))))
    half = [{name: value[: k % 2 * 9] for name, value in of.items()} for k, of in enumerate(answers)]
    return {
        "segmentation": (segmentation, masked_pictures(), segmentation_batch),
        "detection": (oracle_task(samples, answers), samples, listed),
        "one process finds nothing": (oracle_task(samples, half), samples, listed),
    }


def main(folder: Path, processes: int) -> dict[str, dict[str, float]]:
    """What every run logs; process 0 writes it."""
    logged = {}
    for name, (task, samples, collate) in runs().items():
        many = {"strategy": "ddp", "devices": processes, "use_distributed_sampler": False} if processes > 1 else {}
        trainer = make_trainer(folder, **many)
        sampler = DistributedSampler(samples, processes, trainer.global_rank, shuffle=False)
        loader = DataLoader(samples, 2, sampler=sampler, collate_fn=collate)
        (logged[name],) = trainer.test(task, loader, verbose=False)
        if name == "segmentation":
            trainer.fit(task, loader, loader)
            logged[name]["train_loss"] = trainer.callback_metrics["train_loss"].item()
    if trainer.global_rank == 0:
        (folder / f"{processes}.json").write_text(json.dumps(logged))
    return logged


if __name__ == "__main__":
    warnings.filterwarnings("error", message="It is recommended to use `self.log")
    main(Path(sys.argv[1]), int(sys.argv[2]))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
