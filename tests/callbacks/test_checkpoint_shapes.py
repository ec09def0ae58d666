"""Back to the dense shapes, for a checkpoint from before the cut."""

from __future__ import annotations

import torch
from torch import nn

from lightning_prune.callbacks.checkpoint_shapes import CheckpointShapes
from lightning_prune.model_state.cutting import Cut, cut_, update_attributes_


def test_a_channels_last_module_grows_back_as_one() -> None:
    module = nn.Sequential(nn.Conv2d(6, 8, 3)).to(memory_format=torch.channels_last)
    strides, shapes = module[0].weight.stride(), CheckpointShapes()
    shapes.remember(module)
    cut_(module, [Cut("0.weight", 0, torch.tensor([1, 4])), Cut("0.bias", 0, torch.tensor([1, 4]))])
    update_attributes_(module)
    shapes._grow(module)
    assert module[0].weight.shape == (8, 6, 3, 3)
    assert module[0].out_channels == len(module[0].bias) == 8
    assert module[0].weight.stride() == strides
