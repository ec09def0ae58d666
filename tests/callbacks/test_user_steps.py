"""The user's own steps are traced, and rehearsed on the smaller model; nothing else shows that they were run."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import Callback, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_prune.callbacks import PruneCallback
from lightning_prune.errors import CallbackError, NotReconstructedWarning, PruningError
from lightning_prune.reconstruction.small_model import reconstruct_masked
from lightning_prune.schedule import Rounds
from tests.callbacks.helpers import params, trainer


class Plain(LightningModule):
    """Features, a classifier, and what the tests below add."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        )
        self.flat, self.fc = nn.Flatten(), nn.Linear(8, 3)
        self.example_input_array = torch.randn(2, 3, 8, 8)
        self.seen: list[float] = []

    def embed(self, x: Tensor) -> Tensor:
        return self.flat(self.features(x))

    def forward(self, x):
        return self.fc(self.embed(x))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)


def data(shuffle: bool = False, generator: torch.Generator | None = None) -> DataLoader:
    torch.manual_seed(3)
    images, labels = torch.randn(8, 3, 8, 8), torch.arange(8) % 3
    return DataLoader(TensorDataset(images, labels), 4, shuffle=shuffle, generator=generator)


def fit(task: LightningModule, *callbacks: Callback, epochs: int = 2, **options: Any) -> Any:
    random.seed(0)
    loader = options.pop("loader", None) or data()
    torch.manual_seed(0)
    runner = trainer(*callbacks, epochs=epochs, **options)
    runner.fit(task, loader, data() if hasattr(type(task), "validated") else None)
    return runner


WHENS = ("before", "during", "after")


def pruned(task: LightningModule, *others: Callback, when: str = "before", ratio: float = 0.5, **options: Any) -> Any:
    callback = PruneCallback("l1", ratio, reconstruct=when, track=False)
    before = params(task)
    fit(task, callback, *others, **options)
    assert callback.reconstruction.lossless.passed
    assert params(task) < before
    return callback


# --- heads and teachers that only the steps call ------------------------------------------------------------------


