"""ultralytics (AGPL-3.0): the module inside ``YOLO("yolov8n.yaml")``, of all versions and tasks."""

from __future__ import annotations

from functools import partial

from torch import nn

from benchmarks.zoo.users.model import Model

DETECT = (
    "yolov3-tiny yolov3-tinyu yolov5n yolov5s yolov5n-p6 yolov6n yolov6s yolov8n yolov8s yolov8n-ghost yolov8n-p2 "
    "yolov8n-p6 yolov9t yolov9s yolov10n yolov10s yolo11n yolo11s yolo12n yolo12s yolo26n"
)
OTHER_TASKS = (
    "yolov8n-seg yolov8n-pose yolov8n-obb yolov8n-cls yolov8s-seg yolov8s-pose yolov8s-obb yolov8s-cls yolo11n-seg "
    "yolo11n-pose yolo11n-obb yolo11n-cls yolo12n-seg yolo12n-pose yolo12n-obb yolo12n-cls yolo26n-seg yolo26n-pose"
)
TRANSFORMERS = "rtdetr-l rtdetr-resnet50 yolov8n-rtdetr"


def _yolo(name: str) -> nn.Module:
    from ultralytics import RTDETR, YOLO

    return (RTDETR if "rtdetr" in name else YOLO)(f"{name}.yaml").model.requires_grad_()


def _family(name: str) -> str:
    """yolov8n-seg is of yolov8."""
    stem = name.partition("-")[0]
    return stem if stem == "rtdetr" else stem.rstrip("nstl")


def _kind(name: str) -> str:
    return "hybrid" if "rtdetr" in name else "cnn"


#: Strides reach 32, or 64 (p6).
MODELS = {
    name: Model(
        partial(_yolo, name),
        _family(name),
        _kind(name),
        ((128, 128), (192, 128)) if "p6" in name else ((64, 64), (96, 64), (96, 96)),
    )
    for name in f"{DETECT} {OTHER_TASKS} {TRANSFORMERS}".split()
    if name != "yolov3-tinyu"
}
