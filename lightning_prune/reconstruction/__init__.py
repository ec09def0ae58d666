"""From a plan to a small model: masks, cutting, the comparison that proves it lossless, and files.

Here: what carries a plan out. Not here: choosing it (selection/), what any model's tensors allow (model_state/).
"""

from lightning_prune.reconstruction.channel_map import ChannelMap, LayerChannels, OldChannels
from lightning_prune.reconstruction.checkpoint import PrunedCheckpoints, load, load_dense, save
from lightning_prune.reconstruction.lossless import LosslessReport, check_lossless
from lightning_prune.reconstruction.mask_tensors import masks_of, plan_from_masks, plan_from_zeros
from lightning_prune.reconstruction.masks import MaskHandle, mask_
from lightning_prune.reconstruction.small_model import reconstruct, reconstruct_

__all__ = [
    "ChannelMap",
    "LayerChannels",
    "LosslessReport",
    "MaskHandle",
    "OldChannels",
    "PrunedCheckpoints",
    "check_lossless",
    "load",
    "load_dense",
    "mask_",
    "masks_of",
    "plan_from_masks",
    "plan_from_zeros",
    "reconstruct",
    "reconstruct_",
    "save",
]
