"""Plain networks of the papers.

Here: their layers, the files their weights come from, and what their outputs mean in pixels. Not here: losses and
training (`tasks`), images (`data`), and pruning, of which they know nothing.
"""

from lightning_prune.models.cifar import CifarResNet, CifarVgg16, resnet18, resnet34, resnet50, resnet101, vgg16_bn
from lightning_prune.models.darknet_weights import DarknetFile, load_darknet_weights, save_darknet_weights
from lightning_prune.models.weights import load_torchvision_weights
from lightning_prune.models.yolo_parts import YoloNetwork
from lightning_prune.models.yolo_v3 import YoloV3, YoloV3Tiny

__all__ = [
    "CifarResNet",
    "CifarVgg16",
    "DarknetFile",
    "YoloNetwork",
    "YoloV3",
    "YoloV3Tiny",
    "load_darknet_weights",
    "load_torchvision_weights",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "save_darknet_weights",
    "vgg16_bn",
]
