"""Tiny models, one per topology, and what randomises them so that no error can hide."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def randomise_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random batch-norm statistics, affine parameters and biases: defaults (beta 0, mean 0) hide errors."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            size = module.num_features
            module.running_mean = torch.randn(size, generator=generator, dtype=torch.float64) * 0.5
            module.running_var = torch.rand(size, generator=generator, dtype=torch.float64) + 0.5
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 1:
                centre = 1.0 if isinstance(module, nn.modules.batchnorm._BatchNorm) and name == "weight" else 0.0
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
                parameter.data = (noise + centre).to(parameter.dtype)
    return model.double()


def conv_bn(inputs: int, outputs: int, kernel: int = 3, **options: int) -> nn.Sequential:
    """Convolution and batch norm."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **options),
        nn.BatchNorm2d(outputs),
    )


class Head(nn.Module):
    """Global pooling and a classifier."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Plain(nn.Module):
    """Convolutions with bias, no batch norm, zero padding."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.leaky_relu(self.b(torch.tanh(self.a(x))), 0.1))


class Vgg(nn.Module):
    """Flatten of a 2x2 map into linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            conv_bn(3, 8),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            conv_bn(8, 12),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(nn.Linear(12 * 4, 10), nn.ReLU(True), nn.Dropout(), nn.Linear(10, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


class Residual(nn.Module):
    """Two basic blocks, the second with a projection; in-place ReLU and in-place addition."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.a1, self.a2 = conv_bn(8, 8), conv_bn(8, 8)
        self.b1, self.b2, self.down = conv_bn(8, 12, stride=2), conv_bn(12, 12), conv_bn(8, 12, 1, stride=2)
        self.relu, self.head = nn.ReLU(inplace=True), Head(12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        out = self.a2(self.relu(self.a1(x)))
        out += x
        x = self.relu(out)
        out = self.b2(self.relu(self.b1(x)))
        out += self.down(x)
        return self.head(self.relu(out))


class PreActivation(nn.Module):
    """Batch norm after the addition: it belongs to the whole group."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn1, self.c1 = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 6, 3, padding=1),
        )
        self.bn2, self.c2, self.bn3 = nn.BatchNorm2d(6), nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.c2(F.relu(self.bn2(self.c1(F.relu(self.bn1(x))))))
        return self.head(F.relu(self.bn3(x)))


class Dense(nn.Module):
    """DenseNet-like: every layer reads the concatenation of all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(c) for c in (6, 10, 14))
        self.convs = nn.ModuleList(nn.Conv2d(c, 4, 3, padding=1, bias=False) for c in (6, 10, 14))
        self.last, self.head = nn.BatchNorm2d(18), Head(18)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            features.append(conv(F.relu(norm(torch.cat(features, 1)))))
        return self.head(F.relu(self.last(torch.cat(features, 1))))


class InvertedResidual(nn.Module):
    """Expansion, depthwise, projection, residual, with squeeze-and-excitation and hard-swish."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.expand, self.depthwise = conv_bn(3, 8), conv_bn(8, 16, 1), conv_bn(16, 16, groups=16)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.project, self.head = conv_bn(16, 8, 1), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.stem(x))
        out = F.hardswish(self.depthwise(F.hardswish(self.expand(x))))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(out.mean((2, 3), keepdim=True)))))
        return self.head(x + self.project(out * gate))


class Grouped(nn.Module):
    """ResNeXt-like: grouped convolution between pointwise ones, and a depthwise multiplier of 2."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = conv_bn(3, 8), conv_bn(8, 12, 1), conv_bn(12, 12, groups=3)
        self.c, self.multiply, self.head = conv_bn(12, 8, 1), conv_bn(8, 16, groups=8), Head(16)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.c(F.relu(self.b(F.relu(self.a(x))))))
        return self.head(F.relu(self.multiply(x)))


class SigmoidConstant(nn.Module):
    """A masked channel is 0.5 after the sigmoid: the weights that read it must be masked with it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = (
            conv_bn(3, 8),
            conv_bn(8, 6),
            nn.Conv2d(6, 6, 3, padding=1),
            Head(6),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.a(x))
        x = self.b(x) + 1.0
        return self.head(torch.exp(self.c(x)))


class Branches(nn.Module):
    """Inception-like: pooled, strided and plain branches concatenated; the input itself is one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b1, self.b2 = conv_bn(3, 4, 1), conv_bn(3, 6, 1), conv_bn(6, 8)
        self.mix, self.head = conv_bn(4 + 8 + 3, 9), Head(9)

    def forward(self, x: Tensor) -> Tensor:
        parts = [F.relu(self.a(x)), F.relu(self.b2(F.relu(self.b1(x)))), F.max_pool2d(x, 3, 1, 1)]
        return self.head(F.relu(self.mix(torch.cat(parts, 1))))


class Shared(nn.Module):
    """One convolution called twice, and a decoder with transposed convolution and skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice, self.norm = conv_bn(3, 8), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.down, self.up = conv_bn(8, 12, stride=2), nn.ConvTranspose2d(12, 6, 2, stride=2)
        self.mix, self.head = conv_bn(14, 7), Head(7)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.norm(self.twice(F.relu(self.twice(x)))))
        return self.head(F.relu(self.mix(torch.cat([self.up(F.relu(self.down(x))), x], 1))))


class PaddedShortcut(nn.Module):
    """CIFAR ResNet option A: the shortcut is padded with zero channels, whose number Python fixes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.head = conv_bn(3, 6), conv_bn(6, 8, stride=2), conv_bn(8, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1))
        return self.head(F.relu(self.b(F.relu(self.a(x))) + shortcut))


class Shuffle(nn.Module):
    """Channel shuffle and chunk with sizes fixed in Python: those channels stay, the free ones go."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.out, self.head = conv_bn(3, 8), conv_bn(4, 6), conv_bn(6, 4), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        left, right = x.chunk(2, 1)
        x = torch.cat([left, F.relu(self.out(F.relu(self.inner(right))))], 1)
        n, c, h, w = x.shape
        return self.head(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


class Auxiliary(nn.Module):
    """An auxiliary head that exists only in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head, self.aux = conv_bn(3, 8), conv_bn(8, 6), Head(6), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = F.relu(self.a(x))
        out = self.head(F.relu(self.b(x)))
        return (out, self.aux(x)) if self.training else out


ZOO: dict[str, Callable[[], nn.Module]] = {
    cls.__name__: cls
    for cls in (
        Plain, Vgg, Residual, PreActivation, Dense, InvertedResidual, Grouped, SigmoidConstant, Branches, Shared,
        PaddedShortcut, Shuffle, Auxiliary,
    )
}  # fmt: skip


def build(name: str, seed: int = 0) -> nn.Module:
    """A model of the zoo in float64, randomised, in eval mode."""
    torch.manual_seed(seed)
    return randomise_(ZOO[name](), seed).eval()


def images(batch: int = 2, size: int = 8, seed: int = 1) -> Tensor:
    """(batch, 3, size, size) in float64."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
