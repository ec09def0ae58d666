"""Well-known blocks, and some that no one should write but someone does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.graph.architecture_blocks import Apply, Block, Built


@dataclass(frozen=True, repr=False)
class Special(Block):
    """One of SPECIALS."""

    kind: str
    width: int = 4

    def build(self, channels: int) -> Built:
        built = SPECIALS[self.kind](channels, self.width)
        return built if isinstance(built, tuple) else (built, channels)


def squeeze(c: int, w: int, last: nn.Module) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, w, 1), nn.ReLU(), nn.Conv2d(w, c, 1), last)


def squeeze_linear(c: int, w: int) -> nn.Module:
    return nn.Sequential(nn.Linear(c, w), nn.ReLU(), nn.Linear(w, c), nn.Sigmoid())


def glu(x: Tensor, conv: nn.Module) -> Tensor:
    left, right = conv(x).chunk(2, 1)
    return left * torch.sigmoid(right)


def twice(x: Tensor, conv: nn.Module, norm: nn.Module) -> Tensor:
    return norm(conv(F.relu(conv(x))))


def levels(x: Tensor, conv: nn.Module, fine: nn.Module, coarse: nn.Module) -> Tensor:
    return fine(conv(x)) + F.interpolate(coarse(conv(F.avg_pool2d(x, 2))), scale_factor=2)


def eca(x: Tensor, conv: nn.Module) -> Tensor:
    return x * torch.sigmoid(conv(x.mean((2, 3)).unsqueeze(1)).transpose(1, 2).unsqueeze(3))


def tokens(x: Tensor, linear: nn.Module) -> Tensor:
    return linear(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:])


def channels_last(x: Tensor, linear: nn.Module) -> Tensor:
    return linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def attend(x: Tensor, query: nn.Module, key: nn.Module, value: nn.Module) -> Tensor:
    weights = (query(x).flatten(2).transpose(1, 2) @ key(x).flatten(2)).softmax(2)
    return x + (weights @ value(x).flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)


def halves_as_batch(x: Tensor, conv: nn.Module) -> Tensor:
    n, c, h, w = x.shape
    return conv(x.reshape(n * 2, c // 2, h, w)).reshape(n, -1, h, w)


def untied(x: Tensor, conv: nn.Conv2d) -> Tensor:
    return F.conv_transpose2d(F.relu(conv(x)), conv.weight, padding=1)


def standardised(x: Tensor, conv: nn.Conv2d) -> Tensor:
    return F.conv2d(x, conv.weight - conv.weight.mean((1, 2, 3), keepdim=True), conv.bias)


def centred(x: Tensor, conv: nn.Conv2d) -> Tensor:
    return F.conv2d(x, conv.weight - conv.weight.mean((2, 3), keepdim=True), conv.bias, padding=1)


def mixer(x: Tensor, linear: nn.Module) -> Tensor:
    return linear(F.adaptive_avg_pool2d(x, 4).flatten(2)).unflatten(2, (4, 4))


def row_in_place(x: Tensor) -> Tensor:
    out = x.clone()
    out[:, :, 0] += 1
    return out


def first_zero(x: Tensor) -> Tensor:
    out = x * 1.5
    out[:, 0] = 0
    return out


def tied(c: int, w: int) -> Built:
    first, second = nn.Conv2d(c, w, 3, padding=1), nn.Conv2d(c, w, 3, padding=2, dilation=2)
    second.weight = first.weight
    return Apply(lambda x, f, g: torch.cat([f(x), g(x)], 1), first, second), 2 * w


class Baked(nn.Module):
    """Squeeze and excitation whose view has the number of channels as an attribute."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.channels, self.gate = channels, squeeze_linear(channels, width)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x.mean((2, 3))).view(-1, self.channels, 1, 1)


