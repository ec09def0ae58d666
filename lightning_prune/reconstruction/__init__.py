"""From a plan to a small model: masks, cutting, the comparison that proves it lossless, and files.

Here: what carries a plan out. Not here: choosing it (selection/), what any model's tensors allow (model_state/).
"""

from lightning_prune.reconstruction.blocks import Block, block_plan, residual_blocks
from lightning_prune.reconstruction.channel_map import ChannelMap, LayerChannels, OldChannels
from lightning_prune.reconstruction.checkpoint import PrunedCheckpoints, load, load_dense, save
from lightning_prune.reconstruction.depth import choose_blocks, drop_blocks_
from lightning_prune.reconstruction.dropped_blocks import DroppedBlock
from lightning_prune.reconstruction.lossless import LosslessReport, check_lossless
from lightning_prune.reconstruction.mask_tensors import masks_of, plan_from_masks, plan_from_zeros
from lightning_prune.reconstruction.masks import MaskHandle, mask_
from lightning_prune.reconstruction.small_model import reconstruct, reconstruct_

__all__ = [
    "Block",
    "ChannelMap",
    "DroppedBlock",
    "LayerChannels",
    "LosslessReport",
    "MaskHandle",
    "OldChannels",
    "PrunedCheckpoints",
    "block_plan",
    "check_lossless",
    "choose_blocks",
    "drop_blocks_",
    "load",
    "load_dense",
    "mask_",
    "masks_of",
    "plan_from_masks",
    "plan_from_zeros",
    "reconstruct",
    "reconstruct_",
    "residual_blocks",
    "save",
]
