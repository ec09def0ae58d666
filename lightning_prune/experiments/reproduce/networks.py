"""Networks that recipes name: small ones that stand in where published ones cannot be trained, and pretrained ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation.fcn import FCN, FCNHead

from lightning_prune import models
from lightning_prune.models import CifarResNet, ThinCifarResNet
from lightning_prune.models.cifar import initialise_

VGG16 = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))


def thin_fcn(depth: int = 20, num_classes: int = 21) -> FCN:
    """The FCN of torchvision with its auxiliary head on a CIFAR ResNet of 16 to 64 channels, output stride 4.

    Example:
        >>> net = thin_fcn(8, num_classes=5)
        >>> {name: tuple(out.shape) for name, out in net(torch.zeros(2, 3, 32, 32)).items()}
        {'out': (2, 5, 32, 32), 'aux': (2, 5, 32, 32)}
    """
    body = ThinCifarResNet(depth, shortcut="B")
    backbone = IntermediateLayerGetter(body, {"layer2": "aux", "layer3": "out"})
    return FCN(backbone, FCNHead(64, num_classes), FCNHead(32, num_classes))


class NarrowVgg16(nn.Module):
    """`CifarVgg16` with a share of its channels: logits (N, num_classes) of images (N, 3, H, W) of up to 32 pixels.

    Args:
        num_classes: width of the logits.
        width: factor on all channel counts.

    Example:
        >>> NarrowVgg16(10, width=0.25)(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """

    def __init__(self, num_classes: int = 10, *, width: float = 0.25) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for full, depth in VGG16:
            outputs = max(1, round(full * width))
            for _ in range(depth):
                layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
                inputs = outputs
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(inputs, num_classes)
        initialise_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images."""
        return self.classifier(torch.flatten(self.features(x), 1))


def pretrained_resnet(name: str, weights: str, num_classes: int = 10) -> CifarResNet:
    """A ResNet for 32x32 images that starts from torchvision's ImageNet weights, which are downloaded.

    Args:
        name: ``resnet18`` to ``resnet101``.
        weights: such as ``ResNet50_Weights.IMAGENET1K_V2``.
        num_classes: width of the logits.
    """
    model: CifarResNet = getattr(models, name)(num_classes=num_classes)
    models.load_torchvision_weights(model, weights)
    return model
