"""What the callbacks refuse, before any weight is touched."""

from __future__ import annotations

import pytest
import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.callbacks import ModelPruning
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lightning_prune.callbacks import (
    MaskingCallback,
    PruneCallback,
    ReconstructionCallback,
    ScoringCallback,
)
from lightning_prune.criteria import JRE, L1
from lightning_prune.errors import CallbackError, PlanError, ScoreError, TraceError
from tests.callbacks.helpers import Task, fit, params
from tests.zoo import images


def refused(task, *callbacks, error, match: str, **options) -> None:
    before = {key: value.clone() for key, value in task.state_dict().items()}
    with pytest.raises(error, match=match):
        fit(task, *callbacks, **options)
    assert all(torch.equal(value, before[key]) for key, value in task.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in task.modules())
    assert not any(parameter._backward_hooks for parameter in task.parameters())


def test_an_order_that_cannot_work_is_refused() -> None:
    score_, mask, rebuild = ScoringCallback(L1()), MaskingCallback(), ReconstructionCallback()
    refused(Task(), mask, score_, error=CallbackError, match="ScoringCallback comes after it: swap them")
    refused(Task(), mask, error=CallbackError, match="there is none: add it, or use PruneCallback")
    refused(Task(), ScoringCallback(L1()), rebuild, error=CallbackError, match="needs a MaskingCallback before it")


def test_masks_of_lightnings_own_pruning_are_refused_where_they_would_meet_the_smaller_model() -> None:
    def unstructured() -> ModelPruning:
        return ModelPruning("l1_unstructured", amount=0.3)

    for prune in (PruneCallback("l1"), PruneCallback("l1", reconstruct="during")):
        refused(Task(), unstructured(), prune, error=CallbackError, match="ModelPruning puts masks")
    last = PruneCallback("l1", reconstruct="after"), unstructured()
    refused(Task(), *last, error=CallbackError, match="put ModelPruning before it")
    fit(task := Task(), unstructured(), PruneCallback("l1", reconstruct="after"))
    assert params(task) < params(Task())


def test_no_training_step_or_no_loss_is_refused() -> None:
    class NoStep(Task):
        training_step = LightningModule.training_step

    class NoLoss(Task):
        def training_step(self, batch, batch_idx):
            return None

    class Vector(Task):
        def training_step(self, batch, batch_idx):
            return self.net(batch[0]).sum(1)

    refused(NoStep(), PruneCallback(JRE()), error=MisconfigurationException, match=r"No `training_step\(\)` method")
    refused(
        NoLoss(), PruneCallback(JRE()), error=ScoreError, match="NoLoss.training_step returned NoneType, not a loss"
    )
    refused(Vector(), PruneCallback(JRE()), error=ScoreError, match="must be a scalar tensor")


def test_wrong_example_inputs_are_refused() -> None:
    prune = PruneCallback(L1(), example_inputs=images()[:, :2])
    refused(Task(), prune, error=TraceError, match="in module 'net.stem.0'")


def test_nothing_to_prune_is_refused_with_the_reasons() -> None:
    class Single(Task):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 5).double())

    refused(Single(), PruneCallback(L1()), error=CallbackError, match="net.1 reaches the model's output")


def test_scores_that_are_not_finite_are_refused() -> None:
    task = Task()
    with torch.no_grad():
        task.net.a1[0].weight[3] = torch.nan
    with pytest.raises(ScoreError, match=r"net\.a1\.0.*NaN"):
        fit(task, PruneCallback(L1()))


@pytest.mark.parametrize("ratio", [1.0, -0.1, 1.5, float("nan"), "half", True])
def test_a_ratio_outside_its_range_is_refused_at_once(ratio) -> None:
    with pytest.raises(PlanError, match=r"in \[0, 1\), got"):
        PruneCallback(L1(), ratio=ratio)


def test_wrong_words_are_refused_at_once() -> None:
    with pytest.raises(CallbackError, match="before, during, after, never, got 'later'"):
        PruneCallback(L1(), reconstruct="later")
    with pytest.raises(CallbackError, match="before, during, after, got 'never'"):
        ReconstructionCallback("never")
    with pytest.raises(ScoreError, match="jre"):
        PruneCallback("jrr")
    with pytest.raises(PlanError, match="coupling must be one of"):
        PruneCallback(L1(), coupling="or")
    with pytest.raises(CallbackError, match="at least 1"):
        ScoringCallback(L1(), score_batches=0)
