"""YOLOv3 (Redmon and Farhadi, arXiv:1804.02767, 2018): Darknet-53 and three detection branches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from lightning_prune.models.darknet_weights import load_darknet_weights
from lightning_prune.models.yolo_parts import Branch, ConvUnit, YoloNetwork, join, scaled

BLOCKS = (1, 2, 8, 8, 4)
ANCHORS = ((10, 13), (16, 30), (33, 23), (30, 61), (62, 45), (59, 119), (116, 90), (156, 198), (373, 326))
_SHORTCUTS = {
    first + 3 * k for first, blocks in zip((1, 5, 12, 37, 62), BLOCKS, strict=True) for k in range(1, blocks + 1)
}
_WITHOUT_WEIGHTS = _SHORTCUTS | {82, 83, 85, 86, 94, 95, 97, 98}  # and yolo, route, upsample, route, twice


class Residual(nn.Module):
    """1x1 to half the channels, 3x3 back, and the shortcut."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.narrow = ConvUnit(channels, inner, 1)
        self.widen = ConvUnit(inner, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.widen(self.narrow(x))


class Darknet53(nn.Module):
    """The backbone: 52 convolutions, no pooling; returns the maps of stride 8, 16 and 32.

    Args:
        width: factor on all channel counts.
        in_channels: of the images.
    """

    def __init__(self, width: float = 1.0, in_channels: int = 3) -> None:
        super().__init__()
        inputs = scaled(32, width)
        self.stem = ConvUnit(in_channels, inputs, 3)
        self.stages = nn.ModuleList()
        for stage, blocks in enumerate(BLOCKS):
            outputs, inner = scaled(64 * 2**stage, width), scaled(32 * 2**stage, width)
            residuals = [Residual(outputs, inner) for _ in range(blocks)]
            self.stages.append(nn.Sequential(ConvUnit(inputs, outputs, 3, 2), *residuals))
            inputs = outputs

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.stages[1](self.stages[0](self.stem(x)))
        fine = self.stages[2](x)
        middle = self.stages[3](fine)
        return fine, middle, self.stages[4](middle)


class YoloV3(YoloNetwork):
    """YOLOv3: 75 convolutions, 23 shortcuts, heads at strides 32, 16 and 8.

    Shapes: images (N, in_channels, H, W), sides multiples of 32; maps as in `YoloNetwork`, three of them.

    Args:
        num_classes: without background; 80 for COCO, 20 for Pascal VOC.
        width: factor on all channel counts, for small demonstrations; 1 is the published network.
        in_channels: of the images.
        anchors: nine (width, height) in pixels of the network's input, small to large; default: COCO's at 416.
        objectness_prior: objectness that an untrained network predicts; 0.5 is darknet's, a small one settles faster.
        weights: path of ``darknet53.conv.74`` or ``yolov3.weights``; of a file with another number of classes
            everything but the detection convolutions is taken. See `load_darknet_weights`.

    Raises:
        ValueError: anchors, classes, width or prior out of range.
        WeightsError: the file does not fit.

    Example:
        >>> import torch
        >>> [tuple(m.shape) for m in YoloV3(20, width=0.125)(torch.zeros(1, 3, 64, 64))]
        [(1, 75, 2, 2), (1, 75, 4, 4), (1, 75, 8, 8)]
    """

    strides = (32, 16, 8)
    backbone_end = 74
    numbers = tuple(sorted(set(range(106)) - _WITHOUT_WEIGHTS))

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
        self.backbone = Darknet53(width, in_channels)
        self.coarse = self._branch(scaled(1024, width), scaled(512, width), scaled(1024, width))
        self.to_middle = ConvUnit(scaled(512, width), scaled(256, width), 1)
        self.middle = self._branch(scaled(256, width) + scaled(512, width), scaled(256, width), scaled(512, width))
        self.to_fine = ConvUnit(scaled(256, width), scaled(128, width), 1)
        self.fine = self._branch(scaled(128, width) + scaled(256, width), scaled(128, width), scaled(256, width))
        self._initialise(objectness_prior)
        if weights is not None:
            load_darknet_weights(self, weights, other_classes=True)

    def _branch(self, inputs: int, narrow: int, wide: int) -> Branch:
        body = nn.Sequential(
            ConvUnit(inputs, narrow, 1),
            ConvUnit(narrow, wide, 3),
            ConvUnit(wide, narrow, 1),
            ConvUnit(narrow, wide, 3),
            ConvUnit(wide, narrow, 1),
        )
        return Branch(body, ConvUnit(narrow, wide, 3), self.outputs)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Raw head maps at strides 32, 16 and 8."""
        self._check_size(images)
        fine, middle, deep = self.backbone(images)
        coarse_map, x = self.coarse(deep)
        middle_map, x = self.middle(join(self.to_middle(x), middle))
        fine_map, _ = self.fine(join(self.to_fine(x), fine))
        return coarse_map, middle_map, fine_map
