"""Published FLOPs, parameters and latency that follow from the architecture alone: counted and timed untrained."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from lightning_prune.criteria import Random, score
from lightning_prune.experiments.comparison.cells import Spread, named_path, read_kept, write_kept
from lightning_prune.experiments.reproduce.building import built, selection
from lightning_prune.experiments.reproduce.cells import Cell, machine
from lightning_prune.experiments.reproduce.recipe import Recipe, Row
from lightning_prune.graph import ChannelGraph, trace
from lightning_prune.measure import compare_latency, count_flops, count_params
from lightning_prune.model_state.copying import copied
from lightning_prune.reconstruction.small_model import reconstruct

DRAWS = 10  # of random masks: one of ResNet-34 scatters by 0.5 %
REPEATS = 40  # passes timed
TRACED = 64  # pixels at most: channels do not depend on them


def countable(recipe: Recipe) -> list[Row]:
    """Rows whose published costs need no training: dense models, and channels chosen at random."""
    return [row for row in recipe.rows if "flops" in row.published and (row.dense or recipe.pruning(row).random)]


def count_published(recipe: Recipe, output: Path) -> list[Cell]:
    """A cell for each of these rows, ``flops`` and ``params`` in the recipe's units; kept like all cells.

    Where the recipe has a column of latency, also milliseconds of one image, all rows of a model in turns.
    """
    found: list[Cell] = []
    for model in dict.fromkeys(row.model for row in countable(recipe)):
        rows = [row for row in countable(recipe) if row.model == model]
        settings = [(row.label, repr(recipe.pruning(row))) for row in rows]
        depends = {"model": recipe.models[model], "rows": settings, "size": list(recipe.input_size), "draws": DRAWS}
        depends["timed"] = _timed(recipe)
        paths = {row.label: named_path(output, f"costs-{row.label}", depends) for row in rows}
        kept = [read_kept(path, Cell) for path in paths.values()]
        cells = [cell for cell in kept if cell is not None]
        if len(cells) < len(rows):
            cells = _counted(recipe, model, rows)
            for cell in cells:
                write_kept(paths[cell.row], cell, machine())
        found += cells
    return found


def _counted(recipe: Recipe, model: str, rows: list[Row]) -> list[Cell]:
    where = f"recipe {recipe.name}, {model}"
    channels, *sides = recipe.input_size
    torch.manual_seed(0)
    dense: nn.Module = built(nn.Module, _untrained(recipe.models[model]), where).eval()
    pruned = [row for row in rows if not row.dense]
    traced = torch.zeros(1, channels, *(min(side, TRACED) for side in sides))
    graph = trace(dense, traced) if pruned else None
    scores = [score(dense, graph, Random(seed=seed)) for seed in range(DRAWS)] if graph is not None else []
    blank, images = copied(dense).to("meta"), torch.empty(1, *recipe.input_size, device="meta")
    nets_by_row: dict[str, nn.Module] = {}
    cells = []
    for row in rows:
        started = time.perf_counter()
        if row.dense:
            nets, nets_by_row[row.label] = [blank], dense
        else:
            assert isinstance(graph, ChannelGraph)
            how = recipe.pruning(row)
            chosen = selection(how, where)
            plans = [chosen.select(graph, values, coupling=how.coupling) for values in scores]
            nets = [reconstruct(blank, graph, plan) for plan in plans]
            if _timed(recipe):
                nets_by_row[row.label] = reconstruct(dense, graph, plans[0])
        costs = {
            "flops": Spread.of(count_flops(net, images, "paper") for net in nets),
            "params": Spread.of(count_params(net) for net in nets),
        }
        units = {key: {"M": 1e6, "G": 1e9}[recipe.units[key]] for key in costs}
        values = {key: spread.mean / units[key] for key, spread in costs.items()}
        values |= {f"{key}_spread": (spread.deviation or 0.0) / units[key] for key, spread in costs.items()}
        cells.append(Cell(row.label, 0, values, seconds=time.perf_counter() - started))
    if not _timed(recipe):
        return cells
    example = torch.rand(1, *recipe.input_size)
    latency = compare_latency({label: (net, example) for label, net in nets_by_row.items()}, repeats=REPEATS)
    return [replace(cell, values={**cell.values, "latency": latency[cell.row].median}) for cell in cells]


def _timed(recipe: Recipe) -> bool:
    return "latency" in recipe.columns


def _untrained(spec: object) -> object:
    """The same architecture without weights to download."""
    if isinstance(spec, dict) and "weights" in spec.get("init_args", {}):
        return {**spec, "init_args": {**spec["init_args"], "weights": None}}
    return spec
