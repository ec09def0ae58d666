"""Write scenes to disk as Pascal VOC and as COCO, for whatever reads those formats."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from lightning_prune.data.scenes import CLASS_NAMES, Scene, Scenes

_QUALITY = 95  # of JPEG


def write_voc(scenes: Scenes | Sequence[Scene], root: str | Path, image_set: str = "train", year: int = 2012) -> Path:
    """Images, annotations, class masks and lists as in Pascal VOC's archive; the classes are "0" to "9".

    Args:
        scenes: what to write.
        root: folder in which ``VOCdevkit/VOCyear`` is made, or added to.
        image_set: "train", "val", "trainval" or "test"; the lists of this name are made. `VOCDetection` and
            `VOCSegmentation` read "test" of 2007 alone, as VOC's later ones were never published.
        year: of the folder's name.

    Returns:
        The folder ``VOCdevkit/VOCyear``.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as root:
        ...     folder = write_voc(Scenes("val", 2, size=32), root, "val")
        ...     sorted(path.name for path in folder.iterdir())
        ['Annotations', 'ImageSets', 'JPEGImages', 'SegmentationClass']
    """
    folder = Path(root) / "VOCdevkit" / f"VOC{year}"
    for name in ("JPEGImages", "Annotations", "SegmentationClass", "ImageSets/Main", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    names = []
    for index in range(len(scenes)):
        scene, name = scenes[index], f"{image_set}_{index:06d}"
        names.append(name)
        Image.fromarray(scene.image).save(folder / "JPEGImages" / f"{name}.jpg", quality=_QUALITY)
        mask = Image.fromarray(scene.mask)
        mask.putpalette(voc_palette())
        mask.save(folder / "SegmentationClass" / f"{name}.png")
        tree = _annotation(scene, name, folder.name)
        tree.write(folder / "Annotations" / f"{name}.xml", encoding="unicode")
    for kind in ("Main", "Segmentation"):
        (folder / "ImageSets" / kind / f"{image_set}.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    return folder


def write_coco(scenes: Scenes | Sequence[Scene], root: str | Path, name: str = "train2017") -> Path:
    """Images and instances with run-length masks as in COCO's archives; categories 1 to 10 are the digits 0 to 9.

    Args:
        scenes: what to write.
        root: folder in which ``NAME`` and ``annotations`` are made.
        name: of the image set.

    Returns:
        The instances file.
    """
    folder, annotations = Path(root) / name, Path(root) / "annotations"
    folder.mkdir(parents=True, exist_ok=True)
    annotations.mkdir(exist_ok=True)
    images: list[dict[str, object]] = []
    objects: list[dict[str, object]] = []
    for index in range(len(scenes)):
        scene, image_id = scenes[index], index + 1
        height, width = scene.instances.shape
        file_name = f"{image_id:012d}.jpg"
        Image.fromarray(scene.image).save(folder / file_name, quality=_QUALITY)
        images.append({"id": image_id, "file_name": file_name, "height": height, "width": width})
        for number, (label, box) in enumerate(zip(scene.labels.tolist(), scene.boxes.tolist(), strict=True), 1):
            code = coco_mask.encode(np.asfortranarray(scene.instances == number, dtype=np.uint8))
            objects.append(
                {
                    "id": len(objects) + 1,
                    "image_id": image_id,
                    "category_id": label + 1,
                    "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                    "area": int(coco_mask.area(code)),
                    "iscrowd": 0,
                    "segmentation": {"size": code["size"], "counts": code["counts"].decode("ascii")},
                }
            )
    categories = [{"id": digit + 1, "name": digit_name} for digit, digit_name in enumerate(CLASS_NAMES)]
    content = {"images": images, "annotations": objects, "categories": categories}
    path = annotations / f"instances_{name}.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def voc_palette() -> bytes:
    """VOC's 256 colours: the bits of the index, three at a time, become the high bits of red, green and blue.

    Example:
        >>> list(voc_palette()[:9]), list(voc_palette()[-3:])
        ([0, 0, 0, 128, 0, 0, 0, 128, 0], [224, 224, 192])
    """
    index = np.arange(256)
    colours = np.zeros((256, 3), dtype=np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((index >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return colours.tobytes()


def _annotation(scene: Scene, name: str, folder: str) -> ElementTree.ElementTree:
    height, width = scene.instances.shape
    root = ElementTree.Element("annotation")
    for tag, text in (("folder", folder), ("filename", f"{name}.jpg"), ("segmented", "1")):
        ElementTree.SubElement(root, tag).text = text
    size = ElementTree.SubElement(root, "size")
    for tag, value in (("width", width), ("height", height), ("depth", 3)):
        ElementTree.SubElement(size, tag).text = str(value)
    for label, (x1, y1, x2, y2) in zip(scene.labels, scene.boxes, strict=True):
        item = ElementTree.SubElement(root, "object")
        for tag, text in (
            ("name", CLASS_NAMES[label]),
            ("pose", "Unspecified"),
            ("truncated", "0"),
            ("difficult", "0"),
        ):
            ElementTree.SubElement(item, tag).text = text
        box = ElementTree.SubElement(item, "bndbox")
        # VOC counts pixels from 1 and includes the last one.
        for tag, edge in (("xmin", x1 + 1), ("ymin", y1 + 1), ("xmax", x2), ("ymax", y2)):
            ElementTree.SubElement(box, tag).text = str(int(edge))
    ElementTree.indent(root)
    return ElementTree.ElementTree(root)
