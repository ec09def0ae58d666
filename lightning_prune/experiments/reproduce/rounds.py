"""Cells of Guo et al.'s curve: a few channels at a time, tested right after every removal and after fine-tuning."""

from __future__ import annotations

import itertools
import time
from statistics import fmean
from typing import Any

import torch
from pytorch_lightning import seed_everything
from torch import nn

from lightning_prune.experiments.reproduce.building import criterion, schedule, selection
from lightning_prune.experiments.reproduce.cells import Cell, Study, partial_path
from lightning_prune.experiments.reproduce.pruned import dense_row
from lightning_prune.experiments.reproduce.recipe import Row
from lightning_prune.files import atomic
from lightning_prune.session import PruningSession
from lightning_prune.tasks import Task
from lightning_prune.tensor_files import read_tensors

SHARES = (67, 50, 33, 25, 17, 12, 8)  # per cent of channels left at which the paper's curve is read off
NEAR = 2.0  # points that a round may lie beside one of them


def rounds(study: Study, row: Row, seed: int) -> Cell:
    """One criterion from the dense network down to the last channels."""
    dense = study.dense(row.model, seed)
    if row.dense:
        return dense_row(study, row, dense, seed)
    started = time.perf_counter()
    how, path = study.pruning(row), study.row_path(row, seed)
    kept = partial_path(path)
    task = study.task(row.model, "tune", dense.weights)
    total, pairs = _channels(task), _pairs(task)
    session = PruningSession(
        task,
        task.example_input_array,
        criterion=criterion(how, seed, study.where),
        selection=selection(how, study.where),
        schedule=schedule(how, study.where),
        coupling=how.coupling,
    )
    found: list[dict[str, Any]] = []
    if kept.is_file():  # a process before this one was killed
        state = read_tensors(kept)
        session.load_state_dict(state["session"])
        task.load_state_dict(state["task"])
        found, started = state["found"], started - state["seconds"]
    while not session.done:
        seed_everything(seed + 1 + 1000 * len(found), verbose=False)
        reached = found[-1]["after"] if found else dense.cell.values[study.metric]
        batches = itertools.islice(study.data.train_dataloader(), how.score_batches)
        step = session.step(batches, _loss, reconstruct=True)
        before = study.reached(task)[study.metric]
        study.trainer("tune").fit(task, max(step.epochs, 1), max_steps=-1 if step.epochs else step.batches)
        after = study.reached(task)[study.metric]
        left = _channels(task)
        found.append(
            {
                "left": left,
                "share": 100 * left / total,
                "rate": _pairs(task) / pairs,
                "epochs": step.epochs,
                "before": before,
                "after": after,
                "drop": reached - before,
            }
        )
        state = {"session": session.state_dict(), "task": task.state_dict(), "found": found}
        with atomic(kept) as stream:
            torch.save({**state, "seconds": time.perf_counter() - started}, stream)
        study.tell(path, found[-1])
    values = {"drop": fmean(one["drop"] for one in found), "channels": float(found[-1]["left"])}
    for share in SHARES:
        nearest = min(found, key=lambda one: abs(one["share"] - share))
        if abs(nearest["share"] - share) <= NEAR:
            values[f"at_{share}"] = nearest["after"]
    return Cell(row.label, seed, values, [], {"rounds": found}, time.perf_counter() - started)


def _loss(task: nn.Module, batch: Any) -> Any:
    assert isinstance(task, Task)
    return task.loss(batch)


def _channels(task: nn.Module) -> int:
    """Filters of all convolutions."""
    return sum(conv.out_channels for conv in _convolutions(task))


def _pairs(task: nn.Module) -> int:
    """What Guo et al.'s code calls compress rate is of: channels in times channels out of all convolutions."""
    return sum(conv.in_channels * conv.out_channels for conv in _convolutions(task))


def _convolutions(task: nn.Module) -> list[nn.Conv2d]:
    return [module for module in task.modules() if isinstance(module, nn.Conv2d)]
