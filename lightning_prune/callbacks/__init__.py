"""Callbacks that decide when to score, mask and reconstruct; the work is done by plain functions."""

from lightning_prune.callbacks.bn_sparsity import BNSparsityCallback
from lightning_prune.callbacks.distillation import DistillationCallback
from lightning_prune.callbacks.group_sparsity import GroupSparsityCallback
from lightning_prune.callbacks.masking import MaskingCallback
from lightning_prune.callbacks.prune import PruneCallback
from lightning_prune.callbacks.random_state import RandomStateCallback
from lightning_prune.callbacks.reconstruction import ReconstructionCallback
from lightning_prune.callbacks.scoring import ScoringCallback
from lightning_prune.callbacks.small_checkpoints import SmallCheckpointCallback
from lightning_prune.callbacks.timing import EpochTimerCallback
from lightning_prune.callbacks.tracking import TrackingCallback

__all__ = [
    "BNSparsityCallback",
    "DistillationCallback",
    "EpochTimerCallback",
    "GroupSparsityCallback",
    "MaskingCallback",
    "PruneCallback",
    "RandomStateCallback",
    "ReconstructionCallback",
    "ScoringCallback",
    "SmallCheckpointCallback",
    "TrackingCallback",
]
