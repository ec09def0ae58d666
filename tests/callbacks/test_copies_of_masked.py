"""Copies of the masked network that a user's own hooks make."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from lightning_prune.callbacks import PruneCallback
from tests.callbacks.helpers import Task, fit, params


class Averaged(Task):
    """Keeps an average of its network by hand."""

    def on_train_start(self) -> None:
        self.average = copy.deepcopy(self.net).requires_grad_(False)

    def on_train_batch_end(self, *_: Any) -> None:
        with torch.no_grad():
            for mean, parameter in zip(self.average.parameters(), self.net.parameters(), strict=True):
                mean.lerp_(parameter, 0.1)


@pytest.mark.parametrize("reconstruct", ["before", "after"])
def test_a_copy_that_was_made_of_the_masked_network_is_no_obstacle(reconstruct: str) -> None:
    task, callback = Averaged(), PruneCallback("l1", 0.5, reconstruct=reconstruct)
    fit(task, callback)
    assert callback.reconstruction.lossless.passed
    assert params(task.net) < params(Task().net)
    assert params(task.average) == params(task.net if reconstruct == "before" else Task().net)
