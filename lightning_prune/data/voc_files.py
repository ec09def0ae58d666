"""Pascal VOC's files, read and written; and the masks of the Semantic Boundaries Dataset."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image
from torchvision import datasets
from torchvision.datasets.voc import DATASET_YEAR_DICT

from lightning_prune.data.folder_listing import images_by_stem, numbered_lines
from lightning_prune.data.samples import (
    BadBoxes,
    Samples,
    Target,
    check_boxes,
    check_files,
    read_segmentation,
    target_of,
)
from lightning_prune.data.scenes import CLASS_NAMES, Scene, Scenes
from lightning_prune.errors import DataError

_FOLDERS = {  # the lists of each kind, its annotations or masks, and how these end
    datasets.VOCDetection: ("Main", "Annotations", ".xml"),
    datasets.VOCSegmentation: ("Segmentation", "SegmentationClass", ".png"),
}
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


def listing(kind: Any, root: str, name: str, *, download: bool = False) -> list[tuple[Path, Path]]:
    """Image files of an image set "YEAR/SET", each with its annotation or mask, by one of torchvision's datasets.

    Of a "SET" alone: those that the folder ``root`` itself holds.
    """
    if "/" not in name:
        return _own_listing(kind, Path(root).resolve(), name)
    year, _, image_set = name.partition("/")
    folder = Path(root).resolve()
    try:
        found = kind(str(folder), year=year, image_set=image_set, download=download)
    except ValueError as error:
        raise DataError(f"image sets are named YEAR/SET, such as 2012/train, got {name!r} ({error})") from error
    except (RuntimeError, OSError) as error:
        devkit = folder / ("TrainVal/VOCdevkit" if year == "2011" else "VOCdevkit") / f"VOC{year}"
        problem = f"has no usable image set {image_set!r}" if devkit.is_dir() else "does not exist"
        archive = DATASET_YEAR_DICT["2007-test" if name == "2007/test" else year]["filename"]
        raise DataError(
            f"Pascal VOC: {devkit} {problem} ({error}). Set download: true, or unpack {archive} of "
            f"host.robots.ox.ac.uk/pascal/VOC into {folder}"
        ) from error
    pairs = [(Path(image), Path(target)) for image, target in zip(found.images, found.targets, strict=True)]
    check_files([path for pair in pairs for path in pair], f"image set {name} of {folder}")
    return pairs


def _own_listing(kind: Any, root: Path, name: str) -> list[tuple[Path, Path]]:
    """The same of an image set of a folder that holds what ``VOC2012`` does, its images in any format."""
    lists, folder, ending = _FOLDERS[kind]
    source, images = root / "ImageSets" / lists / f"{name}.txt", root / "JPEGImages"
    missing = [path for path in (root, images, root / folder, source) if not path.exists()]
    if missing:
        raise DataError(
            f"Pascal VOC: {missing[0]} does not exist. The image set {name!r} of {root} needs JPEGImages, {folder} and "
            f"ImageSets/{lists}/{name}.txt there; those of VOCdevkit are named YEAR/SET, such as 2012/train"
        )
    stems, files = numbered_lines(source), images_by_stem(images)
    for number, stem in stems:
        if stem not in files:
            raise DataError(f"{source}, line {number}: {images} holds no image called {stem}")
    check_files(targets := [root / folder / (stem + ending) for _, stem in stems], source)
    return [(files[stem], target) for (_, stem), target in zip(stems, targets, strict=True)]


def read_annotation(path: Path, classes: Sequence[str], image_id: int = 0, bad_boxes: BadBoxes = "refuse") -> Target:
    """One of VOC's XML files. Its boxes count pixels from 1 and include the last: (x1 - 1, y1 - 1, x2, y2) here."""
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        line, column = error.position
        raise DataError(f"{path}, line {line}, column {column + 1}: no valid XML ({error}); unpack it again") from error
    except (LookupError, ValueError) as error:  # of the encoding that the first line names
        raise DataError(f"{path}, line 1: no valid XML ({error}); unpack it again") from error
    size = int(_number(root, "size/height", str(path))), int(_number(root, "size/width", str(path)))
    boxes, labels, difficult = [], [], []
    for number, item in enumerate(root.findall("object"), 1):
        where = f"{path}, object {number}"
        name = (item.findtext("name") or "").strip()
        if name not in classes:
            raise DataError(f"{where}: unknown class {name!r}; the classes are {', '.join(classes)}: set classes")
        x1, y1, x2, y2 = (_number(item, f"bndbox/{edge}", where) for edge in ("xmin", "ymin", "xmax", "ymax"))
        boxes.append([x1 - 1, y1 - 1, x2, y2])
        labels.append(list(classes).index(name))
        difficult.append((item.findtext("difficult") or "0").strip() == "1")
    return check_boxes(target_of(size, boxes, labels, image_id, difficult=difficult), str(path), bad_boxes)


def _number(element: ElementTree.Element, name: str, where: str) -> float:
    text = element.findtext(name)
    try:
        number = float(text or "")
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{where}: {name} is {'missing' if text is None else repr(text)}, not a number")
    return number


def read_classes(path: Path) -> np.ndarray:
    """The class numbers (H, W) of a palette PNG."""
    try:
        with Image.open(path) as image:
            mode, classes = image.mode, np.array(image)
    except (OSError, SyntaxError) as error:
        raise DataError(f"{path} is not a readable mask ({error}); fetch it again") from error
    if mode not in ("P", "L"):
        raise DataError(
            f"{path} holds colours or wide numbers (mode {mode}), not class numbers: masks must have 8 bits a "
            "pixel, grey or with a palette"
        )
    return classes


def sbd_masks(root: str, num_classes: int, transforms: Callable[..., Any]) -> Samples:
    """Images of the Semantic Boundaries Dataset that are not in VOC's val, with their masks."""
    try:
        files = datasets.SBDataset(root, image_set="train_noval", mode="segmentation")
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"SBD: {Path(root).resolve()} does not hold img, cls and train_noval.txt ({error}). Unpack "
            f"{datasets.SBDataset.url} and add {datasets.SBDataset.voc_train_url}"
        ) from error
    items = [(Path(image), Path(mask)) for image, mask in zip(files.images, files.masks, strict=True)]
    check_files([path for item in items for path in item], "SBD's train_noval.txt")
    read = partial(_sbd_classes, files)
    return Samples(items, partial(read_segmentation, read_classes=read, num_classes=num_classes, transforms=transforms))


def _sbd_classes(files: Any, path: Path) -> np.ndarray:
    return np.array(files._get_target(str(path)))


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
    # VOC's colours: the bits of a class number, three at a time, become the high bits of red, green and blue.
    bits = np.arange(256)[:, None] >> np.arange(24) & 1  # of bit b: channel b % 3, 128 >> b // 3
    palette = (bits.reshape(256, 8, 3) << np.arange(7, -1, -1)[:, None]).sum(1).astype(np.uint8).tobytes()
    names = [f"{image_set}_{index:06d}" for index in range(len(scenes))]
    for index, name in enumerate(names):
        scene = scenes[index]
        Image.fromarray(scene.image).save(folder / "JPEGImages" / f"{name}.jpg", quality=95)
        mask = Image.fromarray(scene.mask)
        mask.putpalette(palette)
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
