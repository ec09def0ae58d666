"""The cell of Li et al.'s Figure 2: maps of one convolution that are removed, and maps that are kept."""

from __future__ import annotations

import time
from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor

from lightning_prune.criteria import GRE, LRE, Scores
from lightning_prune.errors import PruningError
from lightning_prune.experiments.reproduce.building import criterion, selection
from lightning_prune.experiments.reproduce.cells import Cell, Study
from lightning_prune.experiments.reproduce.recipe import Row

SHOWN = 3  # of either kind


def feature_maps(study: Study, row: Row, seed: int) -> Cell:
    """Choose among all channels of the network, and look at one layer: its weakest removed and strongest kept maps."""
    started = time.perf_counter()
    layer = study.scale.options["layer"]
    dense = study.dense(row.model, seed)
    how = study.pruning(row)
    task = study.task(row.model, "dense", dense.weights)
    named = {
        "score": criterion(how, seed, study.where),
        "local": LRE(normalize="none"),
        "global": GRE(normalize="none"),
    }
    found: dict[str, Scores] = {}
    for name, one in named.items():
        graph, found[name] = study.runner.score(task, one, batches=how.score_batches, seed=seed)
    plan = selection(how, study.where).select(graph, found["score"], coupling=how.coupling)
    group = next((g.name for g in graph.groups if any(of.name == layer for of in g.layers)), None)
    if group is None:
        raise PruningError(f"{study.where}: no group has a layer {layer!r}; layers: {', '.join(_layers(graph))}")
    scores = found["score"][group]
    kept = set(plan.groups[group].keep)
    ranked = scores.argsort().tolist()
    removed = [channel for channel in ranked if channel not in kept]
    strongest = [channel for channel in reversed(ranked) if channel in kept]
    if not removed or not strongest:
        raise PruningError(f"{layer!r} keeps {len(kept)} of {len(ranked)} channels: there is nothing to show")
    image, maps = _maps(study, task, layer)
    energy = maps.square().sum((1, 2))
    shown = [(channel, fate) for fate, of in (("removed", removed), ("kept", strongest)) for channel in of[:SHOWN]]
    more = {
        "image": _rounded(image),
        "maps": [
            {"channel": channel, "fate": fate, "map": _rounded(maps[channel])}
            | {name: float(of[group][channel]) for name, of in found.items()}
            for channel, fate in shown
        ],
    }
    values = {
        "removed": 100 * len(removed) / len(ranked),
        "energy_removed": 100 * float(energy[removed].mean() / energy.mean()),
        "energy_kept": 100 * float(energy[strongest].mean() / energy.mean()),
        "shown_removed": 100 * float(energy[removed[:SHOWN]].mean() / energy.mean()),
        "shown_kept": 100 * float(energy[strongest[:SHOWN]].mean() / energy.mean()),
    }
    return Cell(row.label, seed, values, [], more, time.perf_counter() - started)


def _maps(study: Study, task: LightningModule, layer: str) -> tuple[Tensor, Tensor]:
    """One test image (C, H, W) from 0 to 1, and what the layer makes of it (channels, H, W)."""
    study.data.setup("test")
    images = next(iter(study.data.test_dataloader()))[0][:1]
    seen: list[Tensor] = []
    handle = task.get_submodule(layer).register_forward_hook(lambda *hooked: seen.append(hooked[-1]))
    try:
        with torch.no_grad():
            task.eval()(images)
    finally:
        handle.remove()
    image = images[0]
    return (image - image.min()) / (image.max() - image.min()), seen[0][0]


def _rounded(values: Tensor) -> Any:
    """As nested lists of four digits."""
    return torch.round(values.double(), decimals=4).tolist()


def _layers(graph: Any) -> list[str]:
    return [layer.name for group in graph.prunable_groups for layer in group.layers]
