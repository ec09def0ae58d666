"""Images with boxes drawn on them, for loggers that take images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import draw_bounding_boxes

COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000", "#000075", "#f032e6")


def draw(image: Tensor, found: dict[str, Tensor], class_names: Sequence[str], *, min_score: float = 0.5) -> Tensor:
    """An image with boxes, class names and scores on it.

    Args:
        image: (C, H, W) in [0, 1], C of 1 or 3.
        found: ``boxes``, ``scores`` and ``labels``.
        class_names: by label.
        min_score: boxes below it are left out (darknet draws from 0.5 on).

    Returns:
        (3, H, W) uint8.

    Example:
        >>> box = torch.tensor([[2.0, 2.0, 9.0, 9.0]])
        >>> found = {"boxes": box, "scores": torch.ones(1), "labels": torch.tensor([0])}
        >>> draw(torch.zeros(3, 12, 12), found, ["cat"])[:, 5, 2].tolist()  # on the left edge
        [230, 25, 75]
    """
    pixels = (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    kept = found["scores"] >= min_score
    if not kept.any():
        return pixels.expand(3, -1, -1)
    labels = found["labels"][kept].tolist()
    scores = found["scores"][kept].tolist()
    return draw_bounding_boxes(
        pixels.expand(3, -1, -1),
        found["boxes"][kept].detach().cpu(),
        labels=[f"{class_names[label]} {score:.2f}" for label, score in zip(labels, scores, strict=True)],
        colors=[COLOURS[label % len(COLOURS)] for label in labels],
    )


def log_images(loggers: Iterable[Any], name: str, images: Sequence[Tensor], step: int) -> None:
    """Hand images (3, H, W) uint8 to those loggers that take any."""
    for logger in loggers if images else ():
        if isinstance(logger, TensorBoardLogger):
            for place, image in enumerate(images):
                logger.experiment.add_image(f"{name}/{place}", image, step)
        elif isinstance(logger, WandbLogger):
            logger.log_image(name, [to_pil_image(image) for image in images])
