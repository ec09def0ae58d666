"""Two processes prune and train as one does on the same global batches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pytorch_lightning.strategies import DDPStrategy, FSDPStrategy
from torch import nn

from lightning_prune.callbacks import PruneCallback
from lightning_prune.callbacks.processes import check_communication_hook, check_strategy, lost_process
from lightning_prune.errors import CallbackError
from lightning_prune.graph.entry_points import EntryPoint
from lightning_prune.graph.running import RunningModules
from lightning_prune.reconstruction.rehearsal import _step
from tests.scripts.processes import RESUMED, RUNS, main
from tests.zoo import build, images

ROOT = Path(__file__).parents[2]


def run_script(name: str, *arguments: object) -> None:
    command = [sys.executable, "-m", f"tests.scripts.{name}", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def read(folder: Path, name: str, processes: int, rank: int = 0) -> dict[str, Any]:
    return torch.load(folder / f"{name}-{processes}-{rank}.pt", weights_only=True)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:no trace has reached the parameters of unused")
def test_two_processes_prune_train_and_resume_as_one(tmp_path: Path) -> None:
    run_script("processes", tmp_path, "2")
    main(tmp_path, 1)
    for name in RUNS:
        one, first, second = read(tmp_path, name, 1), read(tmp_path, name, 2), read(tmp_path, name, 2, 1)
        assert first["plan"] == second["plan"] == one["plan"], name
        assert one["lossless"], name
        assert first["lossless"], name
        for group, scores in one["scores"]["groups"].items():
            assert torch.allclose(first["scores"]["groups"][group], scores, rtol=1e-6, atol=0), (name, group)
            assert torch.equal(first["scores"]["groups"][group], second["scores"]["groups"][group]), (name, group)
        for key, value in one["state"].items():
            assert torch.equal(first["state"][key], second["state"][key]), (name, key)
            assert first["state"][key].shape == value.shape, (name, key)
            assert torch.allclose(first["state"][key].double(), value.double(), rtol=1e-5, atol=1e-5), (name, key)
    for name in RESUMED:
        for processes, rank in ((1, 0), (2, 0), (2, 1)):
            whole = read(tmp_path, name, processes, rank)
            resumed = torch.load(tmp_path / f"{name}-{processes}-{rank}-resumed.pt", weights_only=True)
            for group, scores in whole["scores"]["groups"].items():
                assert torch.allclose(resumed["scores"]["groups"][group], scores, rtol=1e-9, atol=0), (name, group)
            assert whole["state"].keys() == resumed["state"].keys()
            for key, value in whole["state"].items():
                assert torch.equal(value, resumed["state"][key]), (name, processes, rank, key)
    for rank in (0, 1):
        text = (tmp_path / f"refused-{rank}.txt").read_text()
        assert "processes [1] chose other channels than process 0" in text


SAID = {  # in which process it fails, and what the others say
    "scoring": (1, "no space left"),
    "selecting": (1, "no space left"),
    "masking": (0, "no space left"),
    "reconstructing": (1, "no space left"),
    "logging": (0, "no space left"),
    "uneven": (None, "process 1 has 4 training batches per epoch, process 0 has 2: the others would wait for ever"),
    "elsewhere": (None, "process 1 starts from no checkpoint, process 0 from last.ckpt ("),
    "channels": (None, "process 1 found other channels in the model than process 0"),
}


def test_what_fails_in_one_process_ends_all_of_them(tmp_path: Path) -> None:
    run_script("process_failures", tmp_path)
    for name, (failed, said) in SAID.items():
        for rank in (0, 1):
            text = (tmp_path / f"{name}-{rank}.txt").read_text()
            other = failed is not None and rank != failed
            assert said in text, (name, rank, text)
            assert other == text.startswith(f"process {failed} failed, so that this one stops too: "), (name, text)


def test_a_rehearsed_step_waits_for_no_other_process(tmp_path: Path) -> None:
    """SyncBatchNorm would, where only one process rehearses a step again; and torch has it on GPUs only."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(build("Residual")).train()
    entry = EntryPoint("step", lambda model, x: model(x).sum().backward(), images(2), (True,), required=False)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        _step(model, entry, True, RunningModules(model))
        with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on GPU"):
            model(images(2))
    finally:
        dist.destroy_process_group()


class Fake:
    """A Trainer, as far as `check_strategy` looks at it."""

    def __init__(self, strategy: Any, processes: int) -> None:
        self.strategy, self.world_size = strategy, processes


def test_strategies_that_shard_or_copy_are_refused() -> None:
    with pytest.raises(CallbackError, match=r"PruneCallback: FSDPStrategy is not supported: .* strategy='ddp'"):
        check_strategy(Fake(FSDPStrategy(), 2), PruneCallback.__name__)
    with pytest.raises(CallbackError, match="strategy='ddp_spawn' prunes a copy of the module that is lost"):
        check_strategy(Fake(DDPStrategy(start_method="spawn"), 2), PruneCallback.__name__)
    check_strategy(Fake(DDPStrategy(), 2), PruneCallback.__name__)


def test_a_communication_hook_with_state_is_refused_where_the_model_changes_while_it_trains() -> None:
    class PowerSGDState: ...

    check_communication_hook(Fake(DDPStrategy(), 2))
    with pytest.raises(CallbackError, match="keeps a PowerSGDState in the shapes of the model"):
        check_communication_hook(Fake(DDPStrategy(ddp_comm_state=PowerSGDState()), 2))


@pytest.mark.parametrize(
    ("said", "lost"),
    [
        ("[pair.cc:561] Connection closed by peer [10.0.0.2]:6531. GLHF!", True),
        ("NCCL error: ncclRemoteError: a remote process has exited", True),
        ("Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7) ran for 600000 milliseconds", True),
        ("CUDA out of memory. Tried to allocate 2 GiB", False),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_only_errors_of_a_lost_process_are_taken_for_one(monkeypatch, said: str, lost: bool) -> None:
    assert lost_process(RuntimeError(said)) is None  # there is one process
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    text = lost_process(RuntimeError(said))
    assert (text is not None) == lost
    if text is not None:
        assert text.startswith("another process of this training is gone, says process 1: ")
        assert said.split(".")[0][:40] in text
        assert lost_process(RuntimeError(text)) == text
    assert lost_process(ValueError(said)) is None
