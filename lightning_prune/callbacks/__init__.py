"""Callbacks that decide when to score, mask and reconstruct; the work is done by plain functions."""

from lightning_prune.callbacks.bn_sparsity import BNSparsity
from lightning_prune.callbacks.distillation import DistillationCallback
from lightning_prune.callbacks.masking import MaskingCallback
from lightning_prune.callbacks.prune import PruneCallback
from lightning_prune.callbacks.random_state import KeepRandomState
from lightning_prune.callbacks.reconstruction import ReconstructionCallback
from lightning_prune.callbacks.scoring import ScoringCallback
from lightning_prune.callbacks.timing import EpochTimer
from lightning_prune.callbacks.tracking import TrackingCallback

__all__ = [
    "BNSparsity",
    "DistillationCallback",
    "EpochTimer",
    "KeepRandomState",
    "MaskingCallback",
    "PruneCallback",
    "ReconstructionCallback",
    "ScoringCallback",
    "TrackingCallback",
]
