"""A module without an example: the callback traces with what its training step gives to forward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import lightning_prune as lp
from lightning_prune.errors import CallbackError
from tests.callbacks.helpers import trainer
from tests.zoo import build, images


class Task(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = build("Residual").train()
        self.calls = 0

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        return self.net(x) * gain

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.calls += 1
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


class Named(Task):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        try:
            return nn.functional.cross_entropy(self(x=batch[0] + torch.rand(()), gain=2.0), batch[1])
        except Exception as error:
            raise AssertionError("what ends the step must not be caught") from error


class Around(Task):
    """Calls a part of itself, which forward hands its input to."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


class Elsewhere(Around):
    """The part that it calls is given something else by forward."""

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        return self.net(x / 255)


class OfValidation(Elsewhere):
    """Only the validation step calls forward."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("mean", self(batch[0]).mean())


class TeacherFirst(Around):
    """Augments by a module and asks the teacher before the network that forward runs."""

    def __init__(self) -> None:
        super().__init__()
        self.augment = nn.Identity()
        self.teacher = build("Residual").train().requires_grad_(False)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images = self.augment(batch[0])
        return super().training_step([images, batch[1]], batch_idx) + 0 * self.teacher(images).mean()


class NoForward(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = build("Residual").train()

    training_step, configure_optimizers = Around.training_step, Task.configure_optimizers


def loader(count: int = 8, *, shuffle: bool = True) -> DataLoader[Any]:
    return DataLoader(TensorDataset(images(count), torch.arange(count) % 5), 4, shuffle=shuffle)


def fit(task: Task, example: Any = None, **options: Any) -> lp.PruneCallback:
    torch.manual_seed(0)
    callback = lp.PruneCallback("taylor", ratio=0.5, reconstruct="before", example_inputs=example, **options)
    trainer(callback, epochs=2).fit(task, loader(), loader(shuffle=False) if isinstance(task, OfValidation) else None)
    return callback


@pytest.mark.parametrize("kind", [Task, Named, Around, TeacherFirst, OfValidation])
def test_the_run_is_the_one_that_an_example_gives(kind: type[Task]) -> None:
    own, told = kind(), kind()
    found, expected = fit(own), fit(told, example=images(2))
    assert found.masking.plan == expected.masking.plan
    assert found.reconstruction.lossless.compared[:2] == ("forward", "forward at another size")
    assert all(torch.equal(tensor, told.state_dict()[name]) for name, tensor in own.state_dict().items())
    assert own.calls == told.calls


def test_two_samples_of_what_forward_got_are_the_example() -> None:
    callback = fit(task := Named())
    example = callback.scoring.run.session.example_inputs
    assert set(example) == {"x", "gain"}
    assert example["x"].shape == images(2).shape
    assert example["gain"] == 2.0
    assert task.example_input_array is None


def test_a_step_that_calls_another_module_than_forward_needs_an_example() -> None:
    with pytest.raises(CallbackError, match=r"no training_step that calls self\(.*: set self.example_input"):
        fit(Elsewhere())
    assert fit(Elsewhere(), example=images(2)).masking.plan


def test_a_module_without_forward_is_told_what_to_write() -> None:
    with pytest.raises(CallbackError, match=r"NoForward defines no forward.*: return self.net\(x\)`"):
        fit(NoForward())


class Stream(IterableDataset):
    """Goes on where it was left, as a queue or a socket does."""

    def __init__(self, samples: int) -> None:
        self.left = iter([(image, torch.tensor(0)) for image in images(samples)])

    def __iter__(self) -> Iterator[Any]:
        return self.left


def test_data_that_can_be_read_once_are_not_used_up_by_scoring() -> None:
    example = {"example_inputs": images(2), "track": False}
    with pytest.raises(CallbackError, match=r"read only once.*nothing to train on. Pass score_batches"):
        trainer(lp.PruneCallback("jre", 0.5, **example)).fit(Task(), DataLoader(Stream(32), 4))

    some = trainer(lp.PruneCallback("jre", 0.5, score_batches=2, **example), epochs=1)
    some.fit(Task(), DataLoader(Stream(32), 4))
    assert some.global_step == 8 - 2 - 1  # Lightning took one ahead; neither an example nor a rehearsal took any

    with pytest.raises(CallbackError, match=r"read only once are not looked at"):
        trainer(lp.PruneCallback("l1", 0.5, track=False)).fit(Task(), DataLoader(Stream(32), 4))


class ListTask(Task):
    """Images of several sizes in a list, as detectors take them."""

    def forward(self, images: list[Tensor]) -> Tensor:
        return torch.cat([self.net(image[None]) for image in images])

    def training_step(self, batch: tuple[Any, ...], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(list(batch[0])), torch.stack([one["label"] for one in batch[1]]))


@pytest.mark.parametrize("count", [2, 3, 4])
def test_images_in_a_list_are_the_samples_and_keep_their_channels(count: int) -> None:
    items = [(image[:, : 8 + n % 2], {"label": torch.tensor(n % 5)}) for n, image in enumerate(images(8, size=9))]
    loader = DataLoader(items, count, collate_fn=lambda batch: tuple(zip(*batch, strict=True)))
    callback = lp.PruneCallback("taylor", ratio=0.5)
    trainer(callback).fit(ListTask(), loader)
    (example,) = callback.scoring.run.session.example_inputs
    assert [tuple(image.shape) for image in example] == [(3, 8, 9), (3, 9, 9)]
    assert "training_step" in callback.reconstruction.lossless.compared


class Failing(Task):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        raise KeyError("pixels")


def test_a_step_that_fails_before_forward_is_named_with_what_it_raised() -> None:
    with pytest.raises(CallbackError, match=r"training_step.* raised KeyError before .*'pixels'") as caught:
        fit(Failing())
    assert isinstance(caught.value.__cause__, KeyError)


class Whole(Task):
    """Calls a part first, and fails on fewer samples than its loader gives."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.net.stem(batch[0])
        assert len(batch[0]) == 4
        return super().training_step(batch, batch_idx)


def test_a_batch_that_cannot_be_cut_is_taken_whole() -> None:
    assert fit(Whole()).scoring.run.session.example_inputs.shape == images(4).shape
