"""LeNet as Guo et al. have it in their study of pruning by the next layer's Taylor expansion."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LeNet(nn.Module):
    """LeNet for (N, 1, 32, 32) images, such as MNIST's after padding by 2: 0.26 M parameters.

    5x5 convolutions of 32 and 64 channels, each with ReLU and 2x2 max-pool, then linear layers of 120, 84 and
    ``num_classes``: the network of Guo et al.'s released code, wider than that of LeCun et al. (Proc. IEEE 86(11),
    1998), which has 6 and 16 channels.

    Args:
        num_classes: width of the logits.
        in_channels: of the images.

    Example:
        >>> model = LeNet()
        >>> model(torch.zeros(1, 1, 32, 32)).shape, sum(p.numel() for p in model.parameters())
        (torch.Size([1, 10]), 255230)
    """

    def __init__(self, num_classes: int = 10, *, in_channels: int = 1) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(in_channels, 32, 5), nn.Conv2d(32, 64, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(64 * 5 * 5, 120), nn.Linear(120, 84), nn.Linear(84, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(images)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(torch.flatten(x, 1)))
        return self.fc3(F.relu(self.fc2(x)))
