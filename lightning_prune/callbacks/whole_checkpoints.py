"""A Trainer's checkpoints, each as a whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Trainer

from lightning_prune.files import atomic


def write_whole(trainer: Trainer) -> None:
    """Write local checkpoints beside their place, then move them there; a `CheckpointIO` of the user's own stays.

    Lightning writes them among the temporary files. Where these lie on another file system, it copies them to their
    place, and whatever ends the run then, or fills the disk, leaves half a file under the final name.
    """
    writer: Any = trainer.strategy.checkpoint_io
    if type(writer).__name__ != "TorchCheckpointIO" or "save_checkpoint" in vars(writer):  # of either namespace
        return
    original = writer.save_checkpoint

    def save(checkpoint: Mapping[str, Any], path: Any, storage_options: Any = None) -> None:
        if storage_options is not None or "://" in str(path):
            original(checkpoint, path, storage_options)
            return
        with atomic(Path(path)) as stream:
            torch.save(checkpoint, stream)

    writer.save_checkpoint = save
