"""torchvision's video classifiers and optical flow."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from benchmarks.zoo.users.model import Model, Size, images

VIDEO = "r3d_18 mc3_18 r2plus1d_18"
SWIN = "swin3d_t swin3d_s"
FLOW = "raft_small raft_large"


def _build(name: str) -> nn.Module:
    from torchvision.models import get_model

    return get_model(name, weights=None, num_classes=10) if name not in FLOW.split() else get_model(name, weights=None)


def _two_images(batch: int, size: Size) -> tuple[Any, ...]:
    return images(batch, size), images(batch, size).flip(0, 3), 2  # two updates of the flow


MODELS = {
    **{name: Model(partial(_build, name), name, "cnn", ((8, 32, 32), (12, 48, 32))) for name in VIDEO.split()},
    **{
        name: Model(partial(_build, name), "swin3d", "transformer", ((4, 32, 32), (6, 64, 32))) for name in SWIN.split()
    },
    "s3d": Model(partial(_build, "s3d"), "s3d", "cnn", ((16, 224, 224),)),  # its pooling insists
    "mvit_v2_s": Model(partial(_build, "mvit_v2_s"), "mvit", "transformer", ((16, 224, 224),)),
    **{
        name: Model(partial(_build, name), "raft", "cnn", ((128, 128), (160, 128)), _two_images)
        for name in FLOW.split()
    },
}
