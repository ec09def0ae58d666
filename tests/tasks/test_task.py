"""What every task shares: its optimizer and schedule, its example input, and how many classes it needs."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune.tasks import ClassificationTask, DetectionTask, SegmentationTask
from tests.tasks.helpers import make_trainer


def make_task(**options) -> ClassificationTask:
    return ClassificationTask(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), 4, input_size=(3, 2, 2), **options)


def fit(trainer, task, images=24, batch_size=8) -> None:
    loader = DataLoader(TensorDataset(torch.rand(images, 3, 2, 2), torch.arange(images) % 4), batch_size)
    trainer.fit(task, loader, loader)


def test_cosine_falls_over_the_epochs_of_the_trainer(tmp_path):
    task = make_task()
    trainer = make_trainer(tmp_path, max_epochs=3)
    fit(trainer, task)

    (optimizer,) = trainer.optimizers
    assert isinstance(optimizer, torch.optim.SGD)
    assert {k: optimizer.defaults[k] for k in ("momentum", "weight_decay", "nesterov")} == {
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "nesterov": False,
    }
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("steps", [1, 4, 6])
def test_poly_falls_over_all_steps(tmp_path, steps):
    """Three batches an epoch, two epochs: torchvision's reference (1 - step / steps) ** 0.9."""
    task = make_task(lr_scheduler="poly")
    trainer = make_trainer(tmp_path, max_epochs=2)
    rates = []
    task.on_train_batch_start = lambda *_: rates.append(trainer.optimizers[0].param_groups[0]["lr"])
    fit(trainer, task)
    assert len(rates) == 6
    assert rates[steps - 1] == pytest.approx(0.1 * (1 - (steps - 1) / 6) ** 0.9)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("epochs_run", [1, 2, 3])
def test_a_scheduler_of_ones_own_steps_once_an_epoch(tmp_path, epochs_run):
    task = make_task(
        optimizer=lambda params: torch.optim.AdamW(params, lr=0.01),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [2], gamma=0.1),
    )
    trainer = make_trainer(tmp_path, max_epochs=epochs_run)
    fit(trainer, task)

    (optimizer,) = trainer.optimizers
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001 if epochs_run >= 2 else 0.01)


def test_constant_leaves_the_learning_rate(tmp_path):
    task = make_task(lr_scheduler="constant")
    trainer = make_trainer(tmp_path, max_epochs=2)
    fit(trainer, task)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.1


def test_a_plateau_scheduler_passes_its_monitor_on():
    from pytorch_lightning.cli import ReduceLROnPlateau

    task = make_task(lr_scheduler=lambda optimizer: ReduceLROnPlateau(optimizer, monitor="val_loss"))
    assert task.configure_optimizers()["lr_scheduler"]["monitor"] == "val_loss"


@pytest.mark.parametrize("schedule", ["poly", "cosine"])
def test_a_schedule_without_an_end_is_refused(tmp_path, schedule):
    trainer = make_trainer(tmp_path, max_epochs=-1, max_steps=1)
    with pytest.raises(ValueError, match=f'lr_scheduler="{schedule}" needs .* max_epochs'):
        fit(trainer, make_task(lr_scheduler=schedule))


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="'linear'"):
        make_task(lr_scheduler="linear").configure_optimizers()


@pytest.mark.parametrize(("kind", "classes"), [(ClassificationTask, 1), (SegmentationTask, 1), (DetectionTask, 0)])
def test_too_few_classes_are_refused(kind, classes):
    with pytest.raises(ValueError, match=f"num_classes must be at least {classes + 1}, got {classes}"):
        kind(nn.Flatten(), classes)


def test_example_input_follows_input_size_and_touches_no_global_rng():
    state = torch.get_rng_state()
    task = ClassificationTask(nn.Flatten(), 3, input_size=(1, 5, 7))
    assert task.example_input_array.shape == (2, 1, 5, 7)
    assert torch.equal(torch.get_rng_state(), state)
