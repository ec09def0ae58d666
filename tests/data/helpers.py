"""Targets made of boxes, and scenes on disk as COCO."""

from __future__ import annotations

import json

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
