"""How a random task is trained: the Trainer, the pruning, and callbacks that watch it or keep averages of their own."""

from __future__ import annotations

import random

import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import WeightAveraging
from pytorch_lightning.loggers.logger import Logger

from lightning_prune import PruneCallback
from lightning_prune.schedule import Gradual, Rounds
from lightning_prune.selection import GlobalRatio, LayerRatio
from tests.callbacks.random_data import unpack
from tests.callbacks.random_parts import Teacher
from tests.callbacks.random_tasks import Spec


class Follower(Callback):
    """A user's callback that keeps an average of its own."""

    def __init__(self, spec: Spec) -> None:
        self.spec, self.average = spec, None

    def on_fit_start(self, trainer, pl_module):
        self.average = Teacher(pl_module.student(), self.spec.held_by)

    def _follow(self, pl_module):
        self.average.follow_(pl_module.student(), self.spec.average)


class FollowsBatches(Follower):
    def on_train_batch_end(self, trainer, pl_module, *_):
        self._follow(pl_module)


class FollowsEpochs(Follower):
    def on_train_epoch_end(self, trainer, pl_module):
        self._follow(pl_module)


Follower.__module__ = FollowsBatches.__module__ = FollowsEpochs.__module__ = "tests.helpers"


class Memory(Logger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[tuple[int | None, dict[str, float]]] = []

    @property
    def name(self):
        return "memory"

    @property
    def version(self):
        return 0

    def log_hyperparams(self, *_, **__):
        pass

    def log_metrics(self, metrics, step=None):
        self.logged.append((step, {name: float(value) for name, value in metrics.items()}))


class Watcher(Callback):
    """What training sees: batches, the random state at their start, and how far it came."""

    def __init__(self) -> None:
        self.batches: list[tuple[float, ...]] = []
        self.random: list[bytes] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(tuple(unpack(batch)[0].flatten()[:5].tolist()))
        self.random.append(torch.get_rng_state().numpy().tobytes() + repr(random.getstate()).encode())


def prune_callback(spec: Spec, ratio: float | None = None) -> PruneCallback:
    ratio = spec.ratio if ratio is None else ratio
    schedules = {"rounds": Rounds(6, epochs=1), "gradual": Gradual(2)}
    return PruneCallback(
        spec.criterion,
        selection=(LayerRatio if spec.layerwise else GlobalRatio)(ratio),
        coupling=spec.coupling,
        schedule=schedules.get(spec.schedule) if ratio else None,
        reconstruct=spec.reconstruct,
        track=False,
        update_weights=spec.update_weights,
    )


def trainer(spec: Spec, *callbacks: Callback) -> Trainer:
    more: list[Callback] = []
    if spec.teacher and spec.updated.startswith("callback."):
        more.append({"b": FollowsBatches, "e": FollowsEpochs}[spec.updated[len("callback.on_train_")]](spec))
    if spec.averaged:
        more.append(WeightAveraging())
    return Trainer(
        max_epochs=spec.epochs,
        callbacks=[*more, *callbacks] if spec.seed % 3 else [*callbacks, *more],
        logger=Memory(),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        accumulate_grad_batches=spec.accumulate,
        gradient_clip_val=spec.clip or None,
    )
