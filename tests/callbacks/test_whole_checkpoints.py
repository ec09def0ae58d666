"""A checkpoint is under its name as a whole or not at all, wherever temporary files lie."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest
import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from lightning_prune.callbacks import PruneCallback
from lightning_prune.cli import main
from lightning_prune.errors import PruningError
from tests.callbacks.helpers import Task, loader, trainer


class Own(TorchCheckpointIO):
    pass


def fitted(*plugins):
    runner = trainer(PruneCallback("l1"), epochs=1, plugins=list(plugins))
    runner.fit(Task(), loader(), loader(8, shuffle=False))
    return runner


def test_it_is_written_beside_its_place_and_moved_there(tmp_path: Path, monkeypatch) -> None:
    def refuse(*_):
        raise AssertionError("copied from another file system, bit by bit")

    runner = fitted()
    monkeypatch.setattr(shutil, "move", refuse)
    runner.save_checkpoint(tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["epoch"] == 1


def test_a_full_disk_leaves_the_earlier_one_and_names_the_file(tmp_path: Path, monkeypatch) -> None:
    runner = fitted()
    runner.save_checkpoint(path := tmp_path / "last.ckpt")
    before = path.read_bytes()

    def full(content, stream):
        stream.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(PruningError, match=r"cannot write .*last\.ckpt: No space left on device"):
        runner.save_checkpoint(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_writer_of_the_users_own_stays() -> None:
    runner = fitted(own := Own())
    assert runner.strategy.checkpoint_io is own
    assert "save_checkpoint" not in vars(own)


def test_a_command_says_that_there_is_no_room_left(monkeypatch, capsys) -> None:
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device", "runs/metrics.csv")

    monkeypatch.setattr("lightning_prune.cli.recipes.show", full)
    assert main(["recipes"]) == 1
    assert "error: cannot write runs/metrics.csv: No space left on device" in capsys.readouterr().err
