"""darknet's networks, slowly: layer by layer from the rows of its cfg, weights read from a file one after the other.

Independent of lightning_prune.models: no module of it is used, and every layer is looked up by its number.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def _residual(inner: int, outer: int, times: int) -> list[tuple]:
    return [("conv", inner, 1, 1), ("conv", outer, 3, 1), ("shortcut", -3)] * times


def _head(narrow: int, wide: int) -> list[tuple]:
    pair = [("conv", narrow, 1, 1), ("conv", wide, 3, 1)]
    return [*pair, *pair, *pair, ("detect",), ("yolo",)]


def yolov3_cfg() -> list[tuple]:
    """The 107 layers of yolov3.cfg."""
    rows: list[tuple] = [("conv", 32, 3, 1)]
    for inner, times in ((32, 1), (64, 2), (128, 8), (256, 8), (512, 4)):
        rows += [("conv", 2 * inner, 3, 2), *_residual(inner, 2 * inner, times)]
    rows += _head(512, 1024)
    rows += [("route", -4), ("conv", 256, 1, 1), ("upsample",), ("route", -1, 61), *_head(256, 512)]
    rows += [("route", -4), ("conv", 128, 1, 1), ("upsample",), ("route", -1, 36), *_head(128, 256)]
    return rows


def yolov3_tiny_cfg() -> list[tuple]:
    """The 24 layers of yolov3-tiny.cfg."""
    rows: list[tuple] = []
    for width in (16, 32, 64, 128, 256):
        rows += [("conv", width, 3, 1), ("pool", 2)]
    rows += [("conv", 512, 3, 1), ("pool", 1), ("conv", 1024, 3, 1), ("conv", 256, 1, 1), ("conv", 512, 3, 1)]
    rows += [("detect",), ("yolo",), ("route", -4), ("conv", 128, 1, 1), ("upsample",), ("route", -1, 8)]
    return [*rows, ("conv", 256, 3, 1), ("detect",), ("yolo",)]


def run(cfg: list[tuple], path: Path, images: Tensor, classes: int, width: float = 1.0) -> list[Tensor]:
    """The maps that enter the yolo layers; every byte of the file must be used."""
    content = path.read_bytes()
    major, minor, _ = struct.unpack("<3i", content[:12])
    numbers = np.frombuffer(content, "<f4", offset=20 if major * 10 + minor >= 2 else 16)
    place = 0

    def take(*shape: int) -> Tensor:
        nonlocal place
        count = int(np.prod(shape))
        place += count
        return torch.from_numpy(numbers[place - count : place].copy()).view(shape).to(images)

    outputs: list[Tensor] = []
    heads = []
    for index, (kind, *options) in enumerate(cfg):
        x = outputs[-1] if outputs else images
        if kind == "conv":
            filters, kernel, stride = max(4, round(options[0] * width)), options[1], options[2]
            beta, gamma, mean, var = (take(filters) for _ in range(4))
            x = F.conv2d(x, take(filters, x.shape[1], kernel, kernel), stride=stride, padding=kernel // 2)
            x = (x - mean[:, None, None]) / torch.sqrt(var + 1e-5)[:, None, None] * gamma[:, None, None]
            x = x + beta[:, None, None]
            x = torch.where(x > 0, x, 0.1 * x)
        elif kind == "detect":
            bias = take(3 * (5 + classes))
            x = F.conv2d(x, take(len(bias), x.shape[1], 1, 1), bias)
        elif kind == "pool":
            x = _pool(x, options[0])
        elif kind == "shortcut":
            x = x + outputs[index + options[0]]
        elif kind == "upsample":
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        elif kind == "route":
            x = torch.cat([outputs[index + o if o < 0 else o] for o in options], 1)
        else:
            heads.append(x)
        outputs.append(x)
    assert place == len(numbers)
    return heads


def _pool(x: Tensor, stride: int) -> Tensor:
    """The largest of the four values at and right of and below a place, of those that exist."""
    rows, columns = x.shape[2:]
    result = x.new_empty(*x.shape[:2], rows // stride, columns // stride)
    for row in range(rows // stride):
        for column in range(columns // stride):
            top, left = row * stride, column * stride
            result[:, :, row, column] = x[:, :, top : top + 2, left : left + 2].amax((2, 3))
    return result