class Checked(nn.Module):
    """Checks the number of channels as some libraries do."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.channels, self.conv = channels, nn.Conv2d(channels, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != self.channels:
            raise ValueError(f"{self.channels} channels expected, {x.shape[1]} given")
        return self.conv(x)


SPECIALS: dict[str, Callable[[int, int], nn.Module | Built]] = {
    "se": lambda c, w: Apply(lambda x, f: x * f(x), squeeze(c, w, nn.Sigmoid())),
    "se_hard": lambda c, w: Apply(lambda x, f: f(x) * x, squeeze(c, w, nn.Hardsigmoid())),
    "se_linear": lambda c, w: Apply(
        lambda x, f: x * f(x.mean((2, 3))).view(x.shape[0], x.shape[1], 1, 1), squeeze_linear(c, w)
    ),
    "se_baked": Baked,
    "checked": lambda c, w: (Checked(c, w), w),
    "context": lambda c, w: Apply(lambda x, f: x + f(x), squeeze(c, w, nn.Identity())),
    "gate_mean": lambda c, w: Apply(lambda x, f: x * f(x.mean(1, True)).sigmoid(), nn.Conv2d(1, 1, 3, padding=1)),
    "gate_max": lambda c, w: Apply(lambda x, f: x * f(x.amax(1, True)).sigmoid(), nn.Conv2d(1, 1, 3, padding=1)),
    "gate_conv": lambda c, w: Apply(lambda x, f: x * f(x).sigmoid(), nn.Conv2d(c, 1, 1)),
    "eca": lambda c, w: Apply(eca, nn.Conv1d(1, 1, 3, padding=1)),
    "twice": lambda c, w: Apply(twice, nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c)),
    "levels": lambda c, w: (Apply(levels, nn.Conv2d(c, w, 1), nn.BatchNorm2d(w), nn.BatchNorm2d(w)), w),
    "tied": tied,
    "untied": lambda c, w: Apply(untied, nn.Conv2d(c, w, 3, padding=1)),
    "standardised": lambda c, w: (Apply(standardised, nn.Conv2d(c, w, 1)), w),
    "centred": lambda c, w: (Apply(centred, nn.Conv2d(c, w, 3)), w),
    "glu": lambda c, w: (Apply(glu, nn.Conv2d(c, 2 * w, 1)), w),
    "tokens": lambda c, w: Apply(tokens, nn.Sequential(nn.Linear(c, w), nn.GELU(), nn.Linear(w, c))),
    "channels_last": lambda c, w: (Apply(channels_last, nn.Sequential(nn.Linear(c, w), nn.GELU())), w),
    "attend": lambda c, w: Apply(attend, *(nn.Conv2d(c, n, 1) for n in (w, w, c))),
    "halves": lambda c, w: (
        nn.Sequential(nn.Conv2d(c, 2 * w, 1), Apply(halves_as_batch, nn.Conv2d(w, 3, 3, padding=1))),
        6,
    ),
    "conv1d": lambda c, w: (
        Apply(
            lambda x, f: f(x.flatten(2)).unflatten(2, x.shape[2:]),
            nn.Sequential(nn.Conv1d(c, w, 3, padding=1), nn.BatchNorm1d(w), nn.ReLU()),
        ),
        w,
    ),
    "conv3d": lambda c, w: (
        Apply(lambda x, f: f(x.unsqueeze(2)).squeeze(2), nn.Sequential(nn.Conv3d(c, w, (1, 3, 1), padding=(0, 1, 0)))),
        w,
    ),
    "row": lambda c, w: Apply(row_in_place),
    "first_zero": lambda c, w: Apply(first_zero),
    "roll": lambda c, w: Apply(lambda x: x.roll(1, 2)),
    "roll_channels": lambda c, w: Apply(lambda x: x.roll(1, 1)),
    "flip_channels": lambda c, w: Apply(lambda x: x.flip(1)),
    "pad_channels": lambda c, w: (Apply(lambda x: F.pad(x, (0, 0, 0, 0, 1, 2))), c + 3),
    "repeat": lambda c, w: (Apply(lambda x: x.repeat(1, 2, 1, 1)), 2 * c),
    "cumsum": lambda c, w: Apply(lambda x: x.cumsum(1)),
    "mixer": lambda c, w: Apply(mixer, nn.Linear(16, 16)),
    "pixel_shuffle": lambda c, w: (nn.Sequential(nn.Conv2d(c, 4 * w, 1), nn.PixelShuffle(2)), w),
    "pixel_unshuffle": lambda c, w: (nn.PixelUnshuffle(2), 4 * c),
}
