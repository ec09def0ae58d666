"""Images with predictions drawn on them, for reports and for loggers that take images."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from PIL import ImageDraw, ImageFont
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_segmentation_masks

SIDE = 256  # pixels; on smaller images a label would cover what it names
MIN_SCORE = 0.5  # from which darknet draws
COLOURS = (
    "#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000", "#000075", "#f032e6",
    "#800000",
)  # fmt: skip


def draw(image: Tensor, found: dict[str, Tensor], class_names: Sequence[str]) -> Tensor:
    """An image (C, H, W) in [0, 1] with boxes, class names and scores on it, the surest on top; uint8, enlarged."""
    pixels, factor = _enlarged(image)
    scores = found.get("scores", torch.ones(len(found["labels"])))
    picture = to_pil_image(pixels)
    canvas, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    for place in scores.argsort(stable=True).tolist():
        if scores[place] < MIN_SCORE:
            continue
        label, box = int(found["labels"][place]), (found["boxes"][place].detach().float() * factor).tolist()
        text = class_names[label] + (f" {scores[place]:.2f}" if "scores" in found else "")
        colour, corner = COLOURS[label % len(COLOURS)], (box[0] + 3, box[1] + 1)
        canvas.rectangle(box, outline=colour, width=2)
        canvas.rectangle((*box[:2], canvas.textbbox(corner, text, font)[2] + 3, box[1] + 17), colour)
        canvas.text(corner, text, "white", font)
    return pil_to_tensor(picture)


def draw_classes(image: Tensor, classes: Tensor, clear: Sequence[int | None] = (0, 255)) -> Tensor:
    """An image in the grey levels that it has, a colour over every pixel (H, W) whose class is none of `clear`."""
    low, high = image.amin(), image.amax()
    pixels, factor = _enlarged((image - low) / (high - low).clamp(min=torch.finfo(image.dtype).tiny))
    classes = classes.cpu().repeat_interleave(factor, 0).repeat_interleave(factor, 1)
    shown = [int(label) for label in classes.unique() if label not in clear]
    if not shown:
        return pixels
    masks = torch.stack([classes == label for label in shown])
    return draw_segmentation_masks(pixels, masks, 0.6, [COLOURS[(label - 1) % len(COLOURS)] for label in shown])


def jpeg(image: Tensor) -> str:
    """An image (3, H, W) uint8 as a JPEG file in base64, for a page."""
    stream = io.BytesIO()
    to_pil_image(image).save(stream, "JPEG", quality=85)
    return base64.b64encode(stream.getvalue()).decode()


def _enlarged(image: Tensor) -> tuple[Tensor, int]:
    """(3, kH, kW) uint8 with sides of 256 pixels at least, and k; images that are neither grey nor RGB become grey."""
    image = image if len(image) in (1, 3) else image.mean(0, keepdim=True)
    pixels = (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().expand(3, -1, -1)
    factor = max(1, -(-SIDE // min(pixels.shape[-2:])))
    return pixels.repeat_interleave(factor, 1).repeat_interleave(factor, 2), factor


def image_loggers(loggers: Iterable[Any]) -> list[Any]:
    """Those that take images."""
    return [logger for logger in loggers if isinstance(logger, TensorBoardLogger | WandbLogger)]


def log_images(loggers: Iterable[Any], name: str, images: Sequence[Tensor], step: int) -> None:
    """Hand images (3, H, W) uint8 to those loggers that take any."""
    for logger in image_loggers(loggers) if images else ():
        if isinstance(logger, TensorBoardLogger):
            for place, image in enumerate(images):
                logger.experiment.add_image(f"{name}/{place}", image, step)
        else:
            logger.log_image(name, [to_pil_image(image) for image in images])
