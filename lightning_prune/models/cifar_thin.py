"""ResNet-20, 32, 44, 56 and 110 for 32x32 images: three stages of 16, 32 and 64 channels.

He et al., Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2; the networks of most published tables
on CIFAR-10. Their modules have the names of the weights that are public for them.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_prune.errors import ModelError, check_choice
from lightning_prune.models.cifar import conv3x3, initialise_

Shortcut = Literal["A", "B"]


class PaddedShortcut(nn.Module):
    """Option A: every second pixel, and channels of zeros before and behind; no parameters.

    The zeros are buffers, one for each channel, so that channels that go take theirs along: the amounts of a padding
    are numbers in the code, and the channels that it makes would have to stay.
    """

    before: Tensor
    after: Tensor

    def __init__(self, stride: int, before: int, after: int) -> None:
        super().__init__()
        self.stride = stride
        for name, channels in (("before", before), ("after", after)):
            self.register_buffer(name, torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        before, after = (zeros.to(x.dtype).expand(len(x), -1, *x.shape[2:]) for zeros in (self.before, self.after))
        return torch.cat((before, x, after), 1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Public weights hold no zeros."""
        for name, zeros in self.named_buffers():
            state_dict.setdefault(prefix + name, zeros)
        super()._load_from_state_dict(state_dict, prefix, *args)


class ThinBasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a module of its own where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3x3(inputs, outputs, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv3x3(outputs, outputs), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs and shortcut == "A":
            before = (outputs - inputs) // 2
            self.shortcut = PaddedShortcut(stride, before, outputs - inputs - before)
        elif inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return self.relu(out)


class ThinCifarResNet(nn.Module):
    """ResNet of 6n + 2 layers for (N, 3, 32, 32) images, logits (N, num_classes).

    Args:
        depth: 6n + 2: 20, 32, 44, 56, 110, ...
        shortcut: where the number of channels doubles, "A": zeros for the new channels, as He et al. have it on
            CIFAR-10 and the public weights need it; "B": a 1x1 convolution with batch norm.
        num_classes: width of the logits.

    Raises:
        ModelError: another depth or shortcut.
    """

    def __init__(self, depth: int, *, shortcut: Shortcut = "A", num_classes: int = 10) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ModelError(f"depth must be 6n + 2, such as 20, 32, 44, 56, 110, got {depth!r}")
        check_choice("shortcut", shortcut, Shortcut, ModelError)
        self.conv1, self.bn1, self.relu = conv3x3(3, 16), nn.BatchNorm2d(16), nn.ReLU(inplace=True)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(
                ThinBasicBlock(inputs, outputs, stride, shortcut),
                *(ThinBasicBlock(outputs, outputs, 1, shortcut) for _ in range((depth - 2) // 6 - 1)),
            )
            for inputs, outputs, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2))
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64, num_classes)
        initialise_(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(torch.flatten(self.avgpool(x), 1))


def resnet20(shortcut: Shortcut = "A", num_classes: int = 10) -> ThinCifarResNet:
    """ResNet-20 of He et al. for 32x32 images: 0.27 M parameters.

    Public weights are loaded by `load_public_weights`.

    Example:
        >>> model = resnet20()
        >>> model(torch.zeros(1, 3, 32, 32)).shape, sum(p.numel() for p in model.parameters())
        (torch.Size([1, 10]), 269722)
    """
    return ThinCifarResNet(20, shortcut=shortcut, num_classes=num_classes)


def resnet32(shortcut: Shortcut = "A", num_classes: int = 10) -> ThinCifarResNet:
    """ResNet-32 of He et al. for 32x32 images: 0.46 M parameters."""
    return ThinCifarResNet(32, shortcut=shortcut, num_classes=num_classes)


def resnet44(shortcut: Shortcut = "A", num_classes: int = 10) -> ThinCifarResNet:
    """ResNet-44 of He et al. for 32x32 images: 0.66 M parameters."""
    return ThinCifarResNet(44, shortcut=shortcut, num_classes=num_classes)


def resnet56(shortcut: Shortcut = "A", num_classes: int = 10) -> ThinCifarResNet:
    """ResNet-56 of He et al. for 32x32 images: 0.85 M parameters."""
    return ThinCifarResNet(56, shortcut=shortcut, num_classes=num_classes)


def resnet110(shortcut: Shortcut = "A", num_classes: int = 10) -> ThinCifarResNet:
    """ResNet-110 of He et al. for 32x32 images: 1.7 M parameters."""
    return ThinCifarResNet(110, shortcut=shortcut, num_classes=num_classes)
