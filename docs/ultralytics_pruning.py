"""Fine-tune a pruned YOLO or RT-DETR with ultralytics' own trainers, and prune while they train (AGPL-3.0 package)."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.engine.model import Model
from ultralytics.engine.trainer import BaseTrainer

import lightning_prune as lp


class KeepsTheModel:
    """Before a trainer of ultralytics: it trains the model that was loaded, not a dense one built from its YAML."""

    data: dict[str, Any]

    def get_model(self, cfg: Any = None, weights: nn.Module | None = None, verbose: bool = True) -> nn.Module:
        """A copy of the loaded model, of the same shapes, ready to train."""
        if weights is None:
            raise ValueError("there are no weights to keep: start from a .pt file, without pretrained=False")
        if len(weights.names) != self.data["nc"]:
            raise ValueError(
                f"the model has {len(weights.names)} classes and the data {self.data['nc']}: "
                "train the dense model on these data first, then prune it"
            )
        model = deepcopy(weights).float().requires_grad_(True)  # the trainer freezes again what `freeze` names
        model.criterion = None  # made anew, from the arguments of this training
        return model


def trainer_for(yolo: Model) -> type[BaseTrainer]:
    """The task's own trainer, which keeps the model; for ``yolo.train(trainer=trainer_for(yolo), data=...)``."""
    own = yolo.task_map[yolo.task]["trainer"]
    return type(f"Keeping{own.__name__}", (KeepsTheModel, own), {})


def loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """What ultralytics trains with, for criteria that look at gradients."""
    return model.loss(batch)[0].sum()


class PruneWhileTraining:
    """Callbacks that make the model smaller at the start of epochs; weights, optimizer and EMA follow.

    Args:
        yolo: whose next ``train`` prunes; one process, with `trainer_for` or from a YAML file.
        settings: of `lightning_prune.PruningSession`: ``criterion``, ``ratio`` or ``selection``, ``schedule``, ...
        start: the first epoch that prunes.
        batches: how many training batches to score with, for criteria that need data.
    """

    def __init__(self, yolo: Model, *, start: int = 0, batches: int = 8, **settings: Any) -> None:
        self.settings, self.due, self.batches = settings, start, batches
        self.session: lp.PruningSession | None = None
        yolo.add_callback("on_train_epoch_start", self.step)

    def step(self, trainer: BaseTrainer) -> None:
        """Take the step that is due, if any."""
        if self.session is None:
            if trainer.start_epoch:
                raise ValueError("a resumed training cannot go on pruning; resume it without PruneWhileTraining")
            side = trainer.args.imgsz
            images = torch.rand(2, next(trainer.model.parameters()).shape[1], side, side, device=trainer.device)
            self.session = lp.PruningSession(trainer.model, images, **self.settings)
        if self.session.done or trainer.epoch < self.due:
            return
        copies = [] if trainer.ema is None else [trainer.ema.ema]
        batches = list(self._some(trainer)) if self.session.criterion.needs_forward else None
        taken = self.session.step(batches, loss, optimizers=[trainer.optimizer], copies=copies, reconstruct=True)
        self.due = trainer.epoch + max(taken.epochs, 1)
        if trainer.ema is not None:
            trainer.ema._pairs = None  # where ultralytics keeps the tensors that it averages

    def _some(self, trainer: BaseTrainer) -> Iterator[dict[str, Any]]:
        for number, batch in enumerate(trainer.train_loader):
            if number == self.batches:
                return
            yield trainer.preprocess_batch(batch)
