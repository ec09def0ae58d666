"""Average precision as Pascal VOC defines it: 11 points (2007) or the whole area (from 2010 on)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from torchvision.ops import box_iou


class VocMeanAveragePrecision(Metric):
    """Mean over classes of average precision at one overlap (Everingham et al., IJCV 88(2):303, 2010).

    Detections of an image and a class are taken in falling order of score. Each is compared with the true box that it
    overlaps most: a hit, if the overlap is at least ``min_overlap`` and the box was not hit before; ignored, if that
    box is ``difficult``; else a false alarm. Difficult boxes need not be found. Classes without boxes do not count.
    Overlap is of continuous coordinates, without the VOC toolkit's extra pixel.

    Args:
        num_classes: labels are 0..num_classes-1.
        min_overlap: intersection over union.
        min_score: detections below it are left out.

    Example:
        >>> box = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
        >>> found = {"boxes": box + 1, "scores": torch.tensor([0.8]), "labels": torch.tensor([0])}
        >>> metric = VocMeanAveragePrecision(1)
        >>> metric.update([found], [{"boxes": box, "labels": torch.tensor([0])}])
        >>> metric.compute()["voc10"].item()
        1.0
    """

    full_state_update = False
    outcomes: list[Tensor]  # rows of score, label, and 1 for a hit or 0 for a false alarm
    positives: Tensor

    def __init__(self, num_classes: int, *, min_overlap: float = 0.5, min_score: float = 0.0, **options: Any) -> None:
        super().__init__(**options)
        self.num_classes = num_classes
        self.min_overlap = min_overlap
        self.min_score = min_score
        self.add_state("outcomes", default=[], dist_reduce_fx="cat")
        self.add_state("positives", default=torch.zeros(num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, found: Sequence[dict[str, Tensor]], truths: Sequence[dict[str, Tensor]]) -> None:
        """Add images: ``boxes``, ``scores``, ``labels`` found, and true ``boxes``, ``labels`` and ``difficult``."""
        for detections, truth in zip(found, truths, strict=True):
            order = detections["scores"].argsort(descending=True, stable=True)
            boxes, scores, labels = (detections[name][order] for name in ("boxes", "scores", "labels"))
            difficult = truth.get("difficult", torch.zeros_like(truth["labels"])).bool()
            self.positives += torch.bincount(truth["labels"][~difficult], minlength=self.num_classes)
            outcome = self._match(boxes, labels, truth["boxes"], truth["labels"], difficult)
            counted = (outcome >= 0) & (scores >= self.min_score)
            self.outcomes.append(torch.stack([scores.float(), labels.float(), outcome.float()], 1)[counted])

    def compute(self) -> dict[str, Tensor]:
        """``voc07`` and ``voc10``: means over the classes that have boxes; NaN if none has."""
        return {name: values.nanmean() for name, values in self.per_class().items()}

    def per_class(self) -> dict[str, Tensor]:
        """``voc07`` and ``voc10`` of every class (classes,) on this process; NaN for a class without boxes."""
        device = self.positives.device
        found = dim_zero_cat(self.outcomes) if len(self.outcomes) else torch.zeros(0, 3, device=device)
        _, labels, hits = found[found[:, 0].argsort(descending=True, stable=True)].unbind(1)
        results = {name: torch.full((self.num_classes,), torch.nan, device=device) for name in ("voc07", "voc10")}
        for label in self.positives.nonzero().flatten().tolist():
            curve = precision_recall(hits[labels == label], int(self.positives[label]))
            results["voc07"][label] = eleven_point_average(*curve)
            results["voc10"][label] = area_average(*curve)
        return results

    def _match(self, boxes: Tensor, labels: Tensor, true: Tensor, true_labels: Tensor, difficult: Tensor) -> Tensor:
        """1 for a hit, 0 for a false alarm, -1 for what does not count; (n,), detections in falling order of score."""
        if not len(boxes) or not len(true):
            return torch.zeros_like(labels)
        overlaps = box_iou(boxes, true.to(boxes.dtype))
        overlaps[labels[:, None] != true_labels] = -1
        best, which = overlaps.max(1)
        near, skip = best >= self.min_overlap, difficult[which]
        again = ((which[:, None] == which) & near).tril(-1).any(1)  # a surer detection has hit this box
        return (near & ~skip & ~again).long() - (near & skip).long()


def precision_recall(hits: Tensor, positives: int) -> tuple[Tensor, Tensor]:
    """Precision and recall after each detection, (n,) each; hits are 1, false alarms 0, in falling order of score."""
    found = hits.cumsum(0).float()
    return found / torch.arange(1, len(hits) + 1, device=hits.device), found / positives


def eleven_point_average(precision: Tensor, recall: Tensor) -> float:
    """Mean over the recalls 0, 0.1 ... 1 of the best precision at that recall or more (VOC 2007)."""
    # Compared in tenths and a little below, as 3 / 10 and 0.3 need not be the same number.
    reached = [precision[10 * recall >= tenth - 1e-4] for tenth in range(11)]
    best = [float(values.amax()) if len(values) else 0.0 for values in reached]
    return sum(best) / 11


def area_average(precision: Tensor, recall: Tensor) -> float:
    """Area under the precision that is best at a recall or more (VOC from 2010 on)."""
    envelope = precision.flip(0).cummax(0).values.flip(0) if len(precision) else precision
    steps = recall.diff(prepend=recall.new_zeros(1))
    return float((envelope.double() * steps.double()).sum())