class Auxiliary(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Linear(8, 3)

    def training_step(self, batch, batch_idx):
        features = self.embed(batch[0])
        return F.cross_entropy(self.fc(features), batch[1]) + F.cross_entropy(self.auxiliary(features), batch[1])


class OnlyInValidation(Plain):
    validated = True

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Linear(8, 2)

    def validation_step(self, batch, batch_idx):
        self.log("spread", self.auxiliary(self.embed(batch[0])).std())


@pytest.mark.parametrize("when", WHENS)
@pytest.mark.parametrize("kind", [Auxiliary, OnlyInValidation])
def test_the_input_of_a_head_outside_forward_is_pruned_along(kind: type, when: str) -> None:
    task = kind()
    pruned(task, when=when)
    assert task.auxiliary.in_features == task.fc.in_features < 8


class Averaged(Plain):
    """A mean teacher; `follow` is called where a test says."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.features).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + F.mse_loss(
            self.fc(self.embed(batch[0])), self.fc(self.flat(self.teacher(batch[0])))
        )

    def follow(self) -> None:
        for p, q in zip(self.teacher.parameters(), self.features.parameters(), strict=True):
            p.data.mul_(0.9).add_(q.data, alpha=0.1)


class AtBatchEnd(Averaged):
    def on_train_batch_end(self, *_):
        self.follow()


class BeforeZeroGrad(Averaged):
    def on_before_zero_grad(self, optimizer):
        self.follow()


class AtEpochEnd(Averaged):
    def on_train_epoch_end(self):
        self.follow()


class InOptimizerStep(Averaged):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        optimizer.step(closure=optimizer_closure)
        self.follow()


@pytest.mark.parametrize("when", WHENS)
@pytest.mark.parametrize("kind", [AtBatchEnd, BeforeZeroGrad, AtEpochEnd, InOptimizerStep])
def test_a_mean_teacher_loses_the_channels_of_its_student(kind: type, when: str) -> None:
    task = kind()
    pruned(task, when=when)
    shapes = [[p.shape for p in net.parameters()] for net in (task.teacher, task.features)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_train_epoch_end"])
def test_a_callback_of_the_users_that_moves_the_teacher_counts(hook: str) -> None:
    def move(self: Callback, runner: Any, task: Averaged, *_: Any) -> None:
        task.follow()

    task = Averaged()
    pruned(task, type("Moves", (Callback,), {hook: move, "__module__": "tests.helpers"})())
    assert task.teacher[0].out_channels == task.features[0].out_channels < 8


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_train_epoch_end"])
def test_an_average_that_nobody_can_cut_keeps_the_channels(hook: str) -> None:
    class Keeps(Callback):
        def __init__(self, task: Plain) -> None:
            self.shadow = {name: p.detach().clone() for name, p in task.named_parameters()}

        def follow(self, runner: Any, task: Plain, *_: Any) -> None:
            for name, p in task.named_parameters():
                self.shadow[name] = 0.9 * self.shadow[name] + 0.1 * p.detach()

    task = Plain()
    kind = type("Own", (Keeps,), {hook: Keeps.follow, "__module__": "tests.helpers"})
    with pytest.raises(CallbackError, match=r"features\.0 meets a tensor of fixed size"):
        fit(task, kind(task), PruneCallback("l1", 0.5, track=False))


def test_a_teacher_without_gradients_is_scored_by_its_student() -> None:
    class NoGrad(AtBatchEnd):
        def training_step(self, batch, batch_idx):
            with torch.no_grad():
                target = self.fc(self.flat(self.teacher(batch[0])))
            return F.mse_loss(self(batch[0]), target) + F.cross_entropy(self(batch[0]), batch[1])

    task = NoGrad()
    fit(task, PruneCallback("taylor", 0.5, track=False))
    assert task.teacher[0].out_channels == task.features[0].out_channels < 8


# --- rehearsal before anything is kept ------------------------------------------------------------------------------


class Sized(Plain):
    """Its training step counts, in a way that no trace can follow."""

    def training_step(self, batch, batch_idx):
        if len(next(self.features.parameters())) != 8:
            raise RuntimeError("eight channels are needed")
        return super().training_step(batch, batch_idx)


class Weighed(Plain):
    def training_step(self, batch, batch_idx):
        if sum(p.numel() for p in self.parameters()) != 851:
            raise RuntimeError("all of them are needed")
        return super().training_step(batch, batch_idx)


class Counts(Callback):
    def __init__(self, counted: list[str]) -> None:
        self.append = counted.append

    def on_train_batch_start(self, *_):
        self.append("batch")


@pytest.fixture
def _blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trial runs of the tracer look away, so that the rehearsal is alone."""
    monkeypatch.setattr("lightning_prune.graph.trial_runs.TrialRuns.failure", lambda *_, **__: None)


@pytest.mark.usefixtures("_blind")
@pytest.mark.parametrize("when", WHENS)
def test_a_step_that_fails_on_the_smaller_model_is_known_before_training(when: str) -> None:
    """A warning is an error here: nothing has happened by then, and the message names the ways out."""
    task, seen = Weighed(), []
    before = copy.deepcopy(task.state_dict())
    with pytest.raises(NotReconstructedWarning, match=r"training_step.*all of them are needed.*ignore=.*also="):
        fit(task, PruneCallback("l1", 0.5, reconstruct=when, track=False), Counts(seen))
    assert not seen, "nobody trains for a day to learn it at the end"
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())
    assert not any(module._forward_pre_hooks for module in task.modules())


@pytest.mark.usefixtures("_blind")
@pytest.mark.parametrize("when", WHENS)
def test_a_step_that_fails_on_every_smaller_model_leaves_it_whole(when: str) -> None:
    task = Weighed()
    with pytest.warns(NotReconstructedWarning, match="all of them are needed"):
        fit(task, PruneCallback("l1", 0.5, reconstruct=when, track=False))
    assert params(task) == params(Weighed())


