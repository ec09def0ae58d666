"""Two processes stand for two nodes: launched by torchrun or by SLURM, killed, and started again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_prune.reconstruction import LosslessReport
from tests.cli.tiny import NET

ROOT = Path(__file__).parents[2]
FIT = ["-m", "tests.scripts.nodes", "fit", "--config", "task.yaml"]
SECONDS = 300  # of a machine that has other things to do, too; a collective waits for 1800


def write_recipe(folder: Path) -> None:
    callbacks = [
        {"class_path": "pytorch_lightning.callbacks.ModelCheckpoint", "init_args": {"save_last": True}},
        {"class_path": "lightning_prune.PruneCallback", "init_args": {"criterion": "jre", "ratio": 0.5}},
        {"class_path": "tests.scripts.nodes.Kept"},
    ]
    quiet = {"log_every_n_steps": 1, "enable_progress_bar": False, "enable_model_summary": False}
    content = {
        "trainer": {
            "max_epochs": 2,
            "accelerator": "cpu",
            "strategy": "ddp",
            "devices": 1,
            "num_nodes": 2,
            "callbacks": callbacks,
            **quiet,
        },
        "model": {
            "class_path": "lightning_prune.tasks.ClassificationTask",
            "init_args": {"model": {"class_path": NET}, "num_classes": 3, "input_size": [3, 8, 8]},
        },
        "data": {"class_path": "tests.scripts.nodes.Data", "init_args": {"batch": 3}},
    }
    folder.mkdir(exist_ok=True)
    (folder / "task.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def torchrun(node: int, port: int) -> list[str]:
    """The launcher of one node; the nodes' numbers are given."""
    meeting = ["--node-rank", str(node), "--master-addr", "127.0.0.1", "--master-port", str(port)]
    return [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", *meeting, *FIT]


def restarting_torchrun(port: int) -> list[str]:
    """The launcher of any node, which meets the others again after a failure."""
    meeting = [
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        f"127.0.0.1:{port}",
        "--rdzv-id",
        "17",
        "--max-restarts",
        "1",
    ]
    local = ["--nnodes", "2", "--nproc-per-node", "1", "--local-addr", "127.0.0.1"]
    return [sys.executable, "-m", "torch.distributed.run", *local, *meeting, *FIT, "--ckpt_path", "last"]


def slurm(node: int, port: int) -> dict[str, str]:
    """What srun tells the one task of a node."""
    told = {"NTASKS": 2, "NTASKS_PER_NODE": 1, "NNODES": 2, "PROCID": node, "NODEID": node, "LOCALID": 0}
    told |= {"JOB_ID": 17, "JOB_NAME": "train", "NODELIST": "127.0.0.1"}
    return {**{f"SLURM_{name}": str(value) for name, value in told.items()}, "MASTER_PORT": str(port)}


def started(folder: Path, command: list[str], **variables: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **pipes)


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit status and output of each; all must end by themselves."""
    try:
        outputs = [process.communicate(timeout=SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()  # torchrun ends its workers, which are no group of ours
                process.wait(60)
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def kept(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"kept-{rank}.pt", weights_only=True) for rank in (0, 1)]


def check_same_weights(*found: dict[str, Any]) -> None:
    """But for batch-norm statistics, which every process has of its own data until DDP sends those of the first."""
    first = found[0]["state"]
    for other in found[1:]:
        assert other["state"].keys() == first.keys()
        assert all(torch.equal(v, other["state"][name]) for name, v in first.items() if "running" not in name)


def check_same_runs(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    check_same_weights(*one, *other)
    for mine, yours in zip(one, other, strict=True):
        assert all(torch.equal(value, yours["state"][name]) for name, value in mine["state"].items())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run in one go, beside what an earlier run has left."""
    folder = tmp_path_factory.mktemp("whole")
    write_recipe(folder)
    (folder / "runs/task/fit").mkdir(parents=True)
    (folder / "runs/task/fit/metrics.csv").write_text("of an earlier run\n", encoding="utf-8")
    port = free_port()
    for status, output in ended([started(folder, torchrun(node, port)) for node in (0, 1)]):
        assert status == 0, output[-3000:]
    return folder


def test_two_nodes_end_with_one_model_in_one_folder(whole: Path) -> None:
    found = kept(whole)
    check_same_weights(*found)
    assert [Path(one["folder"]) for one in found] == [Path("runs/task/fit-2")] * 2
    assert found[0]["state"]["model.0.weight"].shape[0] < 16
    assert {path.name for path in (whole / "runs/task").iterdir()} == {"fit", "fit-2"}
    assert [path.name for path in (whole / "runs/task/fit").iterdir()] == ["metrics.csv"]
    assert (whole / "runs/task/fit/metrics.csv").read_text(encoding="utf-8") == "of an earlier run\n"
    assert {path.name for path in (whole / "runs/task/fit-2").iterdir()} == {
        "checkpoints",
        "config.yaml",
        "metrics.csv",
        "prune",
    }
    last = torch.load(whole / "runs/task/fit-2/checkpoints/last.ckpt", weights_only=True)
    assert LosslessReport(**last["callbacks"]["PruneCallback"]["reconstruction"]["lossless"]).passed


@pytest.mark.slow
def test_torchrun_starts_a_run_again_that_has_lost_a_process(tmp_path: Path, whole: Path) -> None:
    write_recipe(tmp_path)
    # Or the second start reads addresses of the first: https://github.com/pytorch/pytorch/issues/135712
    variables = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "DIES": "1:fine-tuning"}
    command = restarting_torchrun(free_port())
    for status, output in ended([started(tmp_path, command, **variables) for _ in range(2)]):
        assert status == 0, output[-3000:]
    assert (tmp_path / "died while fine-tuning").exists()
    check_same_runs(kept(whole), kept(tmp_path))
    assert {path.name for path in (tmp_path / "runs/task").iterdir()} == {"fit"}


@pytest.mark.slow
@pytest.mark.parametrize("dies", ["1:scoring", "1:fine-tuning", "0:fine-tuning", "0:writing"])
def test_under_slurm_the_others_end_and_the_last_checkpoint_goes_on(tmp_path: Path, whole: Path, dies: str) -> None:
    write_recipe(tmp_path)
    command = [sys.executable, *FIT, "--ckpt_path", "last"]
    port = free_port()
    ends = ended([started(tmp_path, command, DIES=dies, **slurm(node, port)) for node in (0, 1)])
    dead = int(dies[0])
    assert ends[dead][0] == -signal.SIGKILL
    assert ends[1 - dead][0] == 1, ends[1 - dead][1][-3000:]
    said = ends[1 - dead][1].splitlines()[-1]
    assert f"error: another process of this training is gone, says process {1 - dead}: what that one printed" in said
    port = free_port()
    for status, output in ended([started(tmp_path, command, **slurm(node, port)) for node in (0, 1)]):
        assert status == 0, output[-3000:]
    check_same_runs(kept(whole), kept(tmp_path))
    assert not list(tmp_path.rglob("*.tmp"))
