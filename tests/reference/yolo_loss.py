"""The deltas of darknet's yolo layer and the CIoU loss, slowly: Python loops over cells and truths.

Written from the statement of the loss (gradients on logits), without anything of lightning_prune.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Truth = tuple[int, int, float, float, float, float]  # image, class, centre x and y, width, height; in pixels


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def iou(a: tuple, b: tuple) -> float:
    """Of two boxes given by centre and size."""
    sides = [
        min(a[d] + a[d + 2] / 2, b[d] + b[d + 2] / 2) - max(a[d] - a[d + 2] / 2, b[d] - b[d + 2] / 2) for d in (0, 1)
    ]
    common = max(0.0, sides[0]) * max(0.0, sides[1])
    return common / (a[2] * a[3] + b[2] * b[3] - common)


def ciou(a: tuple, b: tuple) -> float:
    """Complete IoU of Zheng et al."""
    overlap = iou(a, b)
    enclosing = sum(
        (max(a[d] + a[d + 2] / 2, b[d] + b[d + 2] / 2) - min(a[d] - a[d + 2] / 2, b[d] - b[d + 2] / 2)) ** 2
        for d in (0, 1)
    )
    distance = ((a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2) / enclosing
    v = 4 / math.pi**2 * (math.atan(b[2] / b[3]) - math.atan(a[2] / a[3])) ** 2
    return overlap - distance - v * v / (1 - overlap + v + 1e-12)


def box(head: Tensor, image: int, anchor: int, row: int, column: int, sizes: tuple, stride: int, entries: int) -> tuple:
    x, y, w, h = head[image, anchor * entries : anchor * entries + 4, row, column].tolist()
    width, height = sizes[anchor]
    return (sigmoid(x) + column) * stride, (sigmoid(y) + row) * stride, width * math.exp(w), height * math.exp(h)


def darknet_deltas(
    maps: list[Tensor], truths: list[Truth], anchors: list[tuple], strides: list[int], ignore: float
) -> list[Tensor]:
    """What darknet adds to the weights' updates per logit: minus the gradient of the summed loss."""
    every = [pair for head in anchors for pair in head]
    results = []
    for level, (head, sizes, stride) in enumerate(zip(maps, anchors, strides, strict=True)):
        images, channels, rows, columns = head.shape
        entries = channels // 3
        delta = torch.zeros_like(head)
        for image in range(images):
            for anchor in range(3):
                for row in range(rows):
                    for column in range(columns):
                        found = box(head, image, anchor, row, column, sizes, stride, entries)
                        best = max((iou(found, t[2:]) for t in truths if t[0] == image), default=0.0)
                        place = anchor * entries + 4
                        if best <= ignore:
                            delta[image, place, row, column] = -sigmoid(head[image, place, row, column].item())
        for image, label, x, y, w, h in truths:
            best = max(range(len(every)), key=lambda k: iou((0, 0, w, h), (0, 0, *every[k])))
            if best // 3 != level:
                continue
            row, column, first = int(y / stride), int(x / stride), best % 3 * entries
            logits, d = head[image, :, row, column], delta[image, :, row, column]
            scale = 2 - w * h / (columns * stride * rows * stride)
            d[first] = scale * (x / stride - column - sigmoid(logits[first].item()))
            d[first + 1] = scale * (y / stride - row - sigmoid(logits[first + 1].item()))
            d[first + 2] = scale * (math.log(w / every[best][0]) - logits[first + 2].item())
            d[first + 3] = scale * (math.log(h / every[best][1]) - logits[first + 3].item())
            d[first + 4] = 1 - sigmoid(logits[first + 4].item())
            seen = d[first + 5 : first + entries].abs().sum() > 0
            for other in range(entries - 5):
                if other == label:
                    d[first + 5 + other] = 1 - sigmoid(logits[first + 5 + other].item())
                elif not seen:
                    d[first + 5 + other] = -sigmoid(logits[first + 5 + other].item())
        results.append(delta)
    return results


def ciou_parts(maps: list[Tensor], truths: list[Truth], anchors: list[tuple], strides: list[int]) -> dict[str, float]:
    """The three parts of the CIoU loss with their weights."""

    def bce(logit: float, target: float) -> float:
        p = sigmoid(logit)
        return -target * math.log(p) - (1 - target) * math.log(1 - p)

    parts = {"box": 0.0, "objectness": 0.0, "class": 0.0}
    for head, sizes, stride in zip(maps, anchors, strides, strict=True):
        images, channels, rows, columns = head.shape
        entries = channels // 3
        boxes, classes, targets = [], [], {}
        for image, label, x, y, w, h in truths:
            for anchor, (width, height) in enumerate(sizes):
                if max(w / width, width / w, h / height, height / h) >= 4:
                    continue
                row, column = int(y / stride), int(x / stride)
                overlap = ciou(box(head, image, anchor, row, column, sizes, stride, entries), (x, y, w, h))
                boxes.append(1 - overlap)
                place = image, anchor, row, column
                targets[place] = max(targets.get(place, 0.0), overlap, 0.0)
                logits = head[image, anchor * entries + 5 : (anchor + 1) * entries, row, column].tolist()
                classes += [bce(logit, float(c == label)) for c, logit in enumerate(logits)]
        if boxes:
            parts["box"] += 0.05 * sum(boxes) / len(boxes)
            parts["class"] += 0.5 * sum(classes) / len(classes) if entries > 6 else 0.0
        cells = [
            bce(head[i, a * entries + 4, r, c].item(), targets.get((i, a, r, c), 0.0))
            for i in range(images)
            for a in range(3)
            for r in range(rows)
            for c in range(columns)
        ]
        parts["objectness"] += sum(cells) / len(cells)
    return parts
