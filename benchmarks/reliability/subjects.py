"""What is killed: commands on tiny networks, how they are begun again, and what they must end with."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.reliability import networks
from benchmarks.reliability.wholeness import name_of
from lightning_prune.cli import main
from lightning_prune.tensor_files import read_tensors

TIMES = ("time", "seconds", "ms", "latency", "lines", "date", "made", "machine")  # what no two runs have alike


@dataclass(frozen=True)
class Subject:
    """One of them.

    Attributes:
        share: of the kills, in percent.
        words: command line for a folder, which is the working directory.
        result: a name of all that it ends with, which is the same for equal results.
    """

    name: str
    share: int
    words: Callable[[Path], list[str]]
    result: Callable[[Path], str]

    def run(self, folder: Path) -> int:
        """In a forked process."""
        os.chdir(folder)
        os.environ["COLUMNS"] = "100"
        torch.set_num_threads(1)
        return main(self.words(folder))


def prepare(folder: Path, given: Path) -> None:
    """A working directory with the configurations and the trained weights that all subjects take."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in given.iterdir():
        if path.is_file():
            shutil.copy2(path, folder)


def make_given(folder: Path) -> None:
    """What `prepare` copies; called in a forked process."""
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    for task in networks.TASKS:
        networks.write_configuration(folder / f"{task}.yaml", networks.configuration(task))
        networks.write_configuration(folder / f"{task}-task.yaml", networks.TASKS[task])
    networks.write_configuration(folder / "tiny.yaml", networks.RECIPE)
    torch.manual_seed(0)
    torch.save(networks.Classifier().state_dict(), folder / "dense.pt")
    words = ["prune", "dense.pt", "--config", "classification-task.yaml", "--criterion", "l1", "--ratio", "0.5"]
    if main([*words, "--out", "small.pt"]):
        raise SystemExit("the weights for export could not be pruned")


def _fit(task: str) -> Callable[[Path], list[str]]:
    def words(folder: Path) -> list[str]:
        again = ["--ckpt_path", "last"] if any(folder.glob("runs/**/last*.ckpt")) else []
        return ["fit", "--config", f"{task}.yaml", *again]

    return words


def _fitted(folder: Path) -> str:
    last = max(folder.glob("runs/**/last.ckpt"), key=lambda path: path.stat().st_mtime)
    content = read_tensors(last)
    return name_of({name: content[name] for name in ("state_dict", "optimizer_states", "epoch", "global_step")})


def _timed(name: Any) -> bool:
    return any(word in str(name).lower() for word in TIMES)


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_times(item) for name, item in value.items() if not (_timed(name) or name == "epoch")}
    return [_without_times(item) for item in value] if isinstance(value, list) else value


def _cells(pattern: str) -> Callable[[Path], str]:
    def result(folder: Path) -> str:
        found = {path.name: _without_times(json.loads(path.read_text("utf-8"))) for path in folder.glob(pattern)}
        return name_of(found)

    return result


def _points(folder: Path) -> str:
    (path,) = folder.glob("found/*.jsonl")
    rows = sorted(path.read_text("utf-8").splitlines()[1:])
    return name_of([rows, json.loads((folder / "found/layer_ratios.json").read_text("utf-8"))])


def _pruned(folder: Path) -> str:
    return name_of(read_tensors(folder / "out.pt"))


def _exported(folder: Path) -> str:
    import onnx  # its runtime starts threads, which a process that forks must not have

    graph = onnx.load(folder / "net.onnx").graph
    weights = {tensor.name: tensor.SerializeToString().hex() for tensor in graph.initializer}
    return name_of([weights, [node.op_type for node in graph.node]])


_TASK = ["--config", "classification-task.yaml"]
_PRUNE = [
    "prune",
    "dense.pt",
    *_TASK,
    "--criterion",
    "jre",
    "--score-batches",
    "4",
    "--ratio",
    "0.5",
    "--out",
    "out.pt",
]
_SENSITIVITY = ["sensitivity", "dense.pt", *_TASK, "--criterion", "l1", "--ratios", "0.25,0.5,0.75"]
_COMPARE = ["compare", "--criteria", "l1,random", "--ratios", "0.5", "--seeds", "0", "--epochs", "1", *_TASK]
SUBJECTS = {
    subject.name: subject
    for subject in (
        Subject("fit classification", 30, _fit("classification"), _fitted),
        Subject("fit segmentation", 17, _fit("segmentation"), _fitted),
        Subject("fit detection", 12, _fit("detection"), _fitted),
        Subject("prune", 11, lambda _: _PRUNE, _pruned),
        Subject("sensitivity", 9, lambda _: [*_SENSITIVITY, "--drop", "0.05", "--out", "found"], _points),
        Subject(
            "compare", 7, lambda _: [*_COMPARE, "--checkpoint", "dense.pt", "--out", "found"], _cells("found/cells/*")
        ),
        Subject("reproduce", 7, lambda _: ["reproduce", "tiny.yaml", "--out", "found"], _cells("found/cells/*")),
        Subject("export", 7, lambda _: ["export", "small.pt", *_TASK, "--out", "net.onnx"], _exported),
    )
}