@pytest.mark.usefixtures("_blind")
@pytest.mark.parametrize("when", WHENS)
def test_a_step_that_needs_some_channels_keeps_them_and_says_so(when: str) -> None:
    task = Sized()
    with pytest.warns(NotReconstructedWarning, match=r"'features\.0' keeps its 8 channels.*eight channels are needed"):
        pruned(task, when=when)
    assert (task.features[0].out_channels, task.features[3].out_channels) == (8, task.fc.in_features)
    assert task.fc.in_features < 8


def test_a_step_that_counts_channels_keeps_them_where_the_trace_can_tell() -> None:
    with pytest.raises(PruningError, match="eight channels are needed"):
        fit(Sized(), PruneCallback("l1", 0.5, track=False))


@pytest.mark.usefixtures("_blind")
def test_the_failing_module_is_named() -> None:
    class Refusing(nn.Linear):
        def forward(self, x):
            assert x.shape[1] == 8, "not eight"
            return super().forward(x)

    class Task(Auxiliary):
        def __init__(self) -> None:
            super().__init__()
            self.auxiliary = Refusing(8, 3)

    with pytest.warns(NotReconstructedWarning, match=r"training_step in module 'auxiliary'.*not eight"):
        fit(Task(), PruneCallback("l1", 0.5, reconstruct="after", track=False))


def test_order_a_is_rehearsed_once_and_before_training(monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(
        "lightning_prune.session.rehearsal.reconstruct_masked",
        lambda *a, **k: (calls.append(1), reconstruct_masked(*a, **k))[1],
    )

    fit(Plain(), PruneCallback("l1", 0.5, reconstruct="after", track=False), Counts(calls), epochs=1)
    assert calls == [1, "batch", "batch"]


# --- nothing else shows ---------------------------------------------------------------------------------------------


class Bookkeeper(Auxiliary):
    """Writes down whatever it can in its steps."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = MulticlassAccuracy(3)
        self.register_buffer("steps", torch.zeros(()))
        self.count, self.losses = 0, []

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.count += 1
        self.steps += 1
        self.accuracy.update(self(x), y)
        self.log("noise", torch.rand(()) + random.random())
        x.mul_(0.5)  # in place
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] *= 0.9
        loss = super().training_step((x, y), batch_idx)
        self.losses.append(float(loss.detach()))
        return loss

    def on_after_batch_transfer(self, batch, dataloader_idx):
        if not isinstance(batch, Tensor):
            batch[0].add_(torch.randn_like(batch[0]) * 0.1)
        return batch

    def on_train_epoch_end(self):
        self.log("accuracy", self.accuracy.compute())
        self.accuracy.reset()


@pytest.mark.parametrize("criterion", ["l1", "jre"])
def test_a_run_that_removes_nothing_is_the_run_without_the_callback(criterion: str) -> None:
    torch.manual_seed(1)
    first = Bookkeeper()
    second = copy.deepcopy(first)
    runs = [
        fit(task, *callbacks, loader=data(True, torch.Generator().manual_seed(5)))
        for task, callbacks in ((first, []), (second, [PruneCallback(criterion, 0.0, track=False)]))
    ]
    assert second.count == first.count
    assert second.steps == first.steps
    assert second.losses == pytest.approx(first.losses, rel=1e-5)
    for name, value in runs[0].callback_metrics.items():
        assert torch.allclose(runs[1].callback_metrics[name], value, rtol=1e-5), name
    rates = [runner.optimizers[0].param_groups[0]["lr"] for runner in runs]
    assert rates[0] == rates[1]


def test_batches_that_are_kept_in_memory_are_not_changed() -> None:
    class Kept:
        def __init__(self) -> None:
            self.batches = list(data())

        def __iter__(self):
            return iter(self.batches)

        def __len__(self):
            return len(self.batches)

    kept = Kept()
    before = copy.deepcopy(kept.batches)
    fit(Bookkeeper(), PruneCallback("jre", 0.5, track=False), loader=kept, epochs=0)
    assert all(
        torch.equal(a, b) for old, new in zip(before, kept.batches, strict=True) for a, b in zip(old, new, strict=True)
    )


def test_hooks_before_a_batch_is_moved_are_run() -> None:
    class Task(Auxiliary):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return (batch["x"], batch["y"]) if isinstance(batch, dict) else batch

    loader = DataLoader([{"x": x, "y": y} for x, y in data().dataset], 4)
    task = Task()
    callback = PruneCallback("jre", 0.5, track=False)
    fit(task, callback, loader=loader)
    assert task.auxiliary.in_features == task.fc.in_features < 8


def test_a_callback_that_keeps_books_elsewhere_is_not_run_before_training() -> None:
    seen = []

    class Notes(Callback):
        def on_train_batch_end(self, *_):
            seen.append("batch")

        def on_train_epoch_end(self, runner, task):
            seen.append(sum(p.numel() for p in task.parameters()))

    task = Plain()
    pruned(task, Notes(), epochs=1)
    assert seen == ["batch", "batch", params(task)]


class Adversaries(Plain):
    """Two optimizers, stepped by hand; a discriminator beside."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.discriminator = nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        for optimizer, sign in ((first, 1), (second, -1)):
            self.toggle_optimizer(optimizer)
            features = self.embed(batch[0])
            loss = F.cross_entropy(self.fc(features), batch[1]) + sign * self.discriminator(features).mean()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)
        self.lr_schedulers().step()

    def configure_optimizers(self):
        generator = torch.optim.Adam([*self.features.parameters(), *self.fc.parameters()], 0.01)
        discriminator = torch.optim.SGD(self.discriminator.parameters(), 0.01)
        return [generator, discriminator], [torch.optim.lr_scheduler.StepLR(generator, 1, 0.5)]


