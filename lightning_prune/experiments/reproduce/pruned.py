"""Cells of tables of pruned models: prune, fine-tune and reconstruct in either order, test; time, if asked for."""

from __future__ import annotations

import time
from dataclasses import replace
from statistics import median
from typing import Literal

from pytorch_lightning import LightningModule, seed_everything

from lightning_prune.callbacks import PruneCallback
from lightning_prune.experiments.reproduce.building import prune_callback, selection
from lightning_prune.experiments.reproduce.cells import Cell, DenseModel, Study, Trained
from lightning_prune.experiments.reproduce.recipe import Row
from lightning_prune.measure import compare_latency
from lightning_prune.plan import Coupling
from lightning_prune.reconstruction.small_model import reconstruct

WHEN: dict[str, Literal["after", "before"]] = {"A": "after", "B": "before"}
#: What the masked model of a `masked` cell is reconstructed to: columns and couplings.
RECONSTRUCTIONS: dict[str, Coupling] = {"or": "union", "and": "intersection"}


def pruned(study: Study, row: Row, seed: int) -> Cell:
    """A row of Lee et al.'s Tables 2 to 4 and 6, Figures 5 and 6, and of Li et al.'s tables."""
    dense = study.dense(row.model, seed)
    if row.dense:
        return dense_row(study, row, dense, seed)
    started = time.perf_counter()
    how = study.pruning(row)
    prune = prune_callback(how, seed, WHEN[how.order], study.where)
    task, (curve, earlier) = _tuned(study, row, dense, seed, prune)
    values, more = study.measured(task, dense.cell)
    values |= _latency(study, row, dense, task)
    values["time"], values["epoch"] = curve[-1]["elapsed_seconds"], median(one["train_seconds"] for one in curve)
    if prune.reconstruction is not None and prune.reconstruction.lossless is not None:
        more["lossless"] = prune.reconstruction.lossless.max_rel_error
    return Cell(row.label, seed, values, curve, more, time.perf_counter() - started + earlier)


def masked(study: Study, row: Row, seed: int) -> Cell:
    """A row of Lee et al.'s Tables 7 and 8: one fine-tuned masked model, tested, and reconstructed in two ways."""
    dense = study.dense(row.model, seed)
    started = time.perf_counter()
    how = study.pruning(row)
    prune = prune_callback(how, seed, "never", study.where)
    task, (curve, earlier) = _tuned(study, row, dense, seed, prune)
    values = {"dense": dense.cell.values[study.metric], "finetuned": study.reached(task)[study.metric]}
    graph, scores = prune.scoring.dense_graph, prune.scoring.scores
    assert graph is not None
    assert scores is not None
    chosen = selection(how, study.where)
    for column, coupling in RECONSTRUCTIONS.items():
        if column in study.recipe.columns:
            plan = chosen.select(graph, scores, coupling=coupling, batch_norm=how.batch_norm)
            found, _ = study.measured(reconstruct(task, graph, plan), dense.cell)
            values |= {column: found[study.metric], f"{column}_left": found["left"]}
    return Cell(row.label, seed, values, curve, {}, time.perf_counter() - started + earlier)


def dense_row(study: Study, row: Row, dense: DenseModel, seed: int) -> Cell:
    """The dense model in the table of the others."""
    values = {**dense.cell.values, "left": 100.0, "params_left": 100.0}
    if "latency" in study.recipe.columns:
        task = study.task(row.model, "dense", dense.weights)
        values["latency"] = _times(study, {"dense": task})["dense"]
    return replace(dense.cell, row=row.label, seed=seed, values=values)


def _tuned(
    study: Study, row: Row, dense: DenseModel, seed: int, prune: PruneCallback
) -> tuple[LightningModule, Trained]:
    """The dense model, pruned and fine-tuned."""
    seed_everything(seed, verbose=False)
    task = study.task(row.model, "tune", dense.weights)
    seed_everything(seed + 1, verbose=False)  # all rows see the same batches
    return task, study.fit(task, "tune", study.row_path(row, seed), [prune])


def _latency(study: Study, row: Row, dense: DenseModel, task: LightningModule) -> dict[str, float]:
    """Milliseconds of one image, in turns with the dense model."""
    if "latency" not in study.recipe.columns:
        return {}
    found = _times(study, {"dense": study.task(row.model, "dense", dense.weights), "pruned": task})
    return {"latency": found["pruned"], "faster": found["dense"] / found["pruned"]}


def _times(study: Study, models: dict[str, LightningModule]) -> dict[str, float]:
    options = study.scale.options
    pairs = {name: (model, model.example_input_array[:1]) for name, model in models.items()}  # type: ignore[index]
    found = compare_latency(pairs, engine=options.get("engine", "eager"), repeats=options.get("repeats", 50))
    return {name: latency.median for name, latency in found.items()}
