"""A small detector of the kind that ultralytics builds: C2f blocks (split, concatenation), SPPF, upsampling.

Own code after the published architecture of YOLOv8; raw maps per scale, as its exported form has before decoding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Conv(nn.Sequential):
    """Convolution, batch norm, SiLU."""

    def __init__(self, into: int, out: int, kernel: int = 1, stride: int = 1) -> None:
        convolution = nn.Conv2d(into, out, kernel, stride, kernel // 2, bias=False)
        super().__init__(convolution, nn.BatchNorm2d(out), nn.SiLU(inplace=True))


class Bottleneck(nn.Module):
    """Two convolutions, with the input added or not."""

    def __init__(self, channels: int, shortcut: bool) -> None:
        super().__init__()
        self.first, self.second, self.shortcut = Conv(channels, channels, 3), Conv(channels, channels, 3), shortcut

    def forward(self, x: Tensor) -> Tensor:
        """x, or x added."""
        y = self.second(self.first(x))
        return x + y if self.shortcut else y


class C2f(nn.Module):
    """Two halves, bottlenecks on the second, everything concatenated."""

    def __init__(self, into: int, out: int, depth: int, shortcut: bool = False) -> None:
        super().__init__()
        self.into, self.out = Conv(into, out), Conv((2 + depth) * out // 2, out)
        self.blocks = nn.ModuleList(Bottleneck(out // 2, shortcut) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        """Channels out."""
        parts = list(self.into(x).chunk(2, 1))
        for block in self.blocks:
            parts.append(block(parts[-1]))
        return self.out(torch.cat(parts, 1))


class Sppf(nn.Module):
    """Three poolings in a row, concatenated."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.into, self.out = Conv(channels, channels // 2), Conv(2 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """As many channels."""
        parts = [self.into(x)]
        for _ in range(3):
            parts.append(F.max_pool2d(parts[-1], 5, 1, 2))
        return self.out(torch.cat(parts, 1))


class C2fNet(nn.Module):
    """Backbone, neck and heads at three scales.

    Args:
        classes: of objects.
        width: channels of the first convolution; 16 as in YOLOv8n.
    """

    def __init__(self, classes: int = 80, width: int = 16) -> None:
        super().__init__()
        a, b, c, d, e = (width * 2**n for n in range(5))
        self.to4 = nn.Sequential(Conv(3, a, 3, 2), Conv(a, b, 3, 2), C2f(b, b, 1, True))
        self.to8 = nn.Sequential(Conv(b, c, 3, 2), C2f(c, c, 2, True))
        self.to16 = nn.Sequential(Conv(c, d, 3, 2), C2f(d, d, 2, True))
        self.to32 = nn.Sequential(Conv(d, e, 3, 2), C2f(e, e, 1, True), Sppf(e))
        self.up16, self.up8 = C2f(d + e, d, 1), C2f(c + d, c, 1)
        self.down16, self.mix16 = Conv(c, c, 3, 2), C2f(c + d, d, 1)
        self.down32, self.mix32 = Conv(d, d, 3, 2), C2f(d + e, e, 1)
        self.boxes = nn.ModuleList(
            nn.Sequential(Conv(n, 4 * width, 3), Conv(4 * width, 4 * width, 3), nn.Conv2d(4 * width, 64, 1))
            for n in (c, d, e)
        )
        self.kinds = nn.ModuleList(
            nn.Sequential(
                Conv(n, max(c, classes), 3),
                Conv(max(c, classes), max(c, classes), 3),
                nn.Conv2d(max(c, classes), classes, 1),
            )
            for n in (c, d, e)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps of 64 box and so many class channels at strides 8, 16, 32."""
        at8 = self.to8(self.to4(x))
        at16 = self.to16(at8)
        at32 = self.to32(at16)
        mid = self.up16(torch.cat([F.interpolate(at32, scale_factor=2.0), at16], 1))
        fine = self.up8(torch.cat([F.interpolate(mid, scale_factor=2.0), at8], 1))
        mid = self.mix16(torch.cat([self.down16(fine), mid], 1))
        coarse = self.mix32(torch.cat([self.down32(mid), at32], 1))
        maps = zip((fine, mid, coarse), self.boxes, self.kinds, strict=True)
        return [torch.cat([boxes(x), kinds(x)], 1) for x, boxes, kinds in maps]
