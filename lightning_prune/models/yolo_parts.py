"""What YOLOv3 and YOLOv3-tiny share: convolution units, detection branches, and the grid that predictions lie on."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune.models.darknet_weights import Convolution, load_darknet_weights

Anchors = tuple[tuple[float, float], ...]
BOXES_PER_CELL = 3


class ConvUnit(nn.Sequential):
    """Convolution without bias, batch norm, LeakyReLU 0.1: darknet's ``[convolutional]``."""

    conv: nn.Conv2d
    norm: nn.BatchNorm2d

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.add_module("conv", nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False))
        self.add_module("norm", nn.BatchNorm2d(outputs))
        self.add_module("act", nn.LeakyReLU(0.1, inplace=True))


class Branch(nn.Module):
    """A body that narrows, a 3x3 that widens, the 1x1 that predicts; returns the raw map and the body's output."""

    def __init__(self, body: nn.Module, expand: ConvUnit, outputs: int) -> None:
        super().__init__()
        self.body = body
        self.expand = expand
        self.predict = nn.Conv2d(expand.conv.out_channels, outputs, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.body(x)
        return self.predict(self.expand(x)), x


class YoloNetwork(nn.Module, ABC):
    """A one-stage detector whose forward returns the raw maps of its heads, coarse to fine.

    A map is (N, 3 (5 + classes), H / stride, W / stride); channel ``anchor (5 + classes) + entry`` holds tx, ty, tw,
    th, objectness and class logits. `lightning_prune.models.yolo_boxes.decode` turns them into boxes.

    Shapes: images (N, 3, H, W), sides multiples of 32.

    Args:
        num_classes: without background; 80 for COCO, 20 for Pascal VOC.
        width: factor on all channel counts, for small demonstrations; 1 is the published network.
        anchors: three (width, height) for every head in pixels of the network's input, small to large; None: COCO's
            at 416.
        objectness_prior: objectness that an untrained network predicts; 0.5 is darknet's, a small one settles faster.
        weights: path of a complete .weights file, or of the backbone's (``darknet53.conv.74``,
            ``yolov3-tiny.conv.15``); of a file with another number of classes everything but the detection
            convolutions is taken. See `load_darknet_weights`.

    Attributes:
        strides: pixels per cell, one number for every head.
        anchors: widths and heights in pixels of the network's input, three pairs for every head.
        backbone_end: number, in darknet's counting, of the last layer that published pretrained files hold.
        numbers: of the layers with weights, in darknet's counting. Submodules stand in the same order.
        predictors: name patterns of the last two convolutions of every head, which Lee et al. (Sensors 23(4):2102)
            do not prune: for `ignore` of a selection.

    Raises:
        ValueError: anchors, classes, width or prior out of range.
        WeightsError: the file does not fit.
    """

    strides: tuple[int, ...]
    coco_anchors: Anchors
    backbone_end: int
    numbers: tuple[int, ...]
    predictors = ("*.expand.conv", "*.predict")

    def __init__(
        self,
        num_classes: int = 80,
        *,
        width: float = 1.0,
        anchors: Sequence[Sequence[float]] | None = None,
        objectness_prior: float = 0.5,
        weights: str | Path | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        given = self.coco_anchors if anchors is None else anchors
        pairs = tuple((float(width), float(height)) for width, height in given)
        expected = BOXES_PER_CELL * len(self.strides)
        if len(pairs) != expected or not all(w > 0 and h > 0 for w, h in pairs):
            raise ValueError(f"{type(self).__name__} needs {expected} anchors (width, height) above 0, got {pairs}")
        self.num_classes = num_classes
        groups = [pairs[start : start + BOXES_PER_CELL] for start in range(0, expected, BOXES_PER_CELL)]
        self.anchors: tuple[Anchors, ...] = tuple(reversed(groups))  # listed from small to large; heads: large first
        self._build(width)
        self._initialise(objectness_prior)
        if weights is not None:
            load_darknet_weights(self, weights, other_classes=True)

    @abstractmethod
    def _build(self, width: float) -> None:
        """Make the submodules, in the order of darknet's cfg."""

    @property
    def outputs(self) -> int:
        """Channels of a head map."""
        return BOXES_PER_CELL * (5 + self.num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Raw head maps of images (N, 3, H, W)."""
        height, width = images.shape[-2:]
        if height % self.strides[0] or width % self.strides[0]:
            raise ValueError(
                f"{type(self).__name__} takes images whose sides are multiples of {self.strides[0]} pixels, got "
                f"{height}x{width}; letterbox them (lightning_prune.models.yolo_boxes)"
            )
        return self._maps(images)

    @abstractmethod
    def _maps(self, images: Tensor) -> tuple[Tensor, ...]:
        """Raw head maps of images whose sides fit."""

    def darknet_layers(self) -> list[Convolution]:
        """(layer number in darknet's cfg, convolution, batch norm or None) in the order of a .weights file."""
        norms = {unit.conv: unit.norm for unit in self.modules() if isinstance(unit, ConvUnit)}
        convs = [module for module in self.modules() if isinstance(module, nn.Conv2d)]  # in the order of the cfg
        return [(number, conv, norms.get(conv)) for number, conv in zip(self.numbers, convs, strict=True)]

    def _initialise(self, objectness_prior: float) -> None:
        """Initialise as darknet does; the prior shifts the objectness bias so that few cells start as objects."""
        if not 0 < objectness_prior < 1:
            raise ValueError(f"objectness_prior must lie in (0, 1), got {objectness_prior}")
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
                if module.bias is not None:  # it predicts
                    nn.init.zeros_(module.bias)
                    prior = math.log(objectness_prior / (1 - objectness_prior))
                    nn.init.constant_(module.bias.view(BOXES_PER_CELL, -1)[:, 4], prior)


def scaled(channels: int, width: float) -> int:
    """Channels of a narrower or wider network, at least 4."""
    if width <= 0:
        raise ValueError(f"width must be above 0, got {width}")
    return max(4, round(channels * width))


def join(coarse: Tensor, fine: Tensor) -> Tensor:
    """The coarse map at twice its size, then the fine one, along the channels."""
    return torch.cat([F.interpolate(coarse, scale_factor=2.0, mode="nearest"), fine], 1)
