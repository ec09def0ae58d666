"""Predictions of two models side by side: classes, pixels and boxes that changed."""

from __future__ import annotations

import torch

from lightning_prune.experiments.predictions import PIXELS, count_changed


def objects(*labels: int, shift: float = 0.0) -> dict[str, torch.Tensor]:
    boxes = torch.tensor([[4.0, 4, 9, 9]] * len(labels)).view(-1, 4) + shift
    return {"boxes": boxes, "labels": torch.tensor(labels, dtype=torch.int64)}


def test_classes_of_images_and_of_pixels():
    scores = torch.rand(5, 3)
    swapped = scores.clone()
    swapped[1] = scores[1, scores[1].argsort(descending=True)].roll(1)
    assert count_changed(scores, scores + 1) == (0, 5)
    changed = int((scores.argmax(1) != swapped.argmax(1)).sum())
    assert count_changed(scores, swapped) == (changed, 5)
    classes = torch.randint(4, (2, 6, 6))
    other = classes.clone()
    other[1, 2, 3:] += 1
    assert count_changed(classes, other) == (3, 72)
    logits = torch.nn.functional.one_hot(classes).movedim(-1, 1).double()
    assert count_changed(logits, logits.roll(1, 1)) == (72, 72)


def test_an_image_with_another_box_label_or_number_of_objects_has_changed():
    before = [objects(1, 2), objects(), objects(0)]
    assert count_changed(before, [objects(1, 2, shift=PIXELS / 2), objects(), objects(0)]) == (0, 3)
    assert count_changed(before, [objects(1, 2, shift=PIXELS * 2), objects(), objects(0)]) == (1, 3)
    assert count_changed(before, [objects(1, 1), objects(2), objects()]) == (3, 3)


def test_predictions_in_another_form_are_not_counted():
    assert count_changed(torch.rand(4), torch.rand(4)) == (0, 0)
    assert count_changed({"out": torch.rand(4, 2)}, {"out": torch.rand(4, 2)}) == (0, 0)
    assert count_changed([torch.rand(4, 2)], [torch.rand(4, 2)]) == (0, 0)
