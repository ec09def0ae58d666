"""Loaders and the Trainer go on as if nothing had been looked at: persistent workers, tuners, schedules, failures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import BatchSizeFinder
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_prune.callbacks import DistillationCallback, GroupSparsityCallback, PruneCallback
from lightning_prune.schedule import Rounds
from tests.callbacks.helpers import Task, loader, trainer


class Counting(Task):
    """Notes the batches that train it."""

    def __init__(self) -> None:
        super().__init__()
        self.epochs = list[list[int]]()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not batch_idx:
            self.epochs.append([])
        self.epochs[-1].append(batch_idx)


class Scheduled(Counting):
    """Asks how long training is, which sets up its data before any callback's hook."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Sized(Task):
    """A finder sets its batch size."""

    batch_size = 4

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(12, self.batch_size)


def fitted(task: Task, *callbacks: Callback, workers: bool = False, **options: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    images = loader(12)
    if workers:
        images = DataLoader(images.dataset, 4, True, num_workers=1, persistent_workers=True)
    trainer(*callbacks, **options).fit(task, None if isinstance(task, Sized) else images, loader(8, shuffle=False))
    assert isinstance(task, Sized) or task.epochs == [[0, 1, 2]] * 2
    return task.state_dict()


def none_pruned() -> PruneCallback:
    return PruneCallback("taylor_fo", 0.0)


def nearly_sparse() -> GroupSparsityCallback:
    return GroupSparsityCallback(0.0, criterion="taylor_fo")  # scores inside the first epoch


@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
@pytest.mark.parametrize("kind", [Counting, Scheduled])
@pytest.mark.parametrize("workers", [False, True])
@pytest.mark.parametrize("make", [none_pruned, nearly_sparse])
def test_the_run_is_the_one_without_the_callback(make: Any, workers: bool, kind: type[Counting]) -> None:
    plain, looked_at = fitted(kind(), workers=workers), fitted(kind(), make(), workers=workers)
    assert all(torch.equal(tensor, plain[name]) for name, tensor in looked_at.items())


def test_rounds_of_batches_score_beside_persistent_workers() -> None:
    callback = PruneCallback("taylor_fo", 0.5, schedule=Rounds(16, batches=1))
    fitted(Counting(), callback, workers=True)
    assert callback.masking.done


def test_a_finder_of_batch_sizes_is_no_resumed_run(tmp_path: Any) -> None:
    def finder() -> BatchSizeFinder:
        return BatchSizeFinder(max_trials=1, steps_per_trial=1, init_val=4)

    plain = fitted(Sized(), finder(), default_root_dir=tmp_path)
    looked_at = fitted(Sized(), finder(), none_pruned(), default_root_dir=tmp_path)
    assert all(torch.equal(tensor, plain[name]) for name, tensor in looked_at.items())


class Fails(Callback):
    def on_train_batch_end(self, *_: Any) -> None:
        raise ArithmeticError("in the user's own hook")


def test_a_fit_that_fails_leaves_nothing_on_the_strategy() -> None:
    runner = trainer(DistillationCallback(module="net"), PruneCallback("l1", 0.5), Fails())
    with pytest.raises(ArithmeticError, match="user's own"):
        runner.fit(Task(), loader(), loader(8, shuffle=False))
    assert not {"training_step", "load_model_state_dict", "setup"} & set(vars(runner.strategy))
