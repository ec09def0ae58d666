"""Steps that ask the Trainer for its loaders are traced, rehearsed and scored before Lightning has set these up."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.trainer.states import RunningStage
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_prune.callbacks import PruneCallback
from lightning_prune.callbacks.without_side_effects import Loaders, attached
from tests.callbacks.helpers import trainer

STEPS = ("training_step", "validation_step", "test_step", "predict_step")


class Plain(LightningModule):
    """A stem whose maps only validation reads, with a size that no tracer sees."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem = nn.Conv2d(3, 8, 3)
        self.body = nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.stem(x))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("norm", self.stem(batch[0]).unflatten(1, (4, 2)).norm(dim=2).mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


class Asks(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        done = batch_idx / len(self.trainer.train_dataloader) + batch_idx / self.trainer.num_training_batches
        assert len(self.trainer.val_dataloaders) == 2
        return (1 + done) * super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        assert self.trainer.sanity_checking or len(self.trainer.train_dataloader) == 2
        assert self.trainer.val_dataloaders.batch_size == 4
        assert self.trainer.num_val_batches == [2]
        super().validation_step(batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).sum() * len(self.trainer.test_dataloaders)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]) * len(self.trainer.predict_dataloaders)


class Made(Asks):
    """Its own methods make the loaders."""

    def __init__(self) -> None:
        super().__init__()
        self.made = 0

    def train_dataloader(self) -> Any:
        self.made += 1
        return loader()

    def val_dataloader(self) -> Any:
        return loader()


def loader(**options: Any) -> DataLoader[Any]:
    images = torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(3))
    return DataLoader([*zip(images, torch.arange(8) % 4, strict=True)], 4, **options)


def fit(task: LightningModule, *callbacks: Any) -> Trainer:
    torch.manual_seed(0)
    runner = trainer(*callbacks, epochs=1)
    runner.fit(task, *(() if isinstance(task, Made) else (loader(), loader())))
    return runner


@pytest.mark.parametrize("kind", [Asks, Made])
def test_all_steps_are_compared_and_the_example_is_found(kind: type[Plain]) -> None:
    fit(task := kind(), callback := PruneCallback("taylor", 0.5, track=False))
    compared = callback.reconstruction.lossless.compared
    assert set(STEPS) <= set(compared)
    assert task.stem.out_channels % 2 == 0, "pairs, as validation reads them"
    assert task.body[1].out_channels < 8

    fit(other := Plain(), told := PruneCallback("taylor", 0.5, track=False, example_inputs=torch.rand(2, 3, 12, 12)))
    assert other.stem.out_channels == task.stem.out_channels
    assert {*told.scoring.scores} == {*callback.scoring.scores}


def test_a_method_of_the_users_is_asked_only_where_a_step_asks() -> None:
    class Never(Made):
        training_step, validation_step = Plain.training_step, Plain.validation_step
        test_step = predict_step = LightningModule.test_step

    tasks = Never(), Made()
    for task in tasks:
        fit(task, PruneCallback("l1", 0.5, track=False, example_inputs=torch.rand(2, 3, 12, 12)))
    assert tasks[0].made == 2, "the first batch, and training"
    assert tasks[1].made > 2


class Stream(IterableDataset[Any]):
    """Notes that somebody reads."""

    read = 0

    def __iter__(self) -> Any:
        self.read += 1
        return iter([(torch.zeros(3, 12, 12), torch.tensor(0))] * 8)


def test_nothing_is_read_and_everything_is_put_back() -> None:
    seen: list[Any] = []
    stream, own = Stream(), loader(generator=torch.Generator().manual_seed(5))

    class Looks(PruneCallback):
        def on_fit_start(self, runner: Any, task: Any) -> None:
            copied = type(task)()
            val = runner.fit_loop.epoch_loop.val_loop
            before = own.generator.get_state()
            for stage in (RunningStage.TRAINING, RunningStage.TESTING, RunningStage.PREDICTING):
                with suppress(ZeroDivisionError), attached(copied, runner, stage, Loaders(runner)):
                    seen.extend([runner.train_dataloader, runner.val_dataloaders])
                    assert (runner.num_training_batches, runner.num_val_batches) == (float("inf"), [2])
                    assert runner.test_dataloaders is (own if stage == RunningStage.TESTING else None)
                    assert runner.predict_dataloaders is (own if stage == RunningStage.PREDICTING else None)
                    next(iter(runner.val_dataloaders))
                    raise ZeroDivisionError
                assert (runner.train_dataloader, runner.val_dataloaders, runner.test_dataloaders) == (None,) * 3
                assert (runner.fit_loop.max_batches, val._max_batches) == (float("inf"), [])
                assert torch.equal(own.generator.get_state(), before)
            assert stream.read == 0

    streamed = DataLoader(stream, 4)
    trainer(Looks("l1", 0.5, track=False), epochs=0).fit(Plain(), streamed, own)
    assert seen == [streamed, own] * 3


class ByHand(Plain):
    """The length of training, for which Lightning would set up the data, is asked for inside a step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()
        self.lr_schedulers().step()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.01)
        steps = self.trainer.estimated_stepping_batches
        assert steps == 2
        return [optimizer], [torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps + 1)]


class ByHandMade(ByHand, Made):
    def test_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    predict_step = test_step
    validation_step = Plain.validation_step


@pytest.mark.parametrize("kind", [ByHand, ByHandMade])
def test_the_length_of_training_is_known_in_a_step(kind: type[Plain]) -> None:
    fit(kind(), callback := PruneCallback("l1", 0.5, track=False, example_inputs=torch.rand(2, 3, 12, 12)))
    assert "training_step" in callback.reconstruction.lossless.compared
