"""YOLOv3-tiny: 13 convolutions and two detection branches (darknet's cfg/yolov3-tiny.cfg)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from torch import Tensor, nn

from lightning_prune.models.darknet_weights import load_darknet_weights
from lightning_prune.models.yolo_parts import Branch, ConvUnit, YoloNetwork, join, scaled

ANCHORS = ((10, 14), (23, 27), (37, 58), (81, 82), (135, 169), (344, 319))


class SameMaxPool(nn.Module):
    """2x2 max-pool of stride 1 that keeps the size: the window hangs over to the right and below, where nothing is.

    What lies outside never wins, not even against negative values (a zero pad would).
    """

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2, stride=1, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x)[..., 1:, 1:]


class YoloV3Tiny(YoloNetwork):
    """YOLOv3-tiny: heads at strides 32 and 16.

    Shapes: images (N, in_channels, H, W), sides multiples of 32; maps as in `YoloNetwork`, two of them.

    Args:
        num_classes: without background; 80 for COCO, 20 for Pascal VOC.
        width: factor on all channel counts, for small demonstrations; 1 is the published network.
        in_channels: of the images.
        anchors: six (width, height) in pixels of the network's input, small to large; default: COCO's at 416.
        objectness_prior: objectness that an untrained network predicts; 0.5 is darknet's, a small one settles faster.
        weights: path of ``yolov3-tiny.weights`` or ``yolov3-tiny.conv.15``; of a file with another number of classes
            everything but the detection convolutions is taken. See `load_darknet_weights`.

    Raises:
        ValueError: anchors, classes, width or prior out of range.
        WeightsError: the file does not fit.

    Example:
        >>> import torch
        >>> [tuple(m.shape) for m in YoloV3Tiny(20, width=0.25)(torch.zeros(1, 3, 64, 64))]
        [(1, 75, 2, 2), (1, 75, 4, 4)]
    """

    strides = (32, 16)
    backbone_end = 14
    numbers = (0, 2, 4, 6, 8, 10, 12, 13, 14, 15, 18, 21, 22)

    def __init__(
        self,
        num_classes: int = 80,
        *,
        width: float = 1.0,
        in_channels: int = 3,
        anchors: Sequence[Sequence[float]] = ANCHORS,
        objectness_prior: float = 0.5,
        weights: str | Path | None = None,
    ) -> None:
        super().__init__(num_classes, anchors)
        widths = [in_channels, *(scaled(channels, width) for channels in (16, 32, 64, 128, 256, 512, 1024))]
        units = [ConvUnit(inputs, outputs, 3) for inputs, outputs in pairwise(widths)]
        pooled = [layer for unit in units[:4] for layer in (unit, nn.MaxPool2d(2))]
        self.shallow = nn.Sequential(*pooled, units[4])
        self.deep = nn.Sequential(nn.MaxPool2d(2), units[5], SameMaxPool(), units[6])
        narrow = scaled(256, width)
        self.coarse = Branch(ConvUnit(widths[-1], narrow, 1), ConvUnit(narrow, scaled(512, width), 3), self.outputs)
        self.to_fine = ConvUnit(narrow, scaled(128, width), 1)
        joined = scaled(128, width) + widths[5]
        self.fine = Branch(nn.Identity(), ConvUnit(joined, scaled(256, width), 3), self.outputs)
        self._initialise(objectness_prior)
        if weights is not None:
            load_darknet_weights(self, weights, other_classes=True)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Raw head maps at strides 32 and 16."""
        self._check_size(images)
        shallow = self.shallow(images)
        coarse_map, x = self.coarse(self.deep(shallow))
        fine_map, _ = self.fine(join(self.to_fine(x), shallow))
        return coarse_map, fine_map
