"""Pruning inside Trainer.fit where weights are computed from other tensors, and where nothing can go."""

from __future__ import annotations

import pytest
import torch
import torch.nn.utils.prune as torch_prune
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from lightning_prune.callbacks import PruneCallback
from lightning_prune.errors import CallbackError
from tests.callbacks.helpers import Task, fit, loader, params, trainer
from tests.zoo import images


def masked_by_torch(layer: nn.Module) -> nn.Module:
    return torch_prune.ln_structured(layer, "weight", 0.25, n=1, dim=0)


WRAPS = {"masks": masked_by_torch, "weight norm": weight_norm}


class Wrapped(Task):
    """Its second convolution is read by a plain one, whatever computes its weight; looks at it in every step."""

    def __init__(self, wrap, optimizer: str = "sgd") -> None:
        super().__init__(optimizer)
        torch.manual_seed(0)
        self.net = nn.Sequential(
            *(wrap(nn.Conv2d(3, 8, 3)), nn.ReLU(), wrap(nn.Conv2d(8, 12, 3)), nn.ReLU(), nn.Conv2d(12, 8, 1)),
            *(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
        ).double()
        self.prune = None
        self.seen: list[bool] = []

    def training_step(self, batch, batch_idx):
        found = super().training_step(batch, batch_idx)
        if self.prune is not None and self.prune.masking.handle is not None and self.net[2].out_channels == 12:
            gone = list(self.prune.masking.plan.groups["net.2"].removed)
            self.seen.append(bool((self.net[2].weight[gone] == 0).all()))
        return found


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", WRAPS)
def test_prune_and_fine_tune(name: str, when: str, tmp_path) -> None:
    task = Wrapped(WRAPS[name], "adamw" if when == "after" else "sgd")
    dense = params(task)
    task.prune = PruneCallback("jre", ratio=0.5, reconstruct=when)
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    fit(task, task.prune, checkpoint, epochs=3, enable_checkpointing=True)
    assert task.prune.reconstruction.lossless.passed
    assert params(task) < 0.8 * dense
    assert task.net[2].out_channels == task.net[4].in_channels < 12
    assert (len(task.seen) == 12) is (when == "after")
    assert all(task.seen)
    again = Wrapped(WRAPS[name], task.optimizer)
    callbacks = PruneCallback("jre", ratio=0.5, reconstruct=when), ModelCheckpoint(tmp_path, save_last=True)
    runner = trainer(*callbacks, epochs=4, enable_checkpointing=True)
    runner.fit(again, loader(), loader(8, shuffle=False), ckpt_path=str(tmp_path / "last.ckpt"))
    assert again.net[2].out_channels == task.net[2].out_channels


def test_both_orders_end_with_the_same_function() -> None:
    tasks = []
    for when in ("before", "after"):
        task = Wrapped(weight_norm)
        fit(task, PruneCallback("l1", ratio=0.5, reconstruct=when))
        assert task.net[2].out_channels < 12
        tasks.append(task.eval())
    x = images(3, seed=4)
    assert torch.allclose(tasks[0](x), tasks[1](x), atol=1e-10)


def test_nothing_to_prune_names_what_frees_it() -> None:
    task = Wrapped(spectral_norm)
    task.net = nn.Sequential(*task.net[:3], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)).double()
    with pytest.raises(CallbackError, match=r"net\.0, net\.2 \(spectral norm\).*remove_parametrizations\(module, 'wei"):
        fit(task, PruneCallback("l1", ratio=0.5))