class Stops(Callback):
    def on_train_batch_start(self, *_):
        raise ArithmeticError


@pytest.mark.parametrize("when", WHENS)
def test_optimizers_under_manual_optimization_do_not_step_before_training(when: str) -> None:
    task = Adversaries()
    before = copy.deepcopy(task.state_dict())
    with pytest.raises(ArithmeticError):
        fit(task, PruneCallback("l1", 0.0, reconstruct=when, track=False), Stops(), epochs=1)
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())
    runner = fit(task := Adversaries(), PruneCallback("l1", 0.5, reconstruct=when, track=False), epochs=1)
    assert task.discriminator.in_features == task.fc.in_features < 8
    assert runner.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0025)


def test_a_group_of_which_one_channel_is_left_is_no_obstacle_to_later_steps() -> None:
    class Narrow(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.features[3] = nn.Conv2d(8, 2, 3)
            self.fc = nn.Linear(2, 3)
            with torch.no_grad():
                self.features[3].weight.mul_(1e-3)

    callback = PruneCallback("l1", 0.6, schedule=Rounds(2, epochs=1), reconstruct="during", track=False)
    task = Narrow()
    fit(task, callback, epochs=4)
    assert task.fc.in_features == 1
    assert task.features[0].out_channels < 8


def test_a_callback_that_takes_the_module_from_the_trainer_meets_the_copy() -> None:
    class Averages(Callback):
        def on_train_batch_end(self, trainer, *_):
            module = trainer.lightning_module
            for mine, theirs in zip(module.teacher.parameters(), module.features.parameters(), strict=True):
                mine.data.mul_(0.9).add_(theirs.data, alpha=0.1)

    class Start(Callback):
        def on_train_start(self, trainer, pl_module):
            found.append(copy.deepcopy(pl_module.teacher.state_dict()))

    class Task(Auxiliary):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = copy.deepcopy(self.features).requires_grad_(False)
            with torch.no_grad():
                for parameter in self.teacher.parameters():
                    parameter.add_(1)

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + 0 * self.teacher(batch[0]).mean()

    found: list[dict[str, Tensor]] = []
    task = Task()
    before = copy.deepcopy(task.teacher.state_dict())
    fit(task, PruneCallback("l1", 0.5, reconstruct="after", track=False), Averages(), Start())
    for key, value in found[0].items():
        kept = value != 0  # the others are masked along with the student's
        assert torch.equal(value[kept], before[key][kept]), key
