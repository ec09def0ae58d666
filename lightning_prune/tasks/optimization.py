"""The optimizer and its schedule, alike in every task."""

from __future__ import annotations

from typing import Any, Literal

from pytorch_lightning import LightningModule
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from torch.optim.lr_scheduler import CosineAnnealingLR, PolynomialLR

Schedule = LRSchedulerCallable | Literal["cosine", "poly", "constant"]


def optimizer_and_schedule(task: LightningModule, optimizer: OptimizerCallable, lr_scheduler: Schedule) -> Any:
    """Both in the form that Lightning expects.

    Args:
        task: whose parameters are trained, attached to a Trainer unless a scheduler of one's own is given.
        optimizer: builds the optimizer from the parameters.
        lr_scheduler: builds a scheduler, stepped once an epoch, from the optimizer. "cosine" falls to zero over the
            Trainer's max_epochs, "poly" as (1 - step / steps) ** 0.9 over all its steps (torchvision's segmentation
            reference), "constant" leaves the learning rate as it is.

    Raises:
        ValueError: "cosine" or "poly" in a Trainer without max_epochs, or an unknown name.
    """
    built = optimizer(task.parameters())
    if isinstance(lr_scheduler, str):
        return _named(task, built, lr_scheduler)
    scheduler = lr_scheduler(built)
    config: dict[str, Any] = {"scheduler": scheduler}
    monitor = getattr(scheduler, "monitor", None)  # Lightning's own ReduceLROnPlateau carries it
    if monitor is not None:
        config["monitor"] = monitor
    return {"optimizer": built, "lr_scheduler": config}


def _named(task: LightningModule, optimizer: Any, name: str) -> Any:
    if name == "constant":
        return optimizer
    if name not in ("cosine", "poly"):
        raise ValueError(f'lr_scheduler must be "cosine", "poly", "constant" or a scheduler, got {name!r}.')
    epochs = task.trainer.max_epochs
    if epochs is None or epochs < 1:
        raise ValueError(
            f'lr_scheduler="{name}" needs the Trainer\'s max_epochs (at least 1) to know where zero is. '
            'Set max_epochs, or give lr_scheduler="constant" or a scheduler of your own.'
        )
    if name == "cosine":
        return {"optimizer": optimizer, "lr_scheduler": CosineAnnealingLR(optimizer, epochs)}
    schedule = PolynomialLR(optimizer, int(task.trainer.estimated_stepping_batches), power=0.9)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
