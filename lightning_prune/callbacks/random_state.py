"""The random numbers of a resumed run."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer

from lightning_prune.callbacks.processes import gathered
from lightning_prune.callbacks.users_callbacks import running_hook
from lightning_prune.model_state.preservation import random_state, set_random_state


class RandomStateCallback(Callback):
    """Keeps the state of the random generators in checkpoints, so that a resumed run draws what the first would have.

    Lightning saves none. With it, a run resumed from a checkpoint of an epoch's end goes on bit for bit (where the
    computation itself is deterministic). `lightning_prune.PruneCallback` adds it. A checkpoint taken inside an epoch
    restarts the shuffled loader from its beginning, which no random state can mend.

    Example:
        >>> RandomStateCallback().state_dict().keys()
        dict_keys(['processes'])
    """

    def __init__(self) -> None:
        self._restored: list[dict[str, Any]] | None = None
        self._module: LightningModule | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._module = pl_module

    def state_dict(self) -> dict[str, Any]:
        """Of every process, as tensors and plain data."""
        return {"processes": gathered(_plain(self._module or torch.nn.Module()))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what was saved until fitting starts."""
        if self._module is None or not running_hook(self._module):  # else a tuner puts back what it has tried out
            self._restored = state_dict["processes"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # After the module's setup and before the loaders draw their seeds. Other numbers of processes: as seeded.
        if self._restored is not None and len(self._restored) == trainer.world_size:
            _set(self._restored[trainer.global_rank], pl_module)
        else:
            self._restored = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Once more: the loop that goes on has begun an iterator over the loaders already, which draws a seed. The first
        # run drew none before its next epoch began; then it did, and so must this one, whatever Lightning resumes from.
        loop: Any = trainer.fit_loop
        if self._restored is not None:
            _set(self._restored[trainer.global_rank], pl_module)
            if not any(hasattr(loader, "load_state_dict") for loader in loop._combined_loader.flattened):
                loop._resuming_from_checkpoint = False  # or it would keep the iterator that it has begun
        self._restored = None


def _plain(module: torch.nn.Module) -> dict[str, Any]:
    (version, words, gauss), (kind, keys, *rest), cpu, cuda, _ = random_state(module)
    return {
        "python": [version, list(words), gauss],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest],
        "torch": cpu,
        "cuda": [state for _, state in cuda],
    }


def _set(state: dict[str, Any], module: torch.nn.Module) -> None:
    version, words, gauss = state["python"]
    kind, keys, *rest = state["numpy"]
    devices = [device for device, _ in random_state(module)[3]]
    cuda = [(device, values.cpu()) for device, values in zip(devices, state["cuda"], strict=False)]
    numpy = (kind, keys.numpy().astype(np.uint32), *rest)
    set_random_state(((version, tuple(words), gauss), numpy, state["torch"].cpu(), cuda, []))
