"""Between pixels and head maps: letterboxing images, and the boxes that raw maps stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_prune.models.yolo_parts import BOXES_PER_CELL, YoloNetwork

GREY = 0.5


@dataclass(frozen=True)
class Placement:
    """Where an image lies in the network's input; it takes boxes (n, 4), xyxy in pixels, there and back."""

    scale: tuple[float, float]  # factors by which x and y grew
    offset: tuple[int, int]  # left and upper border, in pixels of the network's input
    size: tuple[int, int]  # height and width of the image itself

    def to_network(self, boxes: Tensor) -> Tensor:
        return boxes * boxes.new_tensor(self.scale * 2) + boxes.new_tensor(self.offset * 2)

    def to_image(self, boxes: Tensor) -> Tensor:
        return (boxes - boxes.new_tensor(self.offset * 2)) / boxes.new_tensor(self.scale * 2)


def fitted(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width that fit into a square in the same proportions, rounded down as darknet does."""
    longer = max(height, width)
    return max(1, height * size // longer), max(1, width * size // longer)


def letterbox(images: Sequence[Tensor] | Tensor, size: int) -> tuple[Tensor, list[Placement]]:
    """Images in [0, 1] scaled to fit into grey squares (N, C, size, size), and where each lies in its own."""
    squares, placements = [], []
    for image in images:
        height, width = image.shape[-2:]
        inner = fitted(height, width, size)
        top, left = (size - inner[0]) // 2, (size - inner[1]) // 2
        if inner != (height, width):
            image = F.interpolate(image[None], size=inner, mode="bilinear", align_corners=False)[0]
        borders = (left, size - inner[1] - left, top, size - inner[0] - top)
        squares.append(F.pad(image, borders, value=GREY) if any(borders) else image)
        placements.append(Placement((inner[1] / width, inner[0] / height), (left, top), (height, width)))
    return torch.stack(squares), placements


@dataclass(frozen=True)
class Grid:
    """The places where a network predicts, M in all: head by head, anchor by anchor, row by row."""

    cell: Tensor  # column and row of each, (M, 2)
    anchor: Tensor  # width and height in pixels, (M, 2)
    stride: Tensor  # pixels per cell, (M, 1)
    first: tuple[int, ...]  # place of each head, and M
    columns: tuple[int, ...]  # of each head
    rows: tuple[int, ...]

    def boxes(self, raw: Tensor, places: Tensor | slice = slice(None)) -> Tensor:
        r"""Boxes (..., m, 4), xyxy in pixels, of raw predictions (..., m, >= 4) at some places, or at all.

        :math:`x = (\sigma(t_x) + column) \cdot stride`, :math:`w = anchor_w e^{t_w}`, and alike for y and h.
        """
        centre = (raw[..., :2].sigmoid() + self.cell[places]) * self.stride[places]
        half = self.anchor[places] * raw[..., 2:4].exp() / 2
        return torch.cat([centre - half, centre + half], -1)


def flatten(maps: Sequence[Tensor], network: YoloNetwork) -> tuple[Tensor, Grid]:
    """Raw predictions (N, M, 5 + classes) of all heads in one row, and the grid that they lie on."""
    raw, cells, anchors, strides, first = [], [], [], [], [0]
    for head, stride, sizes in zip(maps, network.strides, network.anchors, strict=True):
        batch, _, rows, columns = head.shape
        entries = head.view(batch, BOXES_PER_CELL, -1, rows, columns)
        raw.append(entries.permute(0, 1, 3, 4, 2).flatten(1, 3))
        row, column = (torch.arange(count, device=head.device) for count in (rows, columns))
        cells.append(torch.cartesian_prod(row, column).flip(1).repeat(BOXES_PER_CELL, 1).to(head.dtype))
        anchors.append(head.new_tensor(sizes)[:, None].expand(-1, rows * columns, -1).flatten(0, 1))
        strides.append(head.new_full((BOXES_PER_CELL * rows * columns, 1), stride))
        first.append(first[-1] + BOXES_PER_CELL * rows * columns)
    rows_of, columns_of = (tuple(head.shape[d] for head in maps) for d in (2, 3))
    grid = Grid(torch.cat(cells), torch.cat(anchors), torch.cat(strides), tuple(first), columns_of, rows_of)
    return torch.cat(raw, 1), grid


def decode(maps: Sequence[Tensor], network: YoloNetwork) -> tuple[Tensor, Tensor]:
    """Boxes (N, M, 4), xyxy in pixels of the network's input, and scores (N, M, classes): objectness times class."""
    raw, grid = flatten(maps, network)
    return grid.boxes(raw), raw[..., 4:5].sigmoid() * raw[..., 5:].sigmoid()
