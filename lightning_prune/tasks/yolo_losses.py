"""Two losses for YOLOv3: darknet's own, and the CIoU loss of the PyTorch port that Lee et al. used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou, complete_box_iou_loss

from lightning_prune.models.yolo_boxes import Grid, flatten
from lightning_prune.models.yolo_parts import BOXES_PER_CELL, YoloNetwork

LARGEST_RATIO = 4.0  # of a truth's sides to those of an anchor that matches


@dataclass(frozen=True)
class Truths:
    """All true boxes of a batch in the network's input."""

    image: Tensor  # which image each belongs to, (T,) int64
    label: Tensor  # its class, (T,) int64
    box: Tensor  # xyxy in pixels, (T, 4)

    @classmethod
    def of(cls, boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> Truths:
        """From the boxes and labels of every image."""
        counts = torch.tensor([len(of) for of in boxes], device=boxes[0].device)
        image = torch.arange(len(boxes), device=counts.device).repeat_interleave(counts)
        return cls(image, torch.cat(list(labels)), torch.cat(list(boxes)))

    @property
    def centre(self) -> Tensor:
        """(T, 2)."""
        return (self.box[:, :2] + self.box[:, 2:]) / 2

    @property
    def size(self) -> Tensor:
        """Width and height, (T, 2)."""
        return self.box[:, 2:] - self.box[:, :2]


def darknet_loss(
    maps: Sequence[Tensor], truths: Truths, network: YoloNetwork, *, ignore_threshold: float = 0.5
) -> dict[str, Tensor]:
    r"""The loss of darknet's yolo layer (Redmon and Farhadi, arXiv:1804.02767), whose gradients darknet writes down.

    Each truth makes one prediction responsible: that of the anchor, of all heads, whose shape overlaps most with its
    own, in the cell of its centre. There, with the truth's share of the image :math:`w h` and sums over entries,

    .. math:: (2 - w h) \Bigl(\sum_{x, y} \mathrm{BCE}(t, \hat t) + \tfrac12 \sum_{w, h} (\hat t - t)^2\Bigr)
        + \mathrm{BCE}(\hat o, 1) + \sum_c \mathrm{BCE}(\hat c, c),

    with BCE on logits and :math:`t_w = \log(w / anchor_w)`. All other predictions are pushed to objectness 0, unless
    their box overlaps with any truth by more than ``ignore_threshold``. If truths share a prediction, the last one's
    box counts, and all their classes. Everything is summed and divided by the number of images.
    """
    raw, grid = flatten(maps, network)
    batch, count = raw.shape[:2]
    everything = torch.arange(len(truths.box), device=raw.device)
    anchors, size = _all_anchors(network, truths.box), truths.size[:, None]
    common = torch.minimum(size, anchors).prod(2)  # of truth and anchor with the same centre
    best = (common / (size.prod(2) + anchors.prod(1) - common)).argmax(1)
    place = _places(truths, everything, best, grid, network)
    key, which = torch.unique(truths.image * count + place, return_inverse=True)
    last = key.new_zeros(len(key)).scatter_reduce_(0, which, everything, "amax")
    chosen = raw.flatten(0, 1)[key]  # (U, 5 + classes)

    weight = 1.0 - _ignored(raw, truths, grid, ignore_threshold).to(raw.dtype)
    target = torch.zeros_like(weight)
    weight.view(-1)[key], target.view(-1)[key] = 1.0, 1.0
    objectness = F.binary_cross_entropy_with_logits(raw[..., 4], target, weight, reduction="sum")

    place = key % count
    side = raw.new_tensor([grid.columns[0], grid.rows[0]]) * network.strides[0]
    share = (truths.size[last] / side).prod(1, keepdim=True)
    inside = truths.centre[last] / grid.stride[place] - grid.cell[place]
    logs = (truths.size[last] / grid.anchor[place]).log()
    centre = F.binary_cross_entropy_with_logits(chosen[:, :2], inside, reduction="none")
    box = ((2 - share) * (centre + (chosen[:, 2:4] - logs).square() / 2)).sum()

    classes = torch.zeros_like(chosen[:, 5:])
    classes[which, truths.label] = 1.0
    named = F.binary_cross_entropy_with_logits(chosen[:, 5:], classes, reduction="sum")
    return {"box": box / batch, "objectness": objectness / batch, "class": named / batch}


def ciou_loss(maps: Sequence[Tensor], truths: Truths, network: YoloNetwork) -> dict[str, Tensor]:
    r"""CIoU loss (Zheng et al., arXiv:1911.08287) with many positives, as in eriklindernoren's PyTorch-YOLOv3.

    An anchor matches a truth if neither width nor height differ by a factor of `LARGEST_RATIO` or more; the
    prediction is that of the truth's centre cell. Per head, averaged over its matches: 0.05 (1 - CIoU) for the box and
    0.5 BCE over the classes (nothing for a single class); BCE over all cells for the objectness, whose target is the
    match's CIoU, at least 0 (the largest, where matches meet). Heads are summed.
    """
    raw, grid = flatten(maps, network)
    ratio = truths.size[:, None] / _all_anchors(network, raw)  # (T, anchors, 2)
    matches = torch.maximum(ratio, 1 / ratio).amax(2) < LARGEST_RATIO
    box, objectness, named = raw.new_zeros(3).unbind()
    for head, (start, end) in enumerate(zip(grid.first, grid.first[1:], strict=False)):
        target = torch.zeros_like(raw[:, start:end, 4])
        of_head = slice(head * BOXES_PER_CELL, (head + 1) * BOXES_PER_CELL)
        truth, anchor = matches[:, of_head].nonzero(as_tuple=True)
        if len(truth):
            place = _places(truths, truth, anchor + of_head.start, grid, network)
            chosen = raw[truths.image[truth], place]  # selected before exp, whose overflow elsewhere must not count
            loss = complete_box_iou_loss(grid.boxes(chosen, place), truths.box[truth].to(raw.dtype))
            box = box + loss.mean()
            key = truths.image[truth] * (end - start) + place - start
            target.view(-1).scatter_reduce_(0, key, (1 - loss.detach()).clamp(min=0), "amax")
            if network.num_classes > 1:
                classes = F.one_hot(truths.label[truth], network.num_classes).to(raw.dtype)
                named = named + F.binary_cross_entropy_with_logits(chosen[:, 5:], classes)
        objectness = objectness + F.binary_cross_entropy_with_logits(raw[:, start:end, 4], target)
    return {"box": 0.05 * box, "objectness": objectness, "class": 0.5 * named}


def _all_anchors(network: YoloNetwork, like: Tensor) -> Tensor:
    return like.new_tensor([pair for head in network.anchors for pair in head])


def _places(truths: Truths, truth: Tensor, anchor: Tensor, grid: Grid, network: YoloNetwork) -> Tensor:
    """The place in the grid of some truths' centres at an anchor, numbered over all heads."""
    head = anchor // BOXES_PER_CELL
    stride, first, columns, rows = (
        head.new_tensor(numbers)[head] for numbers in (network.strides, grid.first, grid.columns, grid.rows)
    )
    column, row = (truths.centre[truth] / stride[:, None]).long().unbind(1)
    column, row = column.clamp(min=0).minimum(columns - 1), row.clamp(min=0).minimum(rows - 1)
    return first + (anchor % BOXES_PER_CELL * rows + row) * columns + column


@torch.no_grad()
def _ignored(raw: Tensor, truths: Truths, grid: Grid, threshold: float) -> Tensor:
    """Which predictions overlap with any truth of their image by more than the threshold, (N, M)."""
    boxes = grid.boxes(raw)
    result = torch.zeros(raw.shape[:2], dtype=torch.bool, device=raw.device)
    for image in truths.image.unique().tolist():
        overlap = box_iou(boxes[image], truths.box[truths.image == image].to(raw.dtype))
        result[image] = (overlap > threshold).any(1)
    return result
