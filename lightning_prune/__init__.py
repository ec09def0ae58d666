"""Channel pruning for PyTorch Lightning: score, mask, and reconstruct a smaller model without loss.

Example:
    >>> import torch, lightning_prune as lp
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 1))
    >>> lp.prune(model, torch.randn(1, 3, 8, 8), criterion="l1", ratio=0.5).model[0].out_channels
    4
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_prune.callbacks import (
        BNSparsity,
        DistillationCallback,
        EpochTimer,
        KeepRandomState,
        MaskingCallback,
        PruneCallback,
        ReconstructionCallback,
        ScoringCallback,
        TrackingCallback,
    )
    from lightning_prune.checkpoint import PrunedCheckpoints, load, save
    from lightning_prune.comparison import Comparison, compare_criteria
    from lightning_prune.compensation import fold_constants_, least_squares_, recalibrate_bn_
    from lightning_prune.criteria import (
        DCP,
        FPGM,
        GRE,
        JRE,
        L1,
        L2,
        LRE,
        APoZ,
        BNScale,
        Criterion,
        NextLayerTaylor,
        Random,
        Taylor,
        TaylorFO,
        ThiNet,
        add_bn_sparsity_,
    )
    from lightning_prune.equivalence import LosslessReport, check_lossless
    from lightning_prune.errors import PruningError
    from lightning_prune.explanation import Explanation, explain
    from lightning_prune.exporting import ExportReport, export
    from lightning_prune.graph import ChannelGraph, Group, Layer, trace
    from lightning_prune.layer_findings import explain_speed
    from lightning_prune.layer_timing import measure_machine, time_layers
    from lightning_prune.masking import MaskHandle, mask_
    from lightning_prune.measurement import compare_latency, count_flops, count_params, measure
    from lightning_prune.pipeline import PruneResult, prune
    from lightning_prune.plan import GroupPlan, Plan
    from lightning_prune.reconstruction import reconstruct, reconstruct_
    from lightning_prune.schedule import Gradual, Rounds, Schedule, Soft, keep_removed
    from lightning_prune.scoring import Scorer, Scores, score
    from lightning_prune.selection import Budget, ChannelsPerRound, GlobalRatio, LayerRatio, Selection
    from lightning_prune.thinet_rescaling import Rescaling, rescale_

__version__ = "0.1.0"

_HOMES = {
    "callbacks": "BNSparsity DistillationCallback EpochTimer KeepRandomState MaskingCallback PruneCallback "
    "ReconstructionCallback ScoringCallback TrackingCallback",
    "checkpoint": "PrunedCheckpoints load save",
    "comparison": "Comparison compare_criteria",
    "compensation": "fold_constants_ least_squares_ recalibrate_bn_",
    "criteria": "DCP FPGM GRE JRE L1 L2 LRE APoZ BNScale Criterion NextLayerTaylor Random Taylor TaylorFO "
    "ThiNet add_bn_sparsity_",
    "equivalence": "LosslessReport check_lossless",
    "errors": "PruningError",
    "explanation": "Explanation explain",
    "exporting": "ExportReport export",
    "graph": "ChannelGraph Group Layer trace",
    "layer_findings": "explain_speed",
    "layer_timing": "measure_machine time_layers",
    "masking": "MaskHandle mask_",
    "measurement": "compare_latency count_flops count_params measure",
    "pipeline": "PruneResult prune",
    "plan": "GroupPlan Plan",
    "reconstruction": "reconstruct reconstruct_",
    "schedule": "Gradual Rounds Schedule Soft keep_removed",
    "scoring": "Scorer Scores score",
    "selection": "Budget ChannelsPerRound GlobalRatio LayerRatio Selection",
    "thinet_rescaling": "Rescaling rescale_",
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = [
    "DCP",
    "FPGM",
    "GRE",
    "JRE",
    "L1",
    "L2",
    "LRE",
    "APoZ",
    "BNScale",
    "BNSparsity",
    "Budget",
    "ChannelGraph",
    "ChannelsPerRound",
    "Comparison",
    "Criterion",
    "DistillationCallback",
    "EpochTimer",
    "Explanation",
    "ExportReport",
    "GlobalRatio",
    "Gradual",
    "Group",
    "GroupPlan",
    "KeepRandomState",
    "Layer",
    "LayerRatio",
    "LosslessReport",
    "MaskHandle",
    "MaskingCallback",
    "NextLayerTaylor",
    "Plan",
    "PruneCallback",
    "PruneResult",
    "PrunedCheckpoints",
    "PruningError",
    "Random",
    "ReconstructionCallback",
    "Rescaling",
    "Rounds",
    "Schedule",
    "Scorer",
    "Scores",
    "ScoringCallback",
    "Selection",
    "Soft",
    "Taylor",
    "TaylorFO",
    "ThiNet",
    "TrackingCallback",
    "add_bn_sparsity_",
    "check_lossless",
    "compare_criteria",
    "compare_latency",
    "count_flops",
    "count_params",
    "explain",
    "explain_speed",
    "export",
    "fold_constants_",
    "keep_removed",
    "least_squares_",
    "load",
    "mask_",
    "measure",
    "measure_machine",
    "prune",
    "recalibrate_bn_",
    "reconstruct",
    "reconstruct_",
    "rescale_",
    "save",
    "score",
    "time_layers",
    "trace",
]


def __getattr__(name: str) -> Any:
    """Import on first use: `lightning-prune --help` and the plain functions should not wait for Lightning."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
