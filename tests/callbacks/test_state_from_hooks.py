"""What hooks before a step set is there when it is scored; hooks that have run in this fit are not run again."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import Callback, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune.callbacks import PruneCallback
from lightning_prune.errors import CallbackError, NoEffectWarning, NotReconstructedWarning, ScoreError
from lightning_prune.schedule import Gradual
from tests.callbacks.helpers import params, trainer


class Plain(LightningModule):
    """A step that takes ``scale`` from where a test sets it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(8, 3))
        self.example_input_array = torch.ones(2, 3, 8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)


class Scaled(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.scale * super().training_step(batch, batch_idx)


def data() -> DataLoader[Any]:
    images = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    return DataLoader(TensorDataset(images, torch.arange(12) % 3), 4)


def fit(task: LightningModule, *callbacks: Callback, epochs: int = 1, **options: Any) -> Any:
    torch.manual_seed(0)
    runner = trainer(*callbacks, epochs=epochs, **options)
    runner.fit(task, data())
    return runner


def prune(criterion: str = "taylor", **options: Any) -> PruneCallback:
    return PruneCallback(criterion, 0.5, track=False, **options)


HOOKS = ("on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start")


def scores_of(task: LightningModule, *others: Callback, first: bool = True, **options: Any) -> Any:
    callback = prune(**options)
    fit(task, *([callback, *others] if first else [*others, callback]))
    assert params(task) < params(Plain())
    return callback.scoring.scores


def equal(one: Any, other: Any) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


# --- scoring ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected() -> Any:
    class Initial(Scaled):
        scale = 3.0

    return scores_of(Initial())


@pytest.mark.parametrize("hook", HOOKS)
def test_what_a_hook_of_the_module_sets_is_there(hook: str, expected: Any) -> None:
    def sets(self: Any, *_: Any) -> None:
        self.scale = 3.0

    assert equal(scores_of(type("Task", (Scaled,), {hook: sets})()), expected)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("hook", HOOKS)
def test_what_a_callback_of_the_users_sets_is_there(hook: str, first: bool, expected: Any) -> None:
    def sets(self: Any, runner: Any, task: Any, *_: Any) -> None:
        task.scale = 3.0
        self.called += 1

    own = type("Sets", (Callback,), {hook: sets, "called": 0, "__module__": "tests.helpers"})()
    assert equal(scores_of(Scaled(), own, first=first), expected)
    assert own.called == (3 if hook == "on_train_batch_start" else 1)


def test_hooks_are_run_around_every_batch() -> None:
    class Pairs(Plain):
        seen: tuple[int, ...] = ()

        def on_train_batch_start(self, batch, batch_idx):
            assert not hasattr(self, "open"), "the batch before has ended"
            self.open = batch_idx
            batch[0].mul_(0.5)  # in place, as mixing does

        def training_step(self, batch, batch_idx):
            assert self.open == batch_idx
            return {"loss": super().training_step(batch, batch_idx)}

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.seen = (*self.seen, batch_idx)
            assert outputs["loss"].ndim == 0
            del self.open

    class Halved(Plain):
        def training_step(self, batch, batch_idx):
            return super().training_step((0.5 * batch[0], batch[1]), batch_idx)

    assert equal(scores_of(task := Pairs()), scores_of(Halved()))
    assert task.seen == (0, 1, 2)


class Draws(Plain):
    """Hooks that draw numbers, log, count and keep an average; the step draws too."""

    def on_train_start(self):
        self.calls, self.noise, self.mean = 1, torch.rand(()), copy.deepcopy(self.head)

    def on_train_batch_start(self, batch, batch_idx):
        self.calls += 1
        self.share = torch.rand(())
        self.log("share", self.share)
        self.trainer.should_stop = False

    def training_step(self, batch, batch_idx):
        return (1 + self.share * self.noise) * super().training_step(batch, batch_idx)

    def on_train_batch_end(self, *_):
        with torch.no_grad():
            for mine, theirs in zip(self.mean.parameters(), self.head.parameters(), strict=True):
                mine.lerp_(theirs, 0.1)


def test_nothing_of_it_shows() -> None:
    dense, scored = Draws(), Draws()
    callback = PruneCallback("taylor", 0.0, track=False)
    runners = [fit(dense, epochs=2), fit(scored, callback, epochs=2)]
    assert callback.scoring.scores
    assert dense.calls == scored.calls == 7
    assert runners[0].callback_metrics["share"] == runners[1].callback_metrics["share"]
    weights = [[*task.parameters()] for task in (dense, scored)]
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


class Ends(Plain):
    after = 1

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == self.after else None


def test_batches_of_an_epoch_that_a_hook_ends_are_not_scored() -> None:
    assert equal(scores_of(Ends()), scores_of(Plain(), score_batches=1))


def test_an_epoch_that_a_hook_skips_leaves_nothing_to_score() -> None:
    class Skips(Ends):
        after = 0

    with pytest.raises(ScoreError, match=r"Skips.on_train_batch_start returned -1 .* Score in a later epoch \(start="):
        fit(Skips(), prune())


def test_a_step_that_does_without_a_hook_is_scored_where_the_hook_fails() -> None:
    rates: dict[int, float] = {}

    class Asks(Plain):
        def on_train_start(self):
            self.rate = rates[id(self)]  # no copy is known there

        def on_train_batch_end(self, *_):
            self.rate *= 0.5

    rates[id(task := Asks())] = 0.01
    assert equal(scores_of(task), scores_of(Plain()))
    assert task.rate == pytest.approx(0.01 / 8)


@pytest.mark.parametrize("hook", HOOKS[:3])
def test_what_a_hook_does_to_the_modules_themselves_is_not_scored(hook: str) -> None:
    def changes(self: Any) -> None:
        self.train()
        if self.net[0].out_channels == 8:  # on a copy, and not in training
            self.net[3] = copy.deepcopy(self.net[3])

    assert equal(scores_of(type("Task", (Plain,), {hook: changes})()), scores_of(Plain()))


# --- weights kept since training began --------------------------------------------------------------------------------


class Average(Callback):
    """A moving average by hand."""

    def on_train_start(self, runner, task):
        self.shadow = {name: p.detach().clone() for name, p in task.named_parameters()}

    def on_train_batch_end(self, runner, task, *_):
        with torch.no_grad():
            for name, p in task.named_parameters():
                self.shadow[name].lerp_(p, 0.1)


class InTheEnd(Average):
    def on_train_end(self, runner, task):
        with torch.no_grad():
            for name, p in task.named_parameters():
                p.copy_(self.shadow[name])


class Averaged(Plain):
    def on_train_start(self):
        Average.on_train_start(self, None, self)

    def on_train_batch_end(self, *_):
        Average.on_train_batch_end(self, None, self)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(("task", "others"), [(Plain, [Average]), (Averaged, [])])
def test_an_average_made_before_the_first_step_is_refused_before_any_weight_is_touched(
    task: Any, others: Any, order: int
) -> None:
    callbacks = [prune("l1", start=1), *(kind() for kind in others)]
    with pytest.raises(CallbackError, match=r"net\.0 meets a tensor of fixed size.* in training_step"):
        fit(found := task(), *callbacks[::order], epochs=2)
    assert params(found) == params(Plain())
    assert not any(module._forward_pre_hooks for module in found.modules())


@pytest.mark.parametrize(("task", "others"), [(Plain, [Average]), (Averaged, [])])
def test_an_average_made_between_two_steps_keeps_the_channels(task: Any, others: Any) -> None:
    during = prune("l1", schedule=Gradual(2), reconstruct="during")
    with pytest.warns(NoEffectWarning, match="tensor of fixed size"):
        fit(found := task(), during, *(kind() for kind in others), epochs=3)
    assert 4 < found.net[0].out_channels < 8, "what the first step has left"

    last = prune("l1", schedule=Gradual(2))
    with pytest.warns(NotReconstructedWarning) as said:
        fit(found := task(), last, *(kind() for kind in others), epochs=3)
    assert "keeps its 8 channels, the masked ones at zero" in str(said.pop(NotReconstructedWarning).message)
    assert params(found) == params(Plain())


@pytest.mark.parametrize("kind", [Average, InTheEnd])
def test_an_average_made_after_the_only_step_has_its_sizes(kind: type[Average]) -> None:
    fit(task := Plain(), prune("l1"), average := kind())
    assert average.shadow["net.0.weight"].shape == task.net[0].weight.shape != Plain().net[0].weight.shape


def test_an_average_that_goes_back_after_reconstruction_keeps_the_channels() -> None:
    with pytest.warns(NotReconstructedWarning) as said:
        fit(task := Plain(), prune("l1", reconstruct="after"), average := InTheEnd())
    assert "keeps its 8 channels, the masked ones at zero" in str(said.pop(NotReconstructedWarning).message)
    assert params(task) == params(Plain())
    assert torch.equal(task.net[0].weight, average.shadow["net.0.weight"])

    fit(task := Plain(), InTheEnd(), prune("l1", reconstruct="after"))  # it goes back first
    assert params(task) < params(Plain())


def test_start_and_end_are_met_once() -> None:
    events: list[str] = []

    class Notes(Plain):
        def on_fit_start(self):
            events.append("fit")

        def on_train_start(self):
            events.append("start")

        def on_train_end(self):
            events.append("end")

    fit(Notes(), prune(start=1), epochs=2)
    assert events == ["fit", "start", "end"]
