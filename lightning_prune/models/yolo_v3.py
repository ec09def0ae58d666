"""YOLOv3 (Redmon and Farhadi, arXiv:1804.02767, 2018) and YOLOv3-tiny (darknet's cfg/yolov3-tiny.cfg)."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from lightning_prune.models.yolo_parts import Branch, ConvUnit, YoloNetwork, join, scaled

BLOCKS = (1, 2, 8, 8, 4)
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
    """The backbone: 52 convolutions, no pooling; returns the maps of stride 8, 16 and 32."""

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        inputs = scaled(32, width)
        self.stem = ConvUnit(3, inputs, 3)
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
    """YOLOv3: 75 convolutions, 23 shortcuts, heads at strides 32, 16 and 8; arguments as of `YoloNetwork`.

    Example:
        >>> import torch
        >>> [tuple(m.shape) for m in YoloV3(20, width=0.125)(torch.zeros(1, 3, 64, 64))]
        [(1, 75, 2, 2), (1, 75, 4, 4), (1, 75, 8, 8)]
    """

    strides = (32, 16, 8)
    coco_anchors = ((10, 13), (16, 30), (33, 23), (30, 61), (62, 45), (59, 119), (116, 90), (156, 198), (373, 326))
    backbone_end = 74
    numbers = tuple(sorted(set(range(106)) - _WITHOUT_WEIGHTS))

    def _build(self, width: float) -> None:
        w128, w256, w512, w1024 = (scaled(channels, width) for channels in (128, 256, 512, 1024))
        self.backbone = Darknet53(width)
        self.coarse = self._branch(w1024, w512, w1024)
        self.to_middle = ConvUnit(w512, w256, 1)
        self.middle = self._branch(w256 + w512, w256, w512)
        self.to_fine = ConvUnit(w256, w128, 1)
        self.fine = self._branch(w128 + w256, w128, w256)

    def _branch(self, inputs: int, narrow: int, wide: int) -> Branch:
        widths = (inputs, narrow, wide, narrow, wide, narrow)
        units = [ConvUnit(ins, outs, 1 if outs == narrow else 3) for ins, outs in pairwise(widths)]
        return Branch(nn.Sequential(*units), ConvUnit(narrow, wide, 3), self.outputs)

    def _maps(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        fine, middle, deep = self.backbone(images)
        coarse_map, x = self.coarse(deep)
        middle_map, x = self.middle(join(self.to_middle(x), middle))
        fine_map, _ = self.fine(join(self.to_fine(x), fine))
        return coarse_map, middle_map, fine_map


class SameMaxPool(nn.Module):
    """2x2 max-pool of stride 1 that keeps the size; what lies outside never wins (a zero pad would)."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2, stride=1, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x)[..., 1:, 1:]


class YoloV3Tiny(YoloNetwork):
    """YOLOv3-tiny: 13 convolutions, heads at strides 32 and 16; arguments as of `YoloNetwork`.

    Example:
        >>> import torch
        >>> [tuple(m.shape) for m in YoloV3Tiny(20, width=0.25)(torch.zeros(1, 3, 64, 64))]
        [(1, 75, 2, 2), (1, 75, 4, 4)]
    """

    strides = (32, 16)
    coco_anchors = ((10, 14), (23, 27), (37, 58), (81, 82), (135, 169), (344, 319))
    backbone_end = 14
    numbers = (0, 2, 4, 6, 8, 10, 12, 13, 14, 15, 18, 21, 22)

    def _build(self, width: float) -> None:
        widths = [3, *(scaled(channels, width) for channels in (16, 32, 64, 128, 256, 512, 1024))]
        units = [ConvUnit(inputs, outputs, 3) for inputs, outputs in pairwise(widths)]
        pooled = [layer for unit in units[:4] for layer in (unit, nn.MaxPool2d(2))]
        self.shallow = nn.Sequential(*pooled, units[4])
        self.deep = nn.Sequential(nn.MaxPool2d(2), units[5], SameMaxPool(), units[6])
        w128, w256, w512, w1024 = widths[-4:]
        self.coarse = Branch(ConvUnit(w1024, w256, 1), ConvUnit(w256, w512, 3), self.outputs)
        self.to_fine = ConvUnit(w256, w128, 1)
        self.fine = Branch(nn.Identity(), ConvUnit(w128 + w256, w256, 3), self.outputs)

    def _maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        shallow = self.shallow(images)
        coarse_map, x = self.coarse(self.deep(shallow))
        fine_map, _ = self.fine(join(self.to_fine(x), shallow))
        return coarse_map, fine_map
