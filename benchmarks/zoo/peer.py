"""Torch-Pruning beside the library: does it handle the model, and how long does each take, in turns.

"Handles" is lenient: after pruning half of every layer, some parameter is gone and the model's forward runs on the
example inputs. What it computes is not compared with anything, since Torch-Pruning promises nothing about it.
"""

from __future__ import annotations

import copy
import functools
import gc
import time
from collections.abc import Callable
from contextlib import suppress
from statistics import median
from typing import Any, TypeVar

import torch
from torch import nn

import lightning_prune as lp
from benchmarks.zoo.families import Entry
from benchmarks.zoo.models import CLASSES, Case, outputs, told, train_step

T = TypeVar("T")
#: Output layers of detectors, and what Torch-Pruning's own benchmark over torchvision leaves out for Faster R-CNN.
OUTPUTS = ("cls_logits", "bbox_pred", "bbox_reg", "bbox_ctrness", "cls_score", "mask_fcn_logits", "kps_score_lowres")


def compare(case: Case, entry: Entry, ratio: float, repeats: int) -> dict[str, Any]:
    """Outcome and seconds of Torch-Pruning; seconds of this library for the same work, on copies of one model.

    Medians of seconds of the processor, on which the benchmarks run one thread: what else runs does not count.
    """
    model, inputs = case.model, case.inputs
    mine: list[dict[str, float]] = []
    theirs: list[float] = []
    result: dict[str, Any] = {}
    for _ in range(repeats):
        with suppress(Exception):  # the row says why
            mine.append(ours(copy.deepcopy(model), inputs, ratio))
        pruned = copy.deepcopy(model)
        gc.collect()
        start = time.process_time()
        try:
            _theirs(pruned, entry, inputs, ratio)
        except Exception as error:  # noqa: BLE001 - any failure is a result
            result["outcome"] = f"error: {told(error)}"
            break
        theirs.append(time.process_time() - start)
    result["ours_seconds"] = None
    if mine:
        result["ours_seconds"] = median(sum(stages.values()) for stages in mine)
        result["ours_stages"] = medians(mine)
    if "outcome" not in result:
        result |= {"seconds": median(theirs), "params_after": lp.measure.count_params(pruned, trainable=False)}
        result |= _outcome(model, pruned, case)
    return result


def ours(model: nn.Module, inputs: Any, ratio: float) -> dict[str, float]:
    """Seconds of trace, score, select and reconstruct."""
    stages = Stages()
    graph = stages.timed("trace", lambda: lp.trace(model, inputs))
    scores = stages.timed("score", lambda: lp.score(model, graph, lp.L1()))
    plan = stages.timed("select", lambda: lp.LayerRatio(ratio).select(graph, scores))
    stages.timed("reconstruct", lambda: lp.reconstruct(model, graph, plan))
    return stages.seconds


class Stages:
    """Seconds of the processor by the name of what was done."""

    def __init__(self) -> None:
        gc.collect()  # what was done before is nobody's work here
        self.seconds: dict[str, float] = {}

    def timed(self, name: str, function: Callable[[], T]) -> T:
        """The function's value."""
        start = time.process_time()
        value = function()
        self.seconds[name] = time.process_time() - start
        return value


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Of every stage."""
    return {name: round(median(stages[name] for stages in rounds), 4) for name in rounds[0]}


def _theirs(model: nn.Module, entry: Entry, inputs: Any, ratio: float) -> None:
    import torch_pruning as tp

    model.eval()
    pruner = tp.pruner.BasePruner(
        model,
        example_inputs=inputs,
        importance=tp.importance.MagnitudeImportance(p=1),
        pruning_ratio=ratio,
        ignored_layers=ignored_layers(model, entry),
        # The mutable defaults of the signature are shared between pruners.
        in_channel_groups={},
        out_channel_groups={},
        num_heads={},
        channel_groups={},
        round_to=_heads(model),
    )
    pruner.step()
    if _heads(model) and hasattr(model, "conv_proj"):  # torchvision's ViT: as in the peer's own benchmark
        model.hidden_dim = model.conv_proj.out_channels


def ignored_layers(model: nn.Module, entry: Entry) -> list[nn.Module]:
    """Output layers, and what the peer's own benchmark leaves out."""
    if entry.suite == "detection":
        found = [m for name, m in model.named_modules() if name.rpartition(".")[2] in OUTPUTS]
        if "rcnn" in entry.name:
            return [*found, model.backbone.fpn, model.roi_heads]
        return [model.head] if entry.name.startswith("ssd") else found
    classes = CLASSES[entry.suite]
    attention = nn.modules.linear.NonDynamicallyQuantizableLinear
    return [
        module
        for module in model.modules()
        if getattr(module, "out_features", None) == classes
        or getattr(module, "out_channels", None) == classes
        or isinstance(module, attention)
    ]


def _heads(model: nn.Module) -> int | None:
    """Number of attention heads of torchvision's ViT."""
    attention = next((m for m in model.modules() if isinstance(m, nn.MultiheadAttention)), None)
    return attention.num_heads if attention is not None else None


def _outcome(model: nn.Module, pruned: nn.Module, case: Case) -> dict[str, Any]:
    if lp.measure.count_params(pruned, trainable=False) >= lp.measure.count_params(model, trainable=False):
        return {"outcome": "removes nothing"}
    try:
        outputs(pruned, case.inputs)
    except Exception as error:  # noqa: BLE001
        return {"outcome": f"forward fails: {told(error)}"}
    try:
        trained: bool | str | None = train_step(pruned, case.inputs) if case.trains else None
    except Exception as error:  # noqa: BLE001
        trained = told(error)
    return {"outcome": "handles", "train_step": trained}


@functools.cache
def warm_up(*, peer: bool) -> None:
    """One run of each on a tiny model: imports and caches are nobody's work."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU())
    model.append(nn.Conv2d(6, CLASSES["segmentation"], 1))
    images = torch.randn(1, 3, 16, 16)
    ours(copy.deepcopy(model), images, 0.5)
    if peer:
        _theirs(copy.deepcopy(model), Entry("segmentation", "tiny", "tiny", "cnn"), images, 0.5)
