"""What is deployed of a task's network: logits without auxiliary head, boxes instead of head maps."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms, box_iou

from lightning_prune.models.yolo_boxes import decode
from lightning_prune.models.yolo_parts import YoloNetwork

#: Tensors to compare one by one; how many decisions are the same, and of how many.
Compared = tuple[list[tuple[Tensor, Tensor]], int, int]

NOTHING = -1  # label of a place that holds no box
NEAR = 0.5  # overlap from which two boxes of one class are taken to be the same one


class DeployedSegmentation(nn.Module):
    """A segmentation network that returns its logits (N, classes, H, W) under ``out``, and nothing else."""

    decisions = "pixels"

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        output = self.network(images)
        return {"out": output if isinstance(output, Tensor) else output["out"]}

    def compared_outputs(self, expected: list[Tensor], found: list[Tensor]) -> Compared:
        """Logits, and the class of every pixel."""
        (one,), (other,) = expected, found
        return [(one, other)], int((one.argmax(1) == other.argmax(1)).sum()), one[:, 0].numel()


class DeployedYolo(nn.Module):
    """A YOLO that returns ``boxes`` (N, K, 4), x1 y1 x2 y2 in pixels of its input, ``scores`` and ``labels`` (N, K).

    Without suppression these are the K candidates with the highest scores, best first: one box may be there under
    several labels. With it, the boxes that survive come first, and ``count`` (N,) says how many they are; the places
    behind them hold zeros and label -1.

    Args:
        network: `YoloV3` or `YoloV3Tiny`.
        candidates: K without suppression, and what goes into it.
        nms: suppress, of two boxes of one class, the one with the lower score.
        threshold: overlap beyond which it goes.
        min_score: candidates with no more go before.
        kept: K with suppression.
    """

    decisions = "boxes"

    def __init__(
        self, network: YoloNetwork, *, candidates: int, nms: bool, threshold: float, min_score: float, kept: int
    ) -> None:
        super().__init__()
        self.network = network
        self.candidates = candidates
        self.nms = nms
        self.threshold = threshold
        self.min_score = min_score
        self.kept = kept
        self.onnx_operators = {torch.ops.lightning_prune.survives.default: _survives_in_onnx} if nms else {}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        boxes, scores = decode(self.network(images), self.network)
        height, width = images.shape[-2:]
        side = max(height, width)
        boxes = boxes.clamp(-side, 2 * side)  # an exploded one would be infinite
        classes = scores.shape[2]
        score, place = _best(scores.flatten(1), self.candidates)
        label, boxes = place % classes, _rows(boxes, place // classes)
        if not self.nms:
            return {"boxes": boxes, "scores": score, "labels": label}
        survives = torch.ops.lightning_prune.survives(boxes, score, label, classes, self.threshold, self.min_score)
        score, place = torch.where(survives, score, -1.0).topk(min(self.kept, score.shape[1]))
        there = score >= 0
        x, y = boxes[..., 0::2].clamp(0, width), boxes[..., 1::2].clamp(0, height)
        inside = torch.stack([x, y], -1).flatten(-2)
        return {
            "boxes": _rows(inside, place) * there[..., None],
            "scores": score.clamp(min=0),
            "labels": torch.where(there, label.gather(1, place), NOTHING),
            "count": there.sum(1),
        }

    def compared_outputs(self, expected: list[Tensor], found: list[Tensor]) -> Compared:
        """The boxes that are in both, each with its like; alike are those of one label that overlap most."""
        pairs, same, boxes = [], 0, 0
        for one, other in zip(_by_image(expected), _by_image(found), strict=True):
            overlap = box_iou(one["boxes"], other["boxes"]) * (one["labels"][:, None] == other["labels"])
            boxes += max(overlap.shape)
            if not overlap.numel():
                continue
            # Of boxes that lie on one another, the one with the nearest score.
            apart = (one["scores"][:, None] - other["scores"]).abs()
            best, near = (overlap - apart).max(1)
            alike = (overlap.gather(1, near[:, None])[:, 0] > NEAR) & (best > -1)
            near = near[alike]
            same += int(near.unique().numel())
            pairs += [(one[name][alike], other[name][near]) for name in ("boxes", "scores")]
        return pairs, same, boxes


def _by_image(outputs: list[Tensor]) -> list[dict[str, Tensor]]:
    boxes, scores, labels = outputs[:3]
    there = [label != NOTHING for label in labels]
    return [
        {"boxes": box[at].float(), "scores": score[at].float(), "labels": label[at]}
        for box, score, label, at in zip(boxes, scores, labels, there, strict=True)
    ]


def _best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The highest scores and their places; of a size that is left open in a file, nobody knows if it has so many."""
    if isinstance(scores.shape[1], int):
        return scores.topk(min(count, scores.shape[1]))
    score, place = F.pad(scores, (0, count)).topk(count)  # what is padded scores nothing
    return score, place.clamp(max=scores.shape[1] - 1)


def _rows(boxes: Tensor, place: Tensor) -> Tensor:
    """Boxes (N, k, 4) at places (N, k)."""
    return boxes.gather(1, place[..., None].expand(-1, -1, 4))


@torch.library.custom_op("lightning_prune::survives", mutates_args=())
def _survives(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    classes: int,  # noqa: ARG001  # ONNX asks for it
    threshold: float,
    min_score: float,
) -> Tensor:
    """Which candidates (N, K) of N images survive the suppression of boxes of the same class."""
    survives = torch.zeros_like(scores, dtype=torch.bool)
    for image in range(len(boxes)):
        (place,) = (scores[image] > min_score).nonzero(as_tuple=True)
        kept = batched_nms(boxes[image][place], scores[image][place], labels[image][place], threshold)
        survives[image, place[kept]] = True
    return survives


@_survives.register_fake
def _(boxes: Tensor, scores: Tensor, *_: object) -> Tensor:  # noqa: ARG001
    return torch.empty_like(scores, dtype=torch.bool)


def _survives_in_onnx(boxes: Any, scores: Any, labels: Any, classes: int, threshold: float, min_score: float) -> Any:
    """The same by ONNX's NonMaxSuppression, which takes scores of all classes."""
    import onnxscript

    op: Any = onnxscript.opset18
    column = onnxscript.ir.tensor([[label] for label in range(classes)], dtype=onnxscript.ir.DataType.INT64)
    one = op.Constant(value_ints=[1])
    own = op.Equal(op.Unsqueeze(labels, one), op.Constant(value=column))  # (N, classes, K)
    by_class = op.Where(own, op.Unsqueeze(scores, one), op.Constant(value_float=-1.0))
    every = op.Constant(value_ints=[2**31 - 1])
    chosen = op.NonMaxSuppression(
        boxes, by_class, every, op.Constant(value_floats=[threshold]), op.Constant(value_floats=[min_score])
    )
    place = op.Gather(chosen, op.Constant(value_ints=[0, 2]), axis=1)  # of image, class, box
    count = op.Slice(op.Shape(place), op.Constant(value_ints=[0]), one)
    nothing = op.Expand(op.Constant(value_float=0.0), op.Shape(scores))
    hits = op.ScatterND(nothing, place, op.Expand(op.Constant(value_float=1.0), count))
    return op.Greater(hits, op.Constant(value_float=0.5))
