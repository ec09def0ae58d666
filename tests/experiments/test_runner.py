"""Fits, scores and tests that leave the task and the data as they were."""

from __future__ import annotations

import pytest
import torch
from pytorch_lightning import LightningDataModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_prune as lp
from lightning_prune.data import DigitsDataModule
from lightning_prune.errors import PruningError
from lightning_prune.experiments.runner import Runner, quiet
from lightning_prune.tasks import ClassificationTask


def task() -> ClassificationTask:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return ClassificationTask(nn.Sequential(*layers, nn.Linear(8, 10)), 10, input_size=(3, 8, 8))


def data() -> DigitsDataModule:
    return DigitsDataModule(batch_size=256, size=8)


class Plain(LightningDataModule):
    """The same batches in the same order every time; the digits are shifted at random."""

    def train_dataloader(self):
        images = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(images, torch.arange(12) % 10), 6)


def test_nothing_of_a_run_is_held_by_task_or_data() -> None:
    """The optimizer that the command line builds knows the data; a copy of the task would copy all runs so far."""
    dense, digits = task(), data()
    runner = Runner(digits)
    with quiet():
        runner.fit(dense, 1)
        runner.test(dense)
    with pytest.raises(RuntimeError, match="is not attached to a"):
        _ = dense.trainer
    assert digits.trainer is None


def test_scores_are_those_of_one_pass_and_the_task_is_left_as_it_is() -> None:
    dense, plain = task(), Plain()
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    with quiet():
        graph, scores = Runner(plain).score(dense, lp.criteria.GRE())
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    assert all(parameter.grad is None for parameter in dense.parameters())
    expected = lp.score(
        dense, graph, "gre", batches=plain.train_dataloader(),
        loss=lambda module, batch: nn.functional.cross_entropy(module(batch[0]), batch[1]),
    )  # fmt: skip
    assert scores.keys() == expected.keys()
    for name, value in scores.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-7)


def test_the_seed_draws_the_batches_that_are_scored_on() -> None:
    def first_batch(seed: int) -> torch.Tensor:
        torch.manual_seed(seed + 17)  # whatever ran before
        with quiet():
            return next(iter(Runner(data()).score(task(), lp.criteria.GRE(), batches=1, seed=seed)[1].values()))

    assert torch.equal(first_batch(0), first_batch(0))
    assert not torch.equal(first_batch(0), first_batch(1))


def test_a_metric_that_is_not_logged_is_named_beside_those_that_are() -> None:
    with quiet(), pytest.raises(PruningError, match="logs no 'test_speed' in test_step; it logs test_loss, test_acc"):
        Runner(data(), "speed").test(task())
