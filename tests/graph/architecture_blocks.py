"""What random architectures are made of: descriptions of blocks that print as code, and the modules they build."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

Built = tuple[nn.Module, int]  # a module and the number of channels that it makes


class Apply(nn.Module):
    """Parts and the function that runs them."""

    def __init__(self, function: Callable[..., Tensor], *parts: nn.Module) -> None:
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.parts)


class Vector(nn.Module):
    """Several (channels, 1, 1) parameters or buffers and the function that applies them."""

    def __init__(self, channels: int, function: Callable[..., Tensor], *, count: int = 1, buffer: bool = False) -> None:
        super().__init__()
        self.function, self.names = function, [f"v{k}" for k in range(count)]
        for name in self.names:
            value = torch.rand(channels, 1, 1) + 0.5
            self.register_buffer(name, value) if buffer else setattr(self, name, nn.Parameter(value))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *(getattr(self, name) for name in self.names))


ACTS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda _: nn.Identity(),
    "relu": lambda _: nn.ReLU(),
    "relu_": lambda _: nn.ReLU(inplace=True),
    "relu6": lambda _: nn.ReLU6(),
    "leaky": lambda _: nn.LeakyReLU(0.2),
    "silu": lambda _: nn.SiLU(),
    "gelu": lambda _: nn.GELU(),
    "hardswish": lambda _: nn.Hardswish(),
    "sigmoid": lambda _: nn.Sigmoid(),
    "tanh": lambda _: nn.Tanh(),
    "softplus": lambda _: nn.Softplus(),
    "prelu": lambda _: nn.PReLU(),
    "prelu_c": nn.PReLU,
    "plus": lambda _: Apply(lambda x: x + 1),
    "rsub": lambda _: Apply(lambda x: 1 - x),
    "times": lambda _: Apply(lambda x: 0.5 * x),
    "clamp": lambda _: Apply(lambda x: x.clamp(min=0.1)),
    "square": lambda _: Apply(lambda x: x**2),
    "l2": lambda _: Apply(lambda x: F.normalize(x, dim=1)),
    "softmax": lambda _: Apply(lambda x: x.softmax(1)),
    "shift": lambda _: Apply(lambda x: F.pad(x[:, :, 1:, :-1], (1, 0, 0, 1))),
    "shift_value": lambda _: Apply(lambda x: F.pad(x[..., 1:], (1, 0), value=0.7)),
}
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda _: nn.Identity(),
    "bn": nn.BatchNorm2d,
    "bn_plain": lambda c: nn.BatchNorm2d(c, affine=False),
    "bn_batch": lambda c: nn.BatchNorm2d(c, track_running_stats=False),
    "frozen": lambda c: Vector(c, lambda x, w, b, m, v: (x - m) * (w * (v + 1e-5).rsqrt()) + b, count=4, buffer=True),
    "gn": lambda c: nn.GroupNorm(math.gcd(c, 2), c),
    "in": nn.InstanceNorm2d,
    "in_affine": lambda c: nn.InstanceNorm2d(c, affine=True),
    "in_stats": lambda c: nn.InstanceNorm2d(c, affine=True, track_running_stats=True),
    "ln": lambda c: Apply(lambda x, norm: norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), nn.LayerNorm(c)),
    "scale": lambda c: Vector(c, lambda x, v: x * v),
    "offset": lambda c: Vector(c, lambda x, v: x + v),
}


WEIGHTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda conv: conv,
    "weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
}


class Block:
    """One piece; prints without the fields that have their default."""

    def __repr__(self) -> str:
        given = (f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default)
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in given)})"

    def build(self, channels: int) -> Built:
        raise NotImplementedError


def chain(blocks: tuple[Block, ...], channels: int) -> Built:
    modules = []
    for block in blocks:
        module, channels = block.build(channels)
        modules.append(module)
    return nn.Sequential(*modules), channels


def project(module: nn.Module, channels: int, width: int, *, always: bool = False) -> nn.Module:
    """The module, followed by a 1x1 convolution and batch norm where it does not make ``width`` channels."""
    if channels == width and not always:
        return module
    return nn.Sequential(module, nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width))


@dataclass(frozen=True, repr=False)
class Conv(Block):
    """Convolution, norm, activation; ``pre``: the other way round. ``groups``: as far as it divides the input."""

    width: int = 4
    kernel: int = 3
    stride: int = 1
    norm: str = "none"
    act: str = "none"
    groups: int = 1
    mode: str = "zeros"
    bias: bool = True
    pre: bool = False
    weight: str = "plain"
    transposed: bool = False

    def build(self, channels: int) -> Built:
        groups = math.gcd(self.groups, channels)
        width = -(-self.width // groups) * groups
        if self.transposed:
            conv = nn.ConvTranspose2d(channels, width, 2, 2, groups=groups, bias=self.bias)
        else:
            shape = (channels, width, self.kernel, self.stride, self.kernel // 2)
            conv = nn.Conv2d(*shape, groups=groups, bias=self.bias, padding_mode=self.mode)
        conv = WEIGHTS[self.weight](conv)
        normed = channels if self.pre else width
        parts = [conv, NORMS[self.norm](normed), ACTS[self.act](normed)]
        return nn.Sequential(*(parts[1:] + parts[:1] if self.pre else parts)), width


@dataclass(frozen=True, repr=False)
class Depthwise(Block):
    multiplier: int = 1
    norm: str = "bn"
    act: str = "relu"
    mode: str = "zeros"

    def build(self, channels: int) -> Built:
        width = channels * self.multiplier
        conv = nn.Conv2d(channels, width, 3, padding=1, groups=channels, padding_mode=self.mode)
        return nn.Sequential(conv, NORMS[self.norm](width), ACTS[self.act](width)), width


@dataclass(frozen=True, repr=False)
class Point(Block):
    """What works position by position or channel by channel: an activation, a norm, a pooling, a resizing."""

    kind: str = "relu"

    def build(self, channels: int) -> Built:
        table = {**ACTS, **NORMS, **{name: lambda _, f=f: Apply(f) for name, f in RESIZE.items()}}
        return table[self.kind](channels), channels


RESIZE: dict[str, Callable[[Tensor], Tensor]] = {
    "max3": lambda x: F.max_pool2d(x, 3, 1, 1),
    "avg3": lambda x: F.avg_pool2d(x, 3, 1, 1),
    "max": lambda x: F.max_pool2d(x, 3, 2, 1),
    "avg": lambda x: F.avg_pool2d(x, 2),
    "adaptive_avg": lambda x: F.adaptive_avg_pool2d(x, 4),
    "adaptive_max": lambda x: F.adaptive_max_pool2d(x, (4, 6)),
    "slice": lambda x: x[:, :, ::2, ::2],
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False),
}
DOWN, UP = ("max", "avg", "adaptive_avg", "adaptive_max", "slice"), ("nearest", "bilinear")


def add_in_place(parts: list[Tensor]) -> Tensor:
    total = parts[-1]
    for part in parts[:-1]:
        total += part
    return total


MERGES: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "add": sum,
    "add_": add_in_place,
    "mul": lambda parts: math.prod(parts[1:], start=parts[0]),
    "maximum": lambda parts: torch.maximum(parts[0], parts[-1]),
    "stack": lambda parts: torch.stack(parts).sum(0),
    "gate": lambda parts: torch.sigmoid(parts[0]) * parts[-1],
    "cat": lambda parts: torch.cat(parts, 1),
    "cat_space": lambda parts: F.avg_pool2d(torch.cat(parts, 2), (len(parts), 1)),
}


@dataclass(frozen=True, repr=False)
class Merge(Block):
    """Branches joined: an empty one is the block's own input; 1x1 convolutions where widths have to agree."""

    branches: tuple[tuple[Block, ...], ...]
    how: str = "add"
    act: str = "none"
    stride: int = 1

    def build(self, channels: int) -> Built:
        built = [chain(branch, channels) for branch in self.branches]
        width = channels if () in self.branches else built[0][1]
        if self.how == "cat":
            modules, width = [module for module, _ in built], sum(c for _, c in built)
        else:  # an in-place addition needs a tensor of its own
            modules = [project(m, c, width, always=self.how == "add_") for m, c in built]
        if self.stride > 1:
            modules = [nn.Sequential(module, nn.MaxPool2d(2)) for module in modules]
        join = MERGES[self.how]
        return nn.Sequential(Apply(lambda x, *fs: join([f(x) for f in fs]), *modules), ACTS[self.act](width)), width


