"""Cells of Lee et al.'s Table 5: YOLOv3 as published and pruned to the published FLOPs, timed on this machine."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from lightning_prune.criteria import Random, score
from lightning_prune.experiments.reproduce.building import built
from lightning_prune.experiments.reproduce.cells import Cell, Study
from lightning_prune.experiments.reproduce.recipe import Pruning, Row
from lightning_prune.graph import trace
from lightning_prune.measure import compare_latency, count_flops, count_params
from lightning_prune.model_state.copying import copied
from lightning_prune.reconstruction.small_model import reconstruct
from lightning_prune.selection import LayerRatio

TRACED = 64  # pixels: channels do not depend on them
HALVINGS = 12  # until the share of channels is known to 0.03 %


def timed(study: Study, row: Row, seed: int) -> Cell:
    """Latency depends on widths alone, so nothing is trained; each model takes turns with that of the first row."""
    started = time.perf_counter()
    recipe, options = study.recipe, study.scale.options
    torch.manual_seed(seed)
    size = list(options.get("input_size", recipe.input_size))
    images = torch.rand(1, *size)
    first = recipe.rows[0].model
    dense: nn.Module = built(nn.Module, study.model_spec(first), f"{study.where}, {first}").eval()
    models: dict[str, nn.Module] = {"first": dense}
    values: dict[str, float] = {}
    if row.model != first:
        models["other"] = built(nn.Module, study.model_spec(row.model), f"{study.where}, {row.model}").eval()
    elif not row.dense:
        wanted = recipe.published(row)["left"] / 100
        small, ratio = pruned_to(dense, images, wanted, study.pruning(row), seed)
        models["other"], values["removed"] = small, 100 * ratio
    name, model = list(models.items())[-1]
    flops = count_flops(model, images, "paper")
    values |= {"flops": flops, "params": count_params(model), "left": 100 * flops / count_flops(dense, images, "paper")}
    for engine in options.get("engines", ["eager"]):
        pairs = {of: (net, images) for of, net in models.items()}
        found = compare_latency(pairs, engine=engine, repeats=options.get("repeats", 5))
        milliseconds = found[name].median
        values |= {engine: milliseconds / 1000, f"{engine}_faster": found["first"].median / milliseconds}
    return Cell(row.label, seed, values, seconds=time.perf_counter() - started)


def pruned_to(dense: nn.Module, images: Tensor, share: float, how: Pruning, seed: int) -> tuple[nn.Module, float]:
    """A model with a share of the FLOPs, the same share removed from all layers; and that share."""
    graph = trace(dense, torch.rand(1, 3, TRACED, TRACED))
    scores = score(dense, graph, Random(seed=seed))
    empty, blank = torch.empty(images.shape, device="meta"), copied(dense).to("meta")
    ignore = how.selection.get("init_args", {}).get("ignore", ())
    total = count_flops(blank, empty, "paper")
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        plan = LayerRatio(middle, ignore=ignore).select(graph, scores)
        left = count_flops(reconstruct(blank, graph, plan), empty, "paper") / total
        low, high = (middle, high) if left > share else (low, middle)
    return reconstruct(dense, graph, LayerRatio(high, ignore=ignore).select(graph, scores)), high
