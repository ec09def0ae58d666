"""Small models with hand-written channel graphs, so that tests of scores do not depend on tracing."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune.graph import ChannelGraph, Group, Layer


@dataclass
class Case:
    model: nn.Module
    graph: ChannelGraph
    images: Tensor
    labels: Tensor
    producers: dict[str, str]  # per layer: module whose output is the tensor that enters its reader

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    @property
    def batch(self) -> tuple[Tensor, Tensor]:
        return self.images, self.labels

    def split(self, size: int) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.images.split(size), self.labels.split(size), strict=True))


def identity(channels: int) -> Tensor:
    return torch.arange(channels).unsqueeze(1)


def graph_of(*groups: Group) -> ChannelGraph:
    return ChannelGraph(groups, {})


def randomize_(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                tensor.data.copy_(torch.randn(tensor.shape, generator=generator))
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
    return model.double().eval()


class ConvNet(nn.Module):
    """conv, BN, ReLU twice, flatten into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(4, 6, 3, stride=2, bias=False)
        self.bn2 = nn.BatchNorm2d(6)
        self.relu2 = nn.ReLU()
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        return self.fc(self.flatten(self.relu2(self.bn2(self.conv2(x)))))


class ResidualNet(nn.Module):
    """A basic block with in-place ReLU and ``out += identity``; one ReLU module called several times."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(4, 5, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(5)
        self.conv2 = nn.Conv2d(5, 4, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem_bn(self.stem(x)))
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        out = self.relu(out)
        return self.fc(out.mean((2, 3)))


class GroupedNet(nn.Module):
    """A grouped convolution: channel j is filter j of every convolution group."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 1)
        self.relu1 = nn.ReLU()
        self.grouped = nn.Conv2d(6, 8, 3, groups=2)
        self.bn = nn.BatchNorm2d(8)
        self.relu2 = nn.ReLU()
        self.last = nn.Conv2d(8, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu2(self.bn(self.grouped(self.relu1(self.conv(x)))))
        return self.last(x).mean((2, 3))


class Perceptron(nn.Module):
    """Linear layers on tokens, the second with a batch norm after pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(3, 4)
        self.relu1 = nn.ReLU()
        self.fc2 = nn.Linear(4, 6)
        self.bn2 = nn.BatchNorm1d(6)
        self.relu2 = nn.ReLU()
        self.fc3 = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.fc1(x.flatten(2).transpose(1, 2)))  # (N, tokens, 4)
        return self.fc3(self.relu2(self.bn2(self.fc2(x.mean(1)))))


def conv_case() -> Case:
    torch.manual_seed(1)
    first = Layer("conv1", "conv1.weight", 0, 4, identity(4), "bn1", "conv2", identity(4))
    flat = torch.arange(24).view(6, 4)
    second = Layer("conv2", "conv2.weight", 0, 6, identity(6), "bn2", "fc", flat)
    graph = graph_of(Group("conv1", 4, (first,), ()), Group("conv2", 6, (second,), ()))
    images, labels = torch.randn(8, 3, 6, 6).double(), torch.randint(5, (8,))
    return Case(randomize_(ConvNet()), graph, images, labels, {"conv1": "relu1", "conv2": "flatten"})


def residual_case() -> Case:
    torch.manual_seed(2)
    stem = Layer("stem", "stem.weight", 0, 4, identity(4), "stem_bn", "conv1", identity(4))
    conv1 = Layer("conv1", "conv1.weight", 0, 5, identity(5), "bn1", "conv2", identity(5))
    conv2 = Layer("conv2", "conv2.weight", 0, 4, identity(4), "bn2", "fc", identity(4))
    graph = graph_of(Group("stem", 4, (stem, conv2), ()), Group("conv1", 5, (conv1,), ()))
    images, labels = torch.randn(6, 3, 5, 5).double(), torch.randint(5, (6,))
    return Case(randomize_(ResidualNet()), graph, images, labels, {})


def grouped_case() -> Case:
    torch.manual_seed(3)
    pairs = torch.tensor([[0, 4], [1, 5], [2, 6], [3, 7]])
    halves = torch.tensor([[0, 3], [1, 4], [2, 5]])
    conv = Layer("conv", "conv.weight", 0, 6, halves, None, "grouped", halves)
    grouped = Layer("grouped", "grouped.weight", 0, 8, pairs, "bn", "last", pairs)
    graph = graph_of(Group("conv", 3, (conv,), ()), Group("grouped", 4, (grouped,), ()))
    images, labels = torch.randn(6, 3, 7, 7).double(), torch.randint(5, (6,))
    return Case(randomize_(GroupedNet()), graph, images, labels, {"conv": "relu1", "grouped": "relu2"})


def linear_case() -> Case:
    torch.manual_seed(4)
    fc1 = Layer("fc1", "fc1.weight", 0, 4, identity(4), None, "fc2", identity(4))
    fc2 = Layer("fc2", "fc2.weight", 0, 6, identity(6), "bn2", "fc3", identity(6))
    graph = graph_of(Group("fc1", 4, (fc1,), ()), Group("fc2", 6, (fc2,), ()))
    images, labels = torch.randn(6, 3, 2, 2).double(), torch.randint(5, (6,))
    return Case(randomize_(Perceptron()), graph, images, labels, {"fc2": "relu2"})


CASES = {"conv": conv_case, "residual": residual_case, "grouped": grouped_case, "linear": linear_case}
