"""A user's LightningModule and a Trainer for it, small and quick."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from tests.zoo import build, images


class Task(LightningModule):
    """A user's module: knows nothing of pruning, logs, and calls its network by its own name."""

    def __init__(self, optimizer: str = "sgd", name: str = "Residual") -> None:
        super().__init__()
        self.net = build(name).train()
        self.optimizer = optimizer
        self.example_input_array = images(2)
        self.masked_at_forward: list[bool] = []
        self.handle_of = None

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        if self.training and self.handle_of is not None and (handle := self.handle_of()) is not None:
            out = self.net(x)
            self.masked_at_forward.append(handle.is_zero())
        else:
            out = self.net(x)
        loss = F.cross_entropy(out, y)
        self.log("train_loss", loss, prog_bar=True)
        self.log_dict({"twice": 2 * loss})
        return {"loss": loss}

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        if self.optimizer == "sgd":
            return torch.optim.SGD(self.parameters(), 0.02, momentum=0.9, weight_decay=0.01)
        return torch.optim.AdamW(self.parameters(), 0.005, weight_decay=0.05)


def loader(count: int = 16, batch: int = 4, shuffle: bool = True) -> DataLoader:
    labels = torch.arange(count) % 5
    return DataLoader(TensorDataset(images(count), labels), batch, shuffle=shuffle)


def trainer(*callbacks, epochs: int = 2, **options) -> Trainer:
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False} | options
    return Trainer(
        max_epochs=epochs, callbacks=list(callbacks), enable_model_summary=False, accelerator="cpu", **options
    )


def params(module) -> int:
    return sum(p.numel() for p in module.parameters())


def fit(task: Task, *callbacks, seed: int = 0, **options) -> Trainer:
    torch.manual_seed(seed)
    runner = trainer(*callbacks, **options)
    runner.fit(task, loader(), loader(8, shuffle=False))
    return runner
