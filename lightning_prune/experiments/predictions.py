"""Predictions of several models on the same test images: how many differ, and pictures of them side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor

from lightning_prune.experiments.runner import Runner
from lightning_prune.reconstruction import LosslessReport, check_lossless
from lightning_prune.report import Predictions
from lightning_prune.tasks.drawing import jpeg

PIXELS = 0.01  # boxes that are closer are the same
DRAWN_IMAGES = 4


def check_predictions(
    runner: Runner, masked: LightningModule, small: LightningModule
) -> tuple[LosslessReport, tuple[int, int]]:
    """Outputs of one batch in float64; how many predictions of the test part changed, and how many there are."""
    images = next(iter(runner.data.test_dataloader()))[0]
    example = small.example_input_array
    # A detector may take its images in another form than the data have.
    alike = isinstance(images, Tensor) and isinstance(example, Tensor) and images.shape[1:] == example.shape[1:]
    lossless = check_lossless(masked, small, images if alike else example)
    pairs = zip(runner.predict(masked), runner.predict(small), strict=True)
    changed, total = map(sum, zip(*(count_changed(before, after) for before, after in pairs), strict=True))
    return lossless, (changed, total)


def draw_predictions(runner: Runner, models: Mapping[str, LightningModule]) -> tuple[Predictions, ...]:
    """A few test images with what is true and what each model finds; none if the task does not draw."""
    draw: dict[str, Any] = {name: getattr(model, "draw_predictions", None) for name, model in models.items()}
    if None in draw.values():
        return ()
    batch = next(iter(runner.data.test_dataloader()))
    drawn = {"truth": next(iter(draw.values()))(batch)}
    for name, model in models.items():
        drawn[name] = draw[name](batch, runner.predict(model, 1)[0])
    return tuple(Predictions(name, tuple(map(jpeg, images[:DRAWN_IMAGES]))) for name, images in drawn.items())


def count_changed(before: Any, after: Any) -> tuple[int, int]:
    """Of a batch's predictions: (changed, compared), or (0, 0) for what is no scores (N, C, ...), classes or boxes."""
    if isinstance(before, Tensor) and isinstance(after, Tensor):
        if before.is_floating_point():
            if before.dim() < 2:
                return 0, 0
            before, after = before.argmax(1), after.argmax(1)
        return int((before != after).sum()), before.numel()
    if isinstance(before, Sequence) and all(isinstance(found, Mapping) and "boxes" in found for found in before):
        changed = sum(not _same_objects(*pair) for pair in zip(before, after, strict=True))
        return changed, len(before)
    return 0, 0


def _same_objects(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> bool:
    if not torch.equal(before["labels"], after["labels"]):
        return False
    return torch.allclose(before["boxes"], after["boxes"], rtol=0, atol=PIXELS)
