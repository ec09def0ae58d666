"""The working directory of the commands about one model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from pytorch_lightning import Trainer

from lightning_prune.tasks import ClassificationTask
from tests.cli.tiny import NET, TinyData, tiny_net


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A working directory with a state dict, a recipe, and a wide terminal."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    torch.manual_seed(0)
    torch.save(tiny_net().state_dict(), "dense.pt")
    content = {
        "model": {
            "class_path": "lightning_prune.tasks.ClassificationTask",
            "init_args": {"model": {"class_path": NET}, "num_classes": 3, "input_size": [3, 8, 8]},
        },
        "data": {"class_path": f"{TinyData.__module__}.TinyData"},
    }
    Path("task.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")


@pytest.fixture
def trained(workplace) -> ClassificationTask:
    """The recipe's task with weights of its own, in a Lightning checkpoint."""
    task = ClassificationTask(tiny_net(), num_classes=3, input_size=(3, 8, 8))
    trainer = Trainer(max_epochs=0, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(task)
    trainer.save_checkpoint("dense.ckpt")
    return task
