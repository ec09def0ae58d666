"""What the tasks share: a network, its loss, its optimizer and schedule, and how they are logged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, PolynomialLR

from lightning_prune.errors import ConfigurationError

Schedule = LRSchedulerCallable | Literal["cosine", "poly", "constant"]


class Task(LightningModule, ABC):
    """Train a network on batches of (images, truths), measure it on others.

    Args:
        model: the network.
        num_classes: of the task.
        optimizer: builds the optimizer from the parameters.
        lr_scheduler: builds a scheduler, stepped once an epoch, from the optimizer. "cosine" falls to zero over the
            Trainer's max_epochs, "poly" as (1 - step / steps) ** 0.9 over all its steps (torchvision's segmentation
            reference), "constant" leaves the learning rate as it is.
        input_size: one image as (C, H, W), for `example_input_array`.

    Raises:
        ValueError: fewer classes than the task needs.
        ConfigurationError: when training starts, settings that the optimizer refuses, "cosine" or "poly" in a Trainer
            without max_epochs, or an unknown name.
    """

    fewest_classes = 2

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        optimizer: OptimizerCallable,
        lr_scheduler: Schedule,
        input_size: Sequence[int],
    ) -> None:
        super().__init__()
        if num_classes < self.fewest_classes:
            raise ValueError(f"num_classes must be at least {self.fewest_classes}, got {num_classes}.")
        self.model = model
        self.num_classes = num_classes
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        # Two images, so that batch norm can be run in train mode even behind a global pooling.
        self.example_input_array: Any = torch.rand(2, *input_size, generator=torch.Generator().manual_seed(0))

    def forward(self, images: Any) -> Any:
        """What the network itself returns."""
        return self.model(images)

    @abstractmethod
    def losses(self, batch: Any) -> dict[str, Tensor]:
        """The ``loss`` of a batch, and under other names the parts that it is the sum of, if there are any."""

    @abstractmethod
    def evaluate(self, batch: Any, batch_idx: int, stage: str) -> None:
        """Add one batch to the metrics of a stage, "val" or "test"."""

    def loss(self, batch: Any) -> Tensor:
        """The loss of one batch, a scalar."""
        return self.losses(batch)["loss"]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses = self.losses(batch)
        for name, value in losses.items():
            shown: dict[str, Any] = {"prog_bar": name == "loss", "on_step": False, "on_epoch": True}
            self.log(f"train_{name}", value, sync_dist=True, batch_size=len(batch[1]), **shown)
        return losses["loss"]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluate(batch, batch_idx, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluate(batch, batch_idx, "test")

    def log_same(self, values: Mapping[str, Any]) -> None:
        """Log what is over all processes already; saying so keeps Lightning from advising otherwise."""
        self.log_dict({name: float(value) for name, value in values.items()}, sync_dist=True)

    def log_classes(self, name: str, values: Iterable[Any]) -> None:
        """Log a value of every class, as ``NAME_class_0``, ``NAME_class_1``..., over all processes already."""
        self.log_same({f"{name}_class_{label}": value for label, value in enumerate(values)})

    def configure_optimizers(self) -> Any:
        name = self.lr_scheduler
        try:
            optimizer = self.optimizer(self.parameters())
        except ValueError as error:  # of a setting, such as a learning rate below 0
            raise ConfigurationError(f"no optimizer can be made as configured: {error}") from error
        if name == "constant":
            return optimizer
        if not isinstance(name, str):
            scheduler = name(optimizer)  # Lightning's own ReduceLROnPlateau carries what it monitors
            config = {"scheduler": scheduler, "monitor": getattr(scheduler, "monitor", None)}
            return {"optimizer": optimizer, "lr_scheduler": config}
        if name not in ("cosine", "poly"):
            raise ConfigurationError(f'lr_scheduler must be "cosine", "poly", "constant" or a scheduler, got {name!r}.')
        epochs = self.trainer.max_epochs
        if epochs is None or epochs < 1:
            raise ConfigurationError(
                f'lr_scheduler="{name}" needs the Trainer\'s max_epochs (at least 1) to know where zero is. '
                'Set max_epochs, or give lr_scheduler="constant" or a scheduler of your own.'
            )
        if name == "cosine":
            return {"optimizer": optimizer, "lr_scheduler": CosineAnnealingLR(optimizer, epochs)}
        poly = PolynomialLR(optimizer, int(self.trainer.estimated_stepping_batches), power=0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": poly, "interval": "step"}}
