"""VOC's average precision against cases worked by hand."""

from __future__ import annotations

import pytest
import torch

from lightning_prune.tasks import VocMeanAveragePrecision
from lightning_prune.tasks.voc_map import area_average, eleven_point_average, precision_recall

BOX = [10.0, 10.0, 20.0, 20.0]
FAR = [40.0, 40.0, 50.0, 50.0]
SHIFTED = [11.0, 10.0, 21.0, 20.0]  # overlap 90 / 110


def found(*rows):
    """Rows of (box, score, label)."""
    boxes, scores, labels = zip(*rows, strict=True) if rows else ((), (), ())
    return {
        "boxes": torch.tensor(boxes).view(-1, 4),
        "scores": torch.tensor(scores).view(-1),
        "labels": torch.tensor(labels, dtype=torch.int64),
    }


def truth(*rows, difficult=None):
    """Rows of (box, label)."""
    boxes, labels = zip(*rows, strict=True) if rows else ((), ())
    target = {"boxes": torch.tensor(boxes).view(-1, 4), "labels": torch.tensor(labels, dtype=torch.int64)}
    return target if difficult is None else {**target, "difficult": torch.tensor(difficult)}


def measured(images, classes=1, **options):
    metric = VocMeanAveragePrecision(classes, **options)
    for detections, target in images:
        metric.update([detections], [target])
    return metric


def values(metric):
    return {name: value.item() for name, value in metric.compute().items()}


def test_a_curve_worked_by_hand():
    """Hits 1 0 1 1 0 of four boxes: precision 1, 1/2, 2/3, 3/4, 3/5 at recall 1/4, 1/4, 1/2, 3/4, 3/4.

    From a recall on the best precision is 1 up to 1/4, then 3/4 up to 3/4, then 0. Eleven points: 0, .1, .2 take 1,
    .3 to .7 take 3/4. Area: 1/4 + 1/2 x 3/4.
    """
    curve = precision_recall(torch.tensor([1, 0, 1, 1, 0]), 4)
    assert eleven_point_average(*curve) == pytest.approx((3 * 1 + 5 * 0.75) / 11)
    assert area_average(*curve) == pytest.approx(0.25 + 0.5 * 0.75)


@pytest.mark.parametrize("positives", [3, 7, 10, 30])
def test_a_perfect_curve_is_worth_one(positives):
    curve = precision_recall(torch.ones(positives, dtype=torch.int64), positives)
    assert eleven_point_average(*curve) == pytest.approx(1)
    assert area_average(*curve) == pytest.approx(1)


@pytest.mark.parametrize(("hits", "points"), [(3, 4), (1, 2), (7, 8)])
def test_a_recall_of_tenths_reaches_its_point(hits, points):
    """3 / 10 in float32 is a little more than 0.3, 7 / 10 a little less than 0.7."""
    curve = precision_recall(torch.ones(hits, dtype=torch.int64), 10)
    assert eleven_point_average(*curve) == pytest.approx(points / 11)


def test_the_same_curve_from_boxes():
    """Hits 1 0 1 1 0 over two images, whose detections are mixed by their scores."""
    other = [60.0, 10.0, 70.0, 20.0]
    metric = measured(
        [
            (found((BOX, 0.9, 0), (SHIFTED, 0.8, 0), (FAR, 0.6, 0)), truth((BOX, 0), (FAR, 0), (other, 0))),
            (found(([0.0, 0, 5, 5], 0.5, 0), (FAR, 0.7, 0)), truth((FAR, 0))),
        ]
    )
    assert values(metric) == pytest.approx({"voc07": (3 + 5 * 0.75) / 11, "voc10": 0.25 + 0.5 * 0.75})


def test_a_second_detection_of_a_box_is_a_false_alarm():
    metric = measured([(found((SHIFTED, 0.9, 0), (BOX, 0.8, 0)), truth((BOX, 0), (FAR, 0)))])
    assert values(metric)["voc10"] == pytest.approx(0.5)
    assert torch.cat(metric.outcomes)[:, 2].tolist() == [1, 0]


def test_difficult_boxes_neither_count_nor_punish():
    images = [
        (found((BOX, 0.9, 0), (SHIFTED, 0.8, 0), (FAR, 0.7, 0)), truth((BOX, 0), (FAR, 0), difficult=[True, False]))
    ]
    assert values(measured(images)) == pytest.approx({"voc07": 1.0, "voc10": 1.0})
    images[0][1]["difficult"] = torch.tensor([False, False])
    assert values(measured(images))["voc10"] == pytest.approx(0.5 + 0.5 * 2 / 3)


def test_classes_are_matched_apart_and_absent_ones_do_not_count():
    metric = measured([(found((BOX, 0.9, 1), (FAR, 0.8, 0), (BOX, 0.7, 2)), truth((BOX, 0), (FAR, 0), (BOX, 1)))], 3)
    per_class = metric.per_class()["voc10"]
    assert per_class[:2].tolist() == pytest.approx([0.5, 1.0])
    assert per_class[2].isnan()
    assert values(metric)["voc10"] == pytest.approx(0.75)


def test_an_overlap_of_exactly_the_limit_is_a_hit():
    half = [10.0, 10.0, 20.0, 15.0]
    assert values(measured([(found((half, 0.9, 0)), truth((BOX, 0)))]))["voc10"] == 1
    assert values(measured([(found((half, 0.9, 0)), truth((BOX, 0)))], min_overlap=0.51))["voc10"] == 0


def test_a_detection_goes_to_the_box_it_overlaps_most_even_if_that_is_taken():
    near = [10.0, 10.0, 20.0, 23.0]
    metric = measured([(found((BOX, 0.9, 0), (SHIFTED, 0.8, 0)), truth((BOX, 0), (near, 0)))])
    assert torch.cat(metric.outcomes)[:, 2].tolist() == [1, 0]


@pytest.mark.parametrize(("min_score", "expected"), [(0.0, 0.5), (0.1, 0.5), (0.13, 0.0), (0.2, 0.0)])
def test_low_scores_can_be_left_out(min_score, expected):
    images = [(found((FAR, 0.15, 0), (BOX, 0.125, 0)), truth((BOX, 0)))]
    assert values(measured(images, min_score=min_score))["voc10"] == expected


def test_nothing_found_and_nothing_to_find():
    assert values(measured([(found(), truth((BOX, 0)))])) == {"voc07": 0.0, "voc10": 0.0}
    assert all(value.isnan() for value in measured([(found((BOX, 0.9, 0)), truth())]).compute().values())


def test_it_can_be_reset():
    metric = measured([(found((BOX, 0.9, 0)), truth((BOX, 0)))])
    metric.reset()
    metric.update([found()], [truth((BOX, 0))])
    assert values(metric)["voc10"] == 0
