"""Plain networks of the papers; nothing in them knows of pruning."""

from lightning_prune.models.resnet_cifar import CifarResNet, resnet18, resnet34, resnet50, resnet101
from lightning_prune.models.vgg_cifar import CifarVgg16, vgg16_bn
from lightning_prune.models.weights import load_torchvision_weights

__all__ = [
    "CifarResNet",
    "CifarVgg16",
    "load_torchvision_weights",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "vgg16_bn",
]
