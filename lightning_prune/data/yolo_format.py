"""Detection of one's own objects in ultralytics' layout."""

from __future__ import annotations

from functools import cached_property, partial
from pathlib import Path

import torch

from lightning_prune.data.modules import DetectionDataModule
from lightning_prune.data.samples import BadBoxes, Samples, check_boxes, image_size, read_detection, target_of
from lightning_prune.data.transforms import Augmentation, detection_evaluation, detection_training
from lightning_prune.data.yolo_files import Description, images_of, label_file, read_boxes, read_description
from lightning_prune.errors import DataError


class YOLODetection(DetectionDataModule):
    r"""Boxes in the text files that ultralytics' YOLO trains on, letterboxed; targets as in `DetectionDataModule`.

    ``data.yaml`` says where the images of ``train``, ``val`` and, if there is one, ``test`` are (folders, lists of
    images in .txt files, or several of them), relative to its ``path`` or else to itself, and the ``names`` of the
    classes. The objects of ``images/train/1.jpg`` are in ``labels/train/1.txt``, a line each: class, centre x and y,
    width and height, in shares of the image's sides; or a class and an outline, of which the box around it is taken.
    An image without such a file has no objects, and stays as a negative. Images are turned as their EXIF says. All
    label files are read and checked before training starts.

    Args:
        root: the data.yaml, or its folder.
        batch_size: images per batch.
        size: side of the letterbox in pixels; None: images keep their sizes and come as a list.
        augment: of training images: "none", "flip", "yolo" or "ssd", see `detection_training`.
        bad_boxes: see `check_boxes`.
        drop_last: leave out the last, smaller training batch.
        num_workers: processes that load.

    Attributes:
        class_names: in the order of their numbers.
        num_classes: how many there are.

    Raises:
        DataError: a file or folder that is missing, a data.yaml that is no YAML or lacks something, an image that
            cannot be read, a part without any label file, a line that is no box, or with bad_boxes "refuse" a box
            outside its image. All name the file, and the line.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for folder in ("images", "labels"):
        ...         Path(root, folder).mkdir()
        ...     Image.new("RGB", (40, 20)).save(Path(root, "images", "1.png"))
        ...     _ = Path(root, "labels", "1.txt").write_text("1 0.5 0.5 0.25 0.5")
        ...     text = "train: images\nval: images\nnames: [cat, dog]"
        ...     _ = Path(root, "data.yaml").write_text(text)
        ...     data = YOLODetection(root, batch_size=1, size=None, num_workers=0)
        ...     data.setup()
        ...     images, targets = next(iter(data.val_dataloader()))
        ...     data.class_names, targets[0]["boxes"].tolist(), targets[0]["labels"].tolist()
        (('cat', 'dog'), [[15.0, 5.0, 25.0, 15.0]], [1])
    """

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 16,
        *,
        size: int | None = 416,
        augment: Augmentation = "yolo",
        bad_boxes: BadBoxes = "refuse",
        drop_last: bool = True,
        num_workers: int = 2,
    ) -> None:
        super().__init__(batch_size, num_workers, drop_last)
        self.root = root
        self.bad_boxes = bad_boxes
        self.training = detection_training(augment, size)
        self.evaluation = detection_evaluation(size)

    @cached_property
    def description(self) -> Description:
        """What the data.yaml says."""
        return read_description(Path(self.root))

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.description.names

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def _load(self) -> dict[str, Samples]:
        parts = {part: self._samples(part) for part in self.description.places}
        return {"test": parts["val"], **parts}

    def _samples(self, part: str) -> Samples:
        images = images_of(self.description, part)
        files = [label_file(image) for image in images]
        if not any(file.is_file() for file in files):
            hint = ": add them, or take test out" if part == "test" else ""
            raise DataError(
                f"{self.description.path}: none of the {len(images)} images of {part} has a label file, such as "
                f"{files[0]} for {images[0].name}{hint}"
            )
        items = []
        for number, (image, file) in enumerate(zip(images, files, strict=True)):
            height, width = image_size(image, upright=True)
            found = read_boxes(file, self.num_classes) if file.is_file() else []
            shares = torch.tensor([box for _, box in found], dtype=torch.float64).reshape(-1, 4)
            boxes = shares * torch.tensor([width, height, width, height])
            target = target_of((height, width), boxes, [label for label, _ in found], number)
            items.append((image, check_boxes(target, str(file), self.bad_boxes)))
        transforms = self.training if part == "train" else self.evaluation
        return Samples(items, partial(read_detection, transforms=transforms, upright=True))
