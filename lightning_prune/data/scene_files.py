"""Scenes written to disk as Pascal VOC, for whatever reads that format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from lightning_prune.data.scenes import CLASS_NAMES, Scene, Scenes

_ANNOTATION = """<annotation>
  <folder>{folder}</folder>
  <filename>{name}.jpg</filename>
  <segmented>1</segmented>
  <size>
    <width>{width}</width>
    <height>{height}</height>
    <depth>3</depth>
  </size>
{objects}</annotation>"""
# VOC counts pixels from 1 and includes the last one.
_OBJECT = """  <object>
    <name>{name}</name>
    <pose>Unspecified</pose>
    <truncated>0</truncated>
    <difficult>0</difficult>
    <bndbox>
      <xmin>{xmin:.0f}</xmin>
      <ymin>{ymin:.0f}</ymin>
      <xmax>{xmax:.0f}</xmax>
      <ymax>{ymax:.0f}</ymax>
    </bndbox>
  </object>
"""


def write_voc(scenes: Scenes | Sequence[Scene], root: str | Path, image_set: str = "train") -> Path:
    """Images, annotations, class masks and lists as in Pascal VOC's archive; the classes are "0" to "9".

    Args:
        scenes: what to write.
        root: folder in which ``VOCdevkit/VOC2012`` is made, or added to.
        image_set: "train", "val" or "trainval"; the lists of this name are made.

    Returns:
        The folder ``VOCdevkit/VOC2012``.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as root:
        ...     folder = write_voc(Scenes("val", 2, size=32), root, "val")
        ...     sorted(path.name for path in folder.iterdir())
        ['Annotations', 'ImageSets', 'JPEGImages', 'SegmentationClass']
    """
    folder = Path(root) / "VOCdevkit" / "VOC2012"
    for part in ("JPEGImages", "Annotations", "SegmentationClass", "ImageSets/Main", "ImageSets/Segmentation"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    names = [f"{image_set}_{index:06d}" for index in range(len(scenes))]
    for index, name in enumerate(names):
        scene = scenes[index]
        Image.fromarray(scene.image).save(folder / "JPEGImages" / f"{name}.jpg", quality=95)
        mask = Image.fromarray(scene.mask)
        mask.putpalette(voc_palette())
        mask.save(folder / "SegmentationClass" / f"{name}.png")
        objects = "".join(
            _OBJECT.format(name=CLASS_NAMES[label], xmin=x1 + 1, ymin=y1 + 1, xmax=x2, ymax=y2)
            for label, (x1, y1, x2, y2) in zip(scene.labels, scene.boxes, strict=True)
        )
        height, width = scene.mask.shape
        text = _ANNOTATION.format(folder=folder.name, name=name, width=width, height=height, objects=objects)
        (folder / "Annotations" / f"{name}.xml").write_text(text, encoding="utf-8")
    for kind in ("Main", "Segmentation"):
        (folder / "ImageSets" / kind / f"{image_set}.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    return folder


def voc_palette() -> bytes:
    """VOC's 256 colours: the bits of the index, three at a time, become the high bits of red, green and blue.

    Example:
        >>> list(voc_palette()[:9]), list(voc_palette()[-3:])
        ([0, 0, 0, 128, 0, 0, 0, 128, 0], [224, 224, 192])
    """
    bits = np.arange(256)[:, None] >> np.arange(24) & 1  # of bit b: channel b % 3, 128 >> b // 3
    return (bits.reshape(256, 8, 3) << np.arange(7, -1, -1)[:, None]).sum(1).astype(np.uint8).tobytes()
