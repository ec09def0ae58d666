"""What fails in one of two processes ends both, at once and in step; run by tests/callbacks/test_processes.py.

python -m tests.scripts.process_failures FOLDER
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback
from pytorch_lightning.loggers import CSVLogger
from torch.utils.data import DataLoader

from lightning_prune.callbacks import PruneCallback
from lightning_prune.callbacks.loggers import FolderSink
from lightning_prune.callbacks.processes import sum_over_processes_
from lightning_prune.criteria.scorer import Scorer
from lightning_prune.errors import PruningError
from lightning_prune.session import PruningSession
from tests.callbacks.helpers import Task, loader, trainer


def raises(owner: Any, name: str, patch: Any) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise PruningError("no space left")

    patch.append((owner, name, getattr(owner, name)))
    setattr(owner, name, fail)


def uneven(rank: int) -> DataLoader:
    return loader(8 + 8 * rank, shuffle=False)


# By name: in which process, and what fails there.
BROKEN: dict[str, tuple[int, Callable[[Any], None]]] = {
    "scoring": (1, lambda patch: raises(Scorer, "update", patch)),
    "selecting": (1, lambda patch: raises(PruningSession, "select", patch)),
    "masking": (0, lambda patch: raises(PruningSession, "mask_", patch)),
    "reconstructing": (1, lambda patch: raises(PruningSession, "reconstruct_", patch)),
    "logging": (0, lambda patch: raises(FolderSink, "file", patch)),
}


def fit(folder: Path, name: str, task: Task, data: DataLoader, rank: int, *extra: Callback, **options: Any) -> None:
    runner = trainer(
        *extra,
        PruneCallback("jre", 0.5),
        epochs=1,
        strategy="ddp",
        devices=2,
        logger=CSVLogger(folder, name),
        use_distributed_sampler=False,
    )
    said = "nothing"
    try:
        runner.fit(task, data, **options)
    except PruningError as error:
        said = str(error)
    (folder / f"{name}-{rank}.txt").write_text(said)


def main(folder: Path) -> None:
    first = trainer(strategy="ddp", devices=2, epochs=0)  # starts the other process
    first.fit(Task(), loader())
    first.save_checkpoint(folder / "last.ckpt")
    rank = first.global_rank
    for name, (where, breaks) in BROKEN.items():
        torch.manual_seed(0)
        patch: list[Any] = []
        if rank == where:
            breaks(patch)
        fit(folder, name, Task(), loader(), rank)
        for owner, attribute, original in patch:
            setattr(owner, attribute, original)
    torch.manual_seed(0)
    fit(folder, "uneven", Task(), uneven(rank), rank)
    fit(folder, "elsewhere", Task(), loader(), rank, ckpt_path=folder / "last.ckpt" if rank == 0 else None)
    try:
        sum_over_processes_({"sum": torch.zeros(2 + rank)})
    except PruningError as error:
        (folder / f"channels-{rank}.txt").write_text(str(error))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
