"""The same callbacks in `lightning.pytorch`, whose classes are others than `pytorch_lightning`'s."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lightning_prune.callbacks import PruneCallback
from lightning_prune.schedule import Gradual
from tests.callbacks.helpers import loader, params
from tests.zoo import build, images

lightning = pytest.importorskip("lightning.pytorch")


class Task(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = build("Residual").train()
        self.example_input_array = images(2)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 0.001)


@pytest.mark.parametrize("when", ["before", "during", "after"])
def test_prune_and_resume_with_lightning_pytorch(when: str, tmp_path: Path) -> None:
    def fit(task: Task, epochs: int, ckpt: Path | None = None) -> PruneCallback:
        prune = PruneCallback("jre", 0.5, reconstruct=when, schedule=Gradual(2))
        trainer = lightning.Trainer(
            max_epochs=epochs,
            callbacks=[prune, lightning.callbacks.ModelCheckpoint(tmp_path, save_last=True)],
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(task, loader(), ckpt_path=ckpt)
        return prune

    task, again = Task(), Task()
    first = fit(task, 3)
    assert first.reconstruction.lossless.passed
    assert params(task) < 0.8 * params(Task())
    with pytest.warns(UserWarning, match="exists and is not empty"):
        second = fit(again, 4, tmp_path / "last.ckpt")
    assert second.masking.plan == first.masking.plan
    assert params(again) == params(task)
