"""VGG16 with batch norm and one linear head, for 32x32 images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTHS = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")


class CifarVgg16(nn.Module):
    """VGG16-BN for (N, 3, 32, 32) images, logits (N, num_classes): 13 convolutions with bias, 4224 channels.

    Args:
        num_classes: 10.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for width in WIDTHS:
            if isinstance(width, str):
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [
                    nn.Conv2d(inputs, width, 3, padding=1),
                    nn.BatchNorm2d(width),
                    nn.ReLU(inplace=True),
                ]
                inputs = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


def vgg16_bn(num_classes: int = 10) -> CifarVgg16:
    """VGG16 with batch norm for 32x32 images.

    Example:
        >>> vgg16_bn()(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """
    return CifarVgg16(num_classes)
