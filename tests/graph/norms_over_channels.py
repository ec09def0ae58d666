"""Norms that take a mean over channels, written in the ways people write them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Rms(nn.Module):
    """x / sqrt(mean of squares + eps) * weight, as Llama, T5 and timm have it."""

    def __init__(self, channels: int, eps: float = 1e-3) -> None:
        super().__init__()
        self.variance_epsilon = eps
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon) * self.weight


class InFloat32(Rms):
    """The mean in float32 whatever comes in, as in transformers."""

    def forward(self, x: Tensor) -> Tensor:
        variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + self.variance_epsilon)).type_as(x)


class OnePlus(Rms):
    """Gemma: the weight is counted from one."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return (y * (1.0 + self.weight.float())).type_as(x)


class EpsOutside(Rms):
    """The eps is added to the root."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon)


class NoEps(Rms):
    """A mean of magnitudes, and an eps that is not used."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / x.abs().mean(-1, keepdim=True)


class Gated(Rms):
    """Mamba: times a gate, which has the same channels."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.gate = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * F.silu(self.gate(x))


class Grn(nn.Module):
    """Global response norm (ConvNeXt V2) over tokens."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.eps = 1e-3
        self.gamma = nn.Parameter(torch.zeros(1, 1, channels))
        self.beta = nn.Parameter(torch.zeros(1, 1, channels))

    def forward(self, x: Tensor) -> Tensor:
        g = x.norm(p=2, dim=1, keepdim=True)
        return self.gamma * (x * (g / (g.mean(-1, keepdim=True) + self.eps))) + self.beta + x


class Normalised(Rms):
    """A sum, no mean."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * self.weight


class NormalisedByShape(Rms):
    """The root of the number of channels in front of it, as lucidrains has it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * x.shape[-1] ** 0.5 * self.weight


class SumByShape(Rms):
    """The mean is a sum, divided in the code."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.pow(2).sum(-1, keepdim=True) / x.shape[-1]
        return x * torch.rsqrt(mean + self.variance_epsilon) * self.weight


class ByAttribute(Rms):
    """The number of channels is an attribute."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.dim = channels

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self.dim,), self.weight, self.variance_epsilon)


class EpsInCode(Rms):
    """Nothing that could follow."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3) * self.weight


class NoWeight(nn.Module):
    """Nothing that could make up."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.eps = 1e-3

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class OwnLayerNorm(Rms):
    """The mean is subtracted, so that what was zero is zero no longer."""

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.pow(2).mean(-1, keepdim=True)
        return centred * torch.rsqrt(variance + self.variance_epsilon) * self.weight


class OfLiveChannels(Rms):
    """What it averages is one half where a channel is masked."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.sigmoid().mean(-1, keepdim=True) + self.variance_epsilon) * self.weight


class Centred(Rms):
    """Timm's SimpleNorm: a variance, whose two means need different factors."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.var(-1, keepdim=True) + self.variance_epsilon) * self.weight


class Logarithmic(Rms):
    """No factor makes up for a mean inside a logarithm."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.log1p(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon) * self.weight


def torch_rms(channels: int) -> nn.Module:
    """Torch's own."""
    return nn.RMSNorm(channels, eps=1e-3)


EXACT = (
    *(Rms, InFloat32, OnePlus, EpsOutside, NoEps, Gated, Grn, torch_rms),
    *(NormalisedByShape, SumByShape, ByAttribute),
)
STAY = {  # and what is said of them
    EpsInCode: "whose eps is a number in its code",
    nn.RMSNorm: "whose eps is None, that of the data type",
    NoWeight: "which has no weight",
    OwnLayerNorm: "enters a statistic over channels in aten.mean at 'norm'$",
    OfLiveChannels: "enters a statistic over channels in aten.mean at 'norm'$",
    Logarithmic: "enters a statistic over channels in aten.mean at 'norm'$",
    Centred: "enters a statistic over channels in aten.var at 'norm'$",
    nn.LayerNorm: "enters a statistic over channels in aten.native_layer_norm at 'norm'$",
}
