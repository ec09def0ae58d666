"""COCO detection, from the original folders."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torchvision.ops import box_convert

from lightning_prune.data.modules import DetectionDataModule, FilesDataModule
from lightning_prune.data.samples import BadBoxes, Samples, check_boxes, check_files, plain, read_detection, target_of
from lightning_prune.data.transforms import Augmentation, detection_evaluation, detection_training
from lightning_prune.errors import DataError


class COCODetection(FilesDataModule, DetectionDataModule):
    """COCO's boxes, letterboxed; targets as in `DetectionDataModule`.

    There is no download: unpack train2017.zip, val2017.zip and annotations_trainval2017.zip of cocodataset.org.
    Labels count from 0 in the order of the file's category numbers, which have gaps (80 of 90 are used). Crowds are
    evaluated with their flag and not trained on. Images without an object stay, as negatives. All annotations are read
    and checked before training starts.

    Args:
        root: folder that holds ``annotations/instances_NAME.json`` and the images as ``NAME/*.jpg``.
        batch_size: images per batch.
        train_on: image set to train on.
        evaluate_on: image set to validate on.
        test_on: image set to test on; None: the one to validate on.
        classes: names of the categories to learn, in the order of the labels; None: all of the training file.
        size: side of the letterbox in pixels; None: images keep their sizes and come as a list.
        augment: of training images: "none", "flip", "yolo" or "ssd", see `detection_training`.
        bad_boxes: see `check_boxes`; "repair" because COCO's own files hold boxes without area.
        drop_last: leave out the last, smaller training batch.
        num_workers: processes that load.

    Raises:
        DataError: a missing folder or file, with the way to get it; a file that is no JSON, with its line; an unknown
            category or image, or with bad_boxes "refuse" a box outside its image.
    """

    def __init__(
        self,
        root: str = "data/coco",
        batch_size: int = 16,
        *,
        train_on: str = "train2017",
        evaluate_on: str = "val2017",
        test_on: str | None = None,
        classes: Sequence[str] | None = None,
        size: int | None = 416,
        augment: Augmentation = "yolo",
        bad_boxes: BadBoxes = "repair",
        drop_last: bool = True,
        num_workers: int = 2,
    ) -> None:
        super().__init__(root, train_on, evaluate_on, test_on, batch_size, num_workers, drop_last)
        self.class_names = None if classes is None else tuple(classes)
        self.bad_boxes = bad_boxes
        self.training = detection_training(augment, size)
        self.evaluation = detection_evaluation(size)

    @property
    def num_classes(self) -> int:
        """Number of classes; of the training file's once it has been read."""
        if self.class_names is None:
            raise DataError("the classes are those of the training file: call setup() first, or set classes")
        return len(self.class_names)

    def _part(self, image_sets: str, transforms: Callable[..., Any], *, train: bool) -> Samples:
        root = Path(self.root).resolve()
        path = root / "annotations" / f"instances_{image_sets}.json"
        content = _read_instances(path)
        if self.class_names is None:
            self.class_names = tuple(row["name"] for row in sorted(content["categories"], key=lambda row: row["id"]))
        labels = _category_labels(content["categories"], self.class_names, path)
        images = sorted(content["images"], key=lambda image: image["id"])
        paths = [root / image_sets / image["file_name"] for image in images]
        check_files(paths, path)
        rows: dict[int | str, list[dict[str, Any]]] = {image["id"]: [] for image in images}
        for row in content["annotations"]:
            if row["category_id"] in labels:
                rows[row["image_id"]].append(row)
        items = []
        for image, file in zip(images, paths, strict=True):
            objects = rows[image["id"]]
            boxes = torch.tensor([row["bbox"] for row in objects], dtype=torch.float32).reshape(-1, 4)
            target = target_of(
                (image["height"], image["width"]),
                box_convert(boxes, "xywh", "xyxy"),
                [labels[row["category_id"]] for row in objects],
                image["id"],
                iscrowd=[bool(row.get("iscrowd", 0)) for row in objects],
                area=[float(row["area"]) for row in objects],
            )
            target = check_boxes(target, f"{path}, image {image['file_name']}", self.bad_boxes)
            items.append((file, plain(target) if train else target))
        return Samples(items, partial(read_detection, transforms=transforms))


def _read_instances(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The ``images``, ``annotations`` and ``categories`` of an instances file, all there and of one another."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"COCO: {path} cannot be read ({error.strerror}). Unpack annotations_trainval2017.zip, train2017.zip and "
            f"val2017.zip of cocodataset.org into {path.parent.parent}"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, byte {error.start}: no valid text; unpack it again") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {error.lineno}, column {error.colno}: no valid JSON ({error.msg}); unpack it again"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of 5000 digits, brackets in brackets without end
        raise DataError(f"{path}: no valid JSON ({error}); unpack it again") from error
    _check_rows(content, path)
    return content


_NUMBER, _ID = (int, float), (int, str)
_ROWS: dict[str, dict[str, tuple[type, ...]]] = {
    "images": {"id": _ID, "file_name": (str,), "height": _NUMBER, "width": _NUMBER},
    "annotations": {"id": _ID, "image_id": _ID, "category_id": _ID, "bbox": (list,), "area": _NUMBER},
    "categories": {"id": _ID, "name": (str,)},
}


def _check_rows(content: Any, path: Path) -> None:
    missing = [part for part in _ROWS if not isinstance(content, dict) or not isinstance(content.get(part), list)]
    if missing:
        raise DataError(f"{path} is no instances file of COCO: it has no {', '.join(missing)}")
    for part, keys in _ROWS.items():
        for number, row in enumerate(content[part], 1):
            row = row if isinstance(row, dict) else {}
            if wrong := [key for key, kinds in keys.items() if not isinstance(row.get(key), kinds)]:
                names = ", ".join(wrong)
                raise DataError(f"{path}: number {number} of its {part} has no {names}, or of the wrong type")
    ids = {part: {row["id"] for row in content[part]} for part in ("images", "categories")}
    for part, found in ids.items():
        if len(found) < len(content[part]):
            raise DataError(f"{path}: its {part} are {len(content[part])} with {len(found)} different ids")
    for row in content["annotations"]:
        where = f"{path}: annotation {row['id']}"
        if row["image_id"] not in ids["images"]:
            raise DataError(f"{where} is of image {row['image_id']}, which the file does not list")
        if row["category_id"] not in ids["categories"]:
            raise DataError(f"{where} has the unknown category {row['category_id']}, which the file does not define")
        if len(row["bbox"]) != 4 or not all(isinstance(edge, _NUMBER) for edge in row["bbox"]):
            raise DataError(f"{where}: bbox is {row['bbox']}, not [x, y, width, height]")


def _category_labels(categories: list[dict[str, Any]], classes: Sequence[str], path: Path) -> dict[int | str, int]:
    """The label of every category that is one of ``classes``, each of which the file has once, by the id."""
    names = [row["name"] for row in categories]
    for name in classes:
        if names.count(name) != 1:
            found = "unknown class" if name not in names else "two categories are called"
            raise DataError(f"{path}: {found} {name!r}; the file's are {', '.join(sorted(names))}")
    return {row["id"]: classes.index(row["name"]) for row in categories if row["name"] in classes}