class Halves(nn.Module):
    """The second part of the channels is processed. Sizes come from the input, from attributes, or from a chunk."""

    def __init__(self, channels: int, how: str, join: str, inner: nn.Module) -> None:
        super().__init__()
        self.how, self.join, self.inner = how, join, inner
        self.sizes, self.half = [channels - channels // 2, channels // 2], channels - channels // 2

    def cut(self, x: Tensor) -> tuple[Tensor, Tensor]:
        half = x.shape[1] - x.shape[1] // 2
        if self.how == "chunk":
            left, right = x.chunk(2, 1)
        elif self.how == "split":
            left, right = x.split([half, x.shape[1] - half], 1)
        elif self.how == "split_baked":
            left, right = x.split(self.sizes, 1)
        elif self.how == "slice_baked":
            left, right = x[:, : self.half], x[:, self.half :]
        elif self.how == "stride":
            left, right = x[:, ::2], x[:, 1::2]
        else:
            left, right = x[:, :half], x[:, half:]
        return left, right

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.cut(x)
        made = self.inner(right)
        if self.join == "cat":
            return torch.cat([left, made], 1)
        if self.join == "reverse":
            return torch.cat([made, left], 1)
        if self.join == "all":
            return torch.cat([left, right, made], 1)
        out = x.clone()  # write
        out[:, left.shape[1] :] = made
        return out


@dataclass(frozen=True, repr=False)
class Split(Block):
    blocks: tuple[Block, ...]
    how: str = "chunk"
    join: str = "cat"

    def build(self, channels: int) -> Built:
        first, channels = (nn.Identity(), channels) if channels > 1 else Conv(4).build(channels)
        join = "cat" if self.join == "write" and self.how == "stride" else self.join
        inner, made = chain(self.blocks, channels // 2)
        if join == "write":
            inner, made = project(inner, made, channels // 2), channels // 2
        left, right = channels - channels // 2, channels // 2
        width = left + made + (right if join == "all" else 0)
        return nn.Sequential(first, Halves(channels, self.how, join, inner)), width


class Shuffler(nn.Module):
    def __init__(self, channels: int, groups: int, how: str) -> None:
        super().__init__()
        self.groups, self.per_group, self.how = groups, channels // groups, how

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        if self.how == "torch":
            return F.channel_shuffle(x, self.groups)
        per_group = self.per_group if self.how == "baked" else c // self.groups
        x = x.view(n, self.groups, per_group, h, w).transpose(1, 2)
        return x.flatten(1, 2) if self.how == "flatten" else x.reshape(n, -1, h, w)


@dataclass(frozen=True, repr=False)
class Shuffle(Block):
    """Channel shuffle. ``fit``: after a convolution that makes at least two channels per group."""

    groups: int = 2
    how: str = "shape"
    fit: bool = True

    def build(self, channels: int) -> Built:
        first: nn.Module = nn.Identity()
        if self.fit and (channels % self.groups or channels == self.groups):
            first, channels = Conv(max(2, channels // self.groups) * self.groups, 1).build(channels)
        return nn.Sequential(first, Shuffler(channels, math.gcd(self.groups, channels), self.how)), channels
