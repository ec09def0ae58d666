"""Networks for 32x32 images: torchvision's ResNets with a 3x3 stem of stride 1, under its module names, and VGG16.

They have 64 to 512 (times 4) channels; the thin ones that CIFAR-10's first paper had, ResNet-20 to 110, are in
`lightning_prune.models.cifar_thin`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """3x3 convolution with padding."""
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (ResNet-18, 34)."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3x3(inputs, width, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv3x3(width, width), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut (ResNet-50, 101)."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv3x3(width, width, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class CifarResNet(nn.Module):
    """ResNet for (N, 3, 32, 32) images, logits (N, num_classes).

    Args:
        block: `BasicBlock` or `Bottleneck`.
        depths: blocks per stage.
        num_classes: 10; the papers' published FLOPs were counted with 1000.
        max_pool: keep ImageNet's pooling after the stem, as Lee et al. (Sensors 23(4):2102) do; False for the
            ResNet-18 of Li et al. (Symmetry 14(7):1372).
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        depths: Sequence[int],
        *,
        num_classes: int = 10,
        max_pool: bool = True,
    ) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = conv3x3(3, 64), nn.BatchNorm2d(64), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if max_pool else nn.Identity()
        self.inputs = 64
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            self._stage(block, 64 * 2**k, depth, 1 if k == 0 else 2) for k, depth in enumerate(depths)
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        initialise_(self)

    def _stage(self, block: type[BasicBlock | Bottleneck], width: int, depth: int, stride: int) -> nn.Sequential:
        outputs = width * block.expansion
        downsample = None
        if stride != 1 or self.inputs != outputs:
            downsample = nn.Sequential(nn.Conv2d(self.inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        blocks = [block(self.inputs, width, stride, downsample)]
        blocks += [block(outputs, width, 1, None) for _ in range(depth - 1)]
        self.inputs = outputs
        return nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def resnet18(num_classes: int = 10, max_pool: bool = True) -> CifarResNet:
    """ResNet-18 for 32x32 images.

    Example:
        >>> resnet18()(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """
    return CifarResNet(BasicBlock, (2, 2, 2, 2), num_classes=num_classes, max_pool=max_pool)


def resnet34(num_classes: int = 10, max_pool: bool = True) -> CifarResNet:
    """ResNet-34 for 32x32 images."""
    return CifarResNet(BasicBlock, (3, 4, 6, 3), num_classes=num_classes, max_pool=max_pool)


def resnet50(num_classes: int = 10, max_pool: bool = True) -> CifarResNet:
    """ResNet-50 for 32x32 images."""
    return CifarResNet(Bottleneck, (3, 4, 6, 3), num_classes=num_classes, max_pool=max_pool)


def resnet101(num_classes: int = 10, max_pool: bool = True) -> CifarResNet:
    """ResNet-101 for 32x32 images."""
    return CifarResNet(Bottleneck, (3, 4, 23, 3), num_classes=num_classes, max_pool=max_pool)


class CifarVgg16(nn.Module):
    """VGG16-BN for (N, 3, 32, 32) images, logits (N, num_classes): 13 convolutions with bias, one linear head."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
            for _ in range(depth):
                layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                inputs = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(inputs, num_classes)
        initialise_(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


def vgg16_bn(num_classes: int = 10) -> CifarVgg16:
    """VGG16 with batch norm for 32x32 images.

    Example:
        >>> vgg16_bn()(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """
    return CifarVgg16(num_classes)


def initialise_(model: nn.Module) -> None:
    """He initialisation of every convolution."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
