"""Plain networks of the papers.

Here: their layers, the files their weights come from, and what their outputs mean in pixels. Not here: losses and
training (`tasks`), images (`data`), and pruning, of which they know nothing.

For 32x32 images: ``resnet18``, ``34``, ``50``, ``101`` are torchvision's ImageNet architectures with a smaller stem;
``resnet20``, ``32``, ``44``, ``56``, ``110`` are those that He et al. had on CIFAR-10, of 16 to 64 channels; `LeNet`
takes MNIST's digits, padded to that size.
"""

from lightning_prune.models.cifar import CifarResNet, CifarVgg16, resnet18, resnet34, resnet50, resnet101, vgg16_bn
from lightning_prune.models.cifar_thin import (
    ThinCifarResNet,
    resnet20,
    resnet32,
    resnet44,
    resnet56,
    resnet110,
)
from lightning_prune.models.darknet_weights import DarknetFile, load_darknet_weights, save_darknet_weights
from lightning_prune.models.lenet import LeNet
from lightning_prune.models.weights import load_public_weights, load_torchvision_weights
from lightning_prune.models.yolo_parts import YoloNetwork
from lightning_prune.models.yolo_v3 import YoloV3, YoloV3Tiny

__all__ = [
    "CifarResNet",
    "CifarVgg16",
    "DarknetFile",
    "LeNet",
    "ThinCifarResNet",
    "YoloNetwork",
    "YoloV3",
    "YoloV3Tiny",
    "load_darknet_weights",
    "load_public_weights",
    "load_torchvision_weights",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet34",
    "resnet44",
    "resnet50",
    "resnet56",
    "resnet101",
    "resnet110",
    "save_darknet_weights",
    "vgg16_bn",
]
