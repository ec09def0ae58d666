"""Tiny detectors and pictures of coloured rectangles, in the form that DetectionTask takes."""

from __future__ import annotations

from itertools import pairwise

import torch
from pytorch_lightning import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD

from lightning_prune.models import YoloV3Tiny
from lightning_prune.tasks import DetectionTask, Detector, YoloDetector

CLASSES = 2
SIDE = 64
ANCHORS = [(8, 8), (12, 12), (16, 16), (20, 20), (28, 28), (40, 40)]


def picture(generator: torch.Generator, size: tuple[int, int], objects: int) -> tuple[Tensor, dict[str, Tensor]]:
    """A grey image with red (class 0) and blue (class 1) rectangles that may overlap."""
    height, width = size
    image = torch.full((3, height, width), 0.4) + 0.05 * torch.rand(3, height, width, generator=generator)
    boxes, labels = [], []
    for _ in range(objects):
        w, h = (int(torch.randint(14, 30, (), generator=generator)) for _ in range(2))
        x = int(torch.randint(0, width - w, (), generator=generator))
        y = int(torch.randint(0, height - h, (), generator=generator))
        label = int(torch.randint(CLASSES, (), generator=generator))
        image[:, y : y + h, x : x + w] = torch.tensor([1.0, 0, 0] if label == 0 else [0, 0, 1.0])[:, None, None]
        boxes.append([x, y, x + w, y + h])
        labels.append(label)
    target = {
        "boxes": torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
    }
    return image, target


def pictures(count: int = 8, *, same_size: bool = True, seed: int = 0) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Images with one or two objects, the last one with none."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(SIDE, SIDE)] if same_size else [(SIDE, SIDE), (50, 70), (80, 60)]
    return [
        picture(generator, sizes[k % len(sizes)], 0 if k == count - 1 and count > 1 else 1 + k % 2)
        for k in range(count)
    ]


def stacked(samples):
    """Collate images of one size into a tensor."""
    return torch.stack([image for image, _ in samples]), [target for _, target in samples]


def listed(samples):
    """Collate images of any size into a list."""
    return [image for image, _ in samples], [target for _, target in samples]


def loader(samples, batch_size: int = 4, collate=stacked) -> DataLoader:
    return DataLoader(samples, batch_size, collate_fn=collate)


def yolo_task(classes: int = CLASSES, *, loss: str = "ciou", width: float = 0.25, **options) -> DetectionTask:
    """YOLOv3-tiny, narrow, on 64 pixels."""
    detector = options.pop("detector", None) or YoloDetector(SIDE, loss=loss)
    net = YoloV3Tiny(classes, width=width, anchors=ANCHORS, objectness_prior=0.1)
    return DetectionTask(net, classes, detector=detector, **{"input_size": (3, SIDE, SIDE), **options})


class Backbone(nn.Module):
    """Three strided convolutions with batch norm, as the shortest backbone."""

    def __init__(self, as_dict: bool) -> None:
        super().__init__()
        self.out_channels = [32] if as_dict else 32  # as SSD wants it, and the others
        widths = (3, 8, 16, 32)  # FCOS normalises in 32 groups
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.as_dict = as_dict

    def forward(self, x: Tensor):
        x = self.body(x)
        return {"0": x} if self.as_dict else x


def torchvision_detector(name: str, classes: int = CLASSES) -> nn.Module:
    """One of torchvision's detectors, tiny; ``classes`` without background."""
    scale = {"min_size": SIDE, "max_size": SIDE}
    anchors = AnchorGenerator(((12, 20, 32),), ((0.5, 1.0, 2.0),))
    if name in ("faster_rcnn", "mask_rcnn"):
        few = {f"rpn_{n}_nms_top_n_{m}": 40 for n in ("pre", "post") for m in ("train", "test")}
        pool = {"box_detections_per_img": 10, "box_batch_size_per_image": 16}
        kind = FasterRCNN if name == "faster_rcnn" else MaskRCNN
        return kind(Backbone(False), classes + 1, rpn_anchor_generator=anchors, **scale, **few, **pool)
    if name == "retinanet":
        return RetinaNet(Backbone(False), classes, anchor_generator=anchors, **scale, score_thresh=0.001)
    if name == "fcos":
        one = AnchorGenerator(((8,),), ((1.0,),))
        return FCOS(Backbone(False), classes, anchor_generator=one, **scale, score_thresh=0.001)
    boxes = DefaultBoxGenerator([[2]], min_ratio=20, max_ratio=60)
    return SSD(Backbone(True), boxes, (SIDE, SIDE), classes + 1, score_thresh=0.001)


TORCHVISION = ("faster_rcnn", "retinanet", "ssd", "fcos")


class Oracle(Detector):
    """A detector of one's own: finds the boxes that it was told of; its network has one weight."""

    def __init__(self, answers):
        self.answers = answers

    def check(self, model, num_classes):
        pass

    def example(self, images):
        return images

    def losses(self, model, images, targets, step):
        return {"count": model.weight.sum() * sum(len(t["labels"]) for t in targets)}

    def detect(self, model, images):
        return [self.answers[round(image.mean().item(), 6)] for image in images]


def oracle_task(samples, answers, classes=CLASSES):
    told = {round(image.mean().item(), 6): answer for (image, _), answer in zip(samples, answers, strict=True)}
    return DetectionTask(nn.Linear(1, 1), classes, detector=Oracle(told), input_size=(3, 8, 8))


def sure(target, scores=None):
    count = len(target["labels"])
    return {
        "boxes": target["boxes"],
        "labels": target["labels"],
        "scores": torch.ones(count) if scores is None else scores,
    }


def make_trainer(tmp_path, **options) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path}
    settings = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    return Trainer(**{**settings, **quiet, **options})
