"""Targets made of boxes, scenes on disk as COCO and CamVid have them, and MNIST's files."""

from __future__ import annotations

import gzip
import json
import struct

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from lightning_prune.data.samples import target_of
from lightning_prune.data.scenes import CLASS_NAMES


def objects(boxes, size=(60, 100), **fields):
    return target_of(size, boxes, range(len(boxes)), 0, **{"area": [1.0] * len(boxes), **fields})


def write_coco(scenes, root, name):
    """Images and instances with run-length masks as in COCO's archives; categories 1 to 10 are the digits 0 to 9."""
    folder, annotations = root / name, root / "annotations"
    folder.mkdir(parents=True, exist_ok=True)
    annotations.mkdir(exist_ok=True)
    images, objects = [], []
    for index in range(len(scenes)):
        scene, image_id = scenes[index], index + 1
        height, width = scene.instances.shape
        file_name = f"{image_id:012d}.jpg"
        Image.fromarray(scene.image).save(folder / file_name, quality=95)
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
    (annotations / f"instances_{name}.json").write_text(json.dumps(content))


def idx(content, *shape, kind=8):
    """An IDX file: a header and what follows it."""
    return bytes([0, 0, kind, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + content


def write_mnist(root, train=20, test=4, *, size=(28, 28), prefix="", part="t10k", ending=""):
    """MNIST's four files of two classes in turns; pixels count up by place and image, in the test part from 100."""
    pack = gzip.compress if ending == ".gz" else bytes
    for name, count in (("train", train), (part, test)):
        first = np.arange(count)[:, None] + 100 * (name != "train")
        pixels = (first + np.arange(size[0] * size[1])).astype(np.uint8).tobytes()
        labels = bytes(index % 2 for index in range(count))
        (root / f"{prefix}{name}-images-idx3-ubyte{ending}").write_bytes(pack(idx(pixels, count, *size)))
        (root / f"{prefix}{name}-labels-idx1-ubyte{ending}").write_bytes(pack(idx(labels, count)))
    return root


def write_camvid(root, parts, void=None):
    """Scenes as PNGs in CamVid's folders; with ``void``, the first row of each mask is of that number."""
    for part, scenes in parts.items():
        (root / part).mkdir(parents=True)
        (root / f"{part}annot").mkdir()
        for index in range(len(scenes)):
            mask = scenes[index].mask.copy()
            if void is not None:
                mask[0] = void
            Image.fromarray(scenes[index].image).save(root / part / f"{index}.png")
            Image.fromarray(mask).save(root / f"{part}annot" / f"{index}.png")
    return root
