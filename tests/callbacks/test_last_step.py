"""What is due when training ends is also done by a run that was killed after its last epoch, and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from lightning_prune.callbacks import PruneCallback
from lightning_prune.errors import NoEffectWarning
from lightning_prune.schedule import Gradual
from tests.callbacks.helpers import Task, loader, params, trainer

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:Checkpoint directory .* exists")


class Killed(BaseException):
    """Stands for whatever ends a process."""


class Kill(Callback):
    """Ends the run between the last epoch's checkpoint and what is due when training ends."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        raise Killed


class Reads(Task):
    """Its loader draws other batches in every epoch, whatever the random state."""

    def train_dataloader(self) -> DataLoader:
        data = loader().dataset
        return DataLoader(data, 4, sampler=DistributedSampler(data, num_replicas=1, rank=0, shuffle=True, seed=3))


def fitted(
    task: Task,
    folder: Path,
    *others: Callback,
    ckpt: Path | None = None,
    seed: int = 0,
    max_steps: int = -1,
    logger: CSVLogger | bool = False,
    **options: Any,
) -> PruneCallback:
    callback = PruneCallback(**{"criterion": "jre", "ratio": 0.5, **options})
    saving = ModelCheckpoint(folder, save_last=True, save_on_train_epoch_end=True)
    runner = trainer(
        *others, callback, saving, enable_checkpointing=True, max_steps=max_steps, logger=logger, log_every_n_steps=1
    )
    torch.manual_seed(seed)
    data = None if isinstance(task, Reads) else loader()
    runner.fit(task, data, loader(8, shuffle=False), ckpt_path=ckpt)
    return callback


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Task, {"reconstruct": "after", "criterion": "l1"}),
        (Task, {"reconstruct": "never", "start": "end", "score_batches": 1}),
        (Reads, {"reconstruct": "before", "start": "end", "score_batches": 1}),
        (Task, {"reconstruct": "before", "update_weights": True, "score_epochs": 2}),
    ],
    ids=["order A", "scored at the end", "other batches in every epoch", "scored while training"],
)
def test_a_run_killed_after_its_last_epoch_ends_as_the_whole_one(
    kind: type[Task], options: dict[str, Any], tmp_path: Path
) -> None:
    whole, killed, resumed = kind(), kind(), kind()
    first = fitted(whole, tmp_path / "whole", **options)
    with pytest.raises(Killed):
        fitted(killed, tmp_path, Kill(), **options)
    again = fitted(resumed, tmp_path, ckpt=tmp_path / "last.ckpt", seed=1, **options)
    assert again.masking.plan == first.masking.plan is not None
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())
    if again.reconstruction is not None:
        assert params(resumed) < params(Task())
        assert again.reconstruction.lossless.passed
        assert again.masking.handle is None


def test_the_last_step_is_in_the_summary(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        fitted(Task(), tmp_path, Kill(), reconstruct="after", criterion="l1")
    logger = CSVLogger(tmp_path / "runs")
    fitted(Task(), tmp_path, ckpt=tmp_path / "last.ckpt", reconstruct="after", criterion="l1", logger=logger)
    (summary,) = (tmp_path / "runs").rglob("summary.csv")
    assert "reconstructed" in summary.read_text()


def test_the_last_step_is_taken_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    callback = PruneCallback("l1", 0.5, reconstruct="after", start="end")
    parts = callback.scoring, callback.masking, callback.reconstruction
    calls: list[str] = []
    for part in parts:
        name = type(part).__name__
        monkeypatch.setattr(
            part, "on_train_end", lambda *of, end=part.on_train_end, name=name: (calls.append(name), end(*of))
        )
    runner = trainer(callback, epochs=1)
    expected = ["ScoringCallback", "MaskingCallback", "ReconstructionCallback"]
    runner.fit(task := Task(), loader(), loader(8, shuffle=False))
    assert calls == expected
    size = params(task)
    runner.fit(task, loader(), loader(8, shuffle=False))  # there is nothing left to train
    assert calls == 2 * expected
    assert params(task) == size
    assert len(callback.scoring.history) == 1


@pytest.mark.filterwarnings("ignore:training ended after step 1 of 2")  # said before it was killed
def test_steps_that_were_never_taken_are_named_by_a_resumed_run_too(tmp_path: Path) -> None:
    options = {"reconstruct": "after", "schedule": Gradual(2), "max_steps": 4}  # of one epoch
    with pytest.raises(Killed):
        fitted(Task(), tmp_path, Kill(), **options)
    with pytest.warns(NoEffectWarning, match="training ended after step 1 of 2") as said:
        fitted(task := Task(), tmp_path, ckpt=tmp_path / "last.ckpt", **options)
    assert len([one for one in said if one.category is NoEffectWarning]) == 1
    assert params(task) < params(Task())
