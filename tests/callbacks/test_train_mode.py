"""A module left in eval mode before fitting, and batches that the training_step skips."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from lightning_prune.callbacks import MaskingCallback, PruneCallback, ReconstructionCallback, ScoringCallback
from lightning_prune.criteria import DCP
from lightning_prune.errors import EvalModeWarning, ScoreError
from lightning_prune.schedule import Rounds
from tests.callbacks.helpers import Task, fit

pytestmark = [  # what Lightning itself says of the same
    pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training"),
    pytest.mark.filterwarnings("ignore:.training_step. returned .None."),
]


def norms(task):
    return [path for path, module in task.named_modules() if isinstance(module, nn.BatchNorm2d)]


def in_eval():
    task = Task()
    task.eval()
    return task


@pytest.mark.parametrize("reconstruct", ["before", "after"])
@pytest.mark.parametrize("parts", [False, True], ids=["one", "three"])
def test_fine_tuning_in_eval_mode_is_said_once(parts, reconstruct):
    task = in_eval()
    first, count = norms(task)[0], len(norms(task))
    callbacks = (
        [ScoringCallback("lre", bn_mode="train"), MaskingCallback(), ReconstructionCallback(reconstruct)]
        if parts
        else [PruneCallback("lre", reconstruct=reconstruct)]
    )
    with pytest.warns(EvalModeWarning) as caught:
        fit(task, *callbacks, epochs=2)
    said = [str(item.message) for item in caught if item.category is EvalModeWarning]
    assert len(said) == 1
    assert f"starts with {count} batch norm or dropout modules in eval mode, the first is {first!r}" in said[0]
    assert "module.train() before fit" in said[0]


def test_a_schedule_says_it_once_and_after_warm_up():
    with pytest.warns(EvalModeWarning) as caught:
        fit(in_eval(), PruneCallback("l1", schedule=Rounds(12, epochs=1), start=1), epochs=5)
    assert sum(item.category is EvalModeWarning for item in caught) == 1


class FreezesInHook(Task):
    def on_train_epoch_start(self):
        for path in norms(self):
            self.get_submodule(path).eval()


class FreezesInTrain(Task):
    def train(self, mode=True):
        super().train(mode)
        for path in norms(self):
            self.get_submodule(path).eval()
        return self


class TrainsInHook(Task):
    def on_train_epoch_start(self):
        self.train()


def frozen_weights():
    task = in_eval()
    task.train()
    stem = task.get_submodule(norms(task)[0])
    stem.eval().requires_grad_(False)
    return task


QUIET = {
    "train": Task,
    "hook": FreezesInHook,
    "train override": lambda: FreezesInTrain().train(),
    "train in hook": lambda: TrainsInHook().eval(),
    "frozen weights": frozen_weights,
}


@pytest.mark.parametrize("kind", QUIET)
def test_modes_that_are_meant_are_not_mentioned(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error", EvalModeWarning)
        fit(QUIET[kind](), PruneCallback("l1"), epochs=1)


def test_nothing_is_said_before_anything_is_pruned():
    with warnings.catch_warnings():
        warnings.simplefilter("error", EvalModeWarning)
        fit(in_eval(), PruneCallback("l1", start="end"), epochs=1)


class Skips(Task):
    """Skips batches for which a rule says so."""

    def __init__(self, rule):
        super().__init__()
        self.rule = rule

    def training_step(self, batch, batch_idx):
        return None if self.rule(batch_idx) else super().training_step(batch, batch_idx)


@pytest.mark.parametrize("criterion", ["taylor", "lre", "jre", DCP(heads=1)], ids=str)
def test_batches_that_training_skips_are_not_scored(criterion):
    scores = []
    for rule in (lambda k: k % 2 == 1, lambda k: k >= 2):
        task = Skips(rule)
        callback = ScoringCallback(criterion, score_batches=4)
        torch.manual_seed(0)
        fit(task, callback, epochs=1)
        scores.append(callback.scores)
    assert all(values.isfinite().all() for values in scores[0].values())
    assert any(not torch.equal(scores[0][name], scores[1][name]) for name in scores[0])  # they are different batches


@pytest.mark.parametrize("criterion", ["taylor", "lre", DCP(heads=1)], ids=str)
def test_nothing_but_skipped_batches_is_refused(criterion):
    with pytest.raises(ScoreError, match=r"training_step returned NoneType, not a loss, for all 4 batches"):
        fit(Skips(lambda _: True), ScoringCallback(criterion), epochs=1)


class Branches(nn.Module):
    """Two results in train mode, as some detectors and classifiers have it."""

    modes: set = set()  # noqa: RUF012  # of all copies

    def __init__(self):
        super().__init__()
        self.body, self.head, self.aux = nn.Conv2d(3, 8, 3), nn.Linear(8, 5), nn.Linear(8, 5)
        self.norm, self.drop = nn.BatchNorm2d(8), nn.Dropout(0.9)
        self.double()

    def forward(self, x):
        self.modes.add((self.training, self.norm.training, self.drop.training))
        x = self.drop(torch.relu(self.norm(self.body(x)))).mean((2, 3))
        return (self.head(x), self.aux(x)) if self.training else self.head(x)


class Auxiliary(Task):
    def __init__(self):
        super().__init__()
        self.net = Branches()

    def training_step(self, batch, batch_idx):
        out, aux = self.net(batch[0])
        return nn.functional.cross_entropy(out, batch[1]) + nn.functional.cross_entropy(aux, batch[1])


@pytest.mark.parametrize("criterion", ["taylor", "jre", DCP(heads=0)], ids=str)
def test_scoring_takes_the_branches_of_training_with_frozen_statistics(criterion, monkeypatch):
    task, seen = Auxiliary(), []
    score = ScoringCallback._score

    def watched(self, trainer, module):
        Branches.modes.clear()
        score(self, trainer, module)
        seen.append((set(Branches.modes), module.net.training, float(module.net.norm.running_mean.abs().sum())))

    monkeypatch.setattr(ScoringCallback, "_score", watched)
    fit(task, ScoringCallback(criterion, score_batches=2), epochs=1)
    assert seen == [({(True, False, False)}, True, 0.0)]
