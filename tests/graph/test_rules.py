"""Every operator of the rule table inside a tiny model: masked equals reconstructed, or refused with the reason."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import deform_conv2d, roi_align, roi_pool

from lightning_prune.graph import trace
from lightning_prune.graph.rules import RULES
from lightning_prune.reconstruction.lossless import check_lossless
from lightning_prune.reconstruction.masks import mask_
from lightning_prune.reconstruction.small_model import reconstruct
from tests.helpers import random_plan
from tests.zoo import images, randomise_

Operator = Callable[[Tensor], Tensor]
BOXES = torch.tensor([[0, 0.0, 0.0, 6.0, 6.0], [1, 1.0, 2.0, 7.0, 5.0]], dtype=torch.float64)


class Between(nn.Module):
    """A convolution, one operator, and a reader that takes whatever comes out."""

    def __init__(self, operator: Operator, first: nn.Module | None = None) -> None:
        super().__init__()
        self.a = first or nn.Conv2d(3, 8, 3, padding=1)
        self.operator = operator
        with torch.no_grad():
            channels = operator(self.a.double()(images())).shape[1]
        self.read = nn.Conv2d(channels, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.operator(self.a(x))
        y = y if y.dim() == 4 else y.reshape(y.shape[0], y.shape[1], -1, 1)
        return self.read(y)


def pruned(model: nn.Module, group: str = "a") -> str | None:
    """None if the group goes and nothing changes; else why it stays."""
    model = randomise_(model).eval()
    graph = trace(model, images())
    found = [g for g in graph.groups if g.name.partition("[")[0] == group]
    plan_graph = graph if graph.prunable_groups else None
    if plan_graph is not None:
        plan = random_plan(graph, 0.6)
        small, masked = reconstruct(model, graph, plan), copy.deepcopy(model)
        mask_(masked, graph, plan)
        for x in (images(), images(3, seed=5)[:2]):
            report = check_lossless(masked, small, x)
            assert report.passed, report
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    if any(g.prunable for g in found):
        return None
    return "; ".join(str(g.reason) for g in found)


UNARY = (
    "neg abs square exp exp2 log1p expm1 sin cos tan sinh cosh tanh asinh atan erf sign sgn floor "
    "ceil round trunc frac sigmoid relu selu logical_not isnan isinf isfinite nan_to_num"
).split()
ACTIVATIONS = (
    "relu6 leaky_relu elu celu selu silu gelu mish softplus logsigmoid hardsigmoid hardswish hardtanh hardshrink "
    "softshrink threshold"
).split()


def unary(function: Operator) -> Operator:
    return lambda x: function(x.abs()).double()


def activation(name: str) -> Operator:
    return {"threshold": lambda x: F.threshold(x, 0.1, 0.2)}.get(name, getattr(F, name, None))


ELEMENTWISE: dict[str, Operator] = {
    **{f"unary {name}": unary(getattr(torch, name)) for name in UNARY},
    **{f"activation {name}": activation(name) for name in ACTIVATIONS},
    "not at zero": lambda x: (x.abs() + 1).log() + (x.exp() + 1).log2() + x.cosh().rsqrt() + x.cosh().reciprocal(),
    "in place": lambda x: x.clone().relu_().mul_(2).add_(1).sigmoid_(),
    "arithmetic": lambda x: (2 - x) * x / 3 + x.pow(3) - torch.atan2(x, x + 1),
    "bounds": lambda x: x.clamp(min=-0.1).clamp(max=0.5) + torch.maximum(x, x * 2) - torch.minimum(x, -x),
    "one bound": lambda x: torch.clamp_min(x, 0.1) + torch.clamp_max(x, 0.3),
    "where": lambda x: torch.where(x > 0, x, x * 0.5).masked_fill(x < -1, 0.0),
    "comparisons": lambda x: (
        ((x > 0) & (x <= 1) | (x == 2) ^ (x != 1) | (x >= 1) | ~(x < 0)).double()
        + torch.logical_and(x, x).logical_or(x > 1).logical_xor(x > 0)
    ),
    "addcmul": lambda x: torch.addcmul(x, x, x) + torch.addcdiv(x, x, x.abs() + 1) + torch.lerp(x, x * 2, 0.3),
    "remainder": lambda x: x.remainder(0.7) + x.fmod(0.3) + x.div(0.4, rounding_mode="floor") + torch.xlogy(x, x.exp()),
    "floor_divide": lambda x: torch.floor_divide(x, 0.3),
    "prelu": nn.PReLU(),
    "prelu per channel": nn.PReLU(8),
    "rrelu": lambda x: F.rrelu(x, training=False),
    "random factories": lambda x: (
        x
        + 0 * (torch.rand_like(x) + torch.randn_like(x) + torch.rand(x.shape) + x.new_empty(x.shape).normal_())
        + 0 * (torch.full(x.shape, 2.0) + torch.randint(3, x.shape) + torch.empty_like(x).bernoulli_(0.5))
        + 0 * torch.empty_like(x).exponential_()
        + 0 * (torch.randperm(8)[: x.shape[3]] + torch.linspace(0, 1, 8) + torch.tril(torch.ones(8, 8)))
    ),
    "drawn by chances": lambda x: torch.bernoulli((x > 0).double()) + torch.normal(x, 0.0),
    "triangles of positions": lambda x: x.tril() + x.triu(1) * torch.ones(x.shape).tril(),
    "factories": lambda x: (
        x * torch.ones_like(x)
        + torch.zeros(x.shape, dtype=x.dtype)
        + x.new_full(x.shape, 0.5) * torch.full_like(x, 2)
        + torch.empty_like(x).fill_(1.0)
        + x.new_ones(x.shape)
        + x.new_zeros(x.shape)
        + torch.arange(8.0)[: x.shape[3]]
    ),
    "copies": lambda x: x.clone().contiguous().float().double().detach() + torch.zeros_like(x).copy_(x),
    "cleared": lambda x: x + x.clone().zero_(),
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
}
MOVEMENT: dict[str, Operator] = {
    "permute": lambda x: x.permute(0, 2, 3, 1).transpose(1, 3).permute(0, 1, 3, 2),
    "transposed in place": lambda x: x.clone().transpose_(2, 3).unsqueeze_(0).squeeze_(0),
    "t": lambda x: x.flatten(1).t().t().reshape(x.shape),
    "flatten": lambda x: x.flatten(1)[:, :, None, None],
    "view": lambda x: x.view(x.shape[0], x.shape[1], -1).unsqueeze(-1),
    "expand": lambda x: x.mean((2, 3), keepdim=True).expand(-1, -1, 5, 5),
    "repeat": lambda x: x.repeat(1, 3, 2, 1),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 1),
    "flip": lambda x: x.flip(1).flip(3),
    "roll": lambda x: x.roll((1, 2), (2, 3)),
    "strided space": lambda x: torch.cat([x[:, :, ::2], x[:, :, 1::2]], 3),
    "selected space": lambda x: torch.stack([x.select(2, 0), *x.unbind(3)[:2]], -1),
    "index_select": lambda x: x.index_select(2, torch.tensor([3, 1])),
    "index": lambda x: x[:, :, torch.tensor([1, 2, 2])],
    "unfold": lambda x: x.unfold(2, 3, 2).sum(-1),
    "halves": lambda x: torch.cat([part * k for k, part in enumerate(x.chunk(2, 1), 1)], 1),
    "halves by slices": lambda x: x[:, : x.shape[1] // 2] * x[:, x.shape[1] // 2 :],
    "last half alone": lambda x: x[:, x.shape[1] // 2 :],
    "glu": lambda x: F.glu(x, 1),
    "split": lambda x: sum(x.split(x.shape[1] // 4, 1)),
    "shuffle": lambda x: x.unflatten(1, (2, x.shape[1] // 2)).transpose(1, 2).flatten(1, 2),
    "channel_shuffle": lambda x: F.channel_shuffle(x, 4),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "im2col": lambda x: F.unfold(x, 3, padding=1),
    "col2im": lambda x: F.fold(F.unfold(x, 2, stride=2), (8, 8), 2, stride=2),
    "cat": lambda x: torch.cat([x, x * 2, x.new_ones(2, 2, 8, 8)], 1),
    "gather": lambda x: torch.cat([x.flatten(2).gather(2, best(x).expand(-1, x.shape[1], -1)), x[..., 0]], 2),
    "gather by a repeated index": lambda x: (
        x.flatten(2).transpose(1, 2).gather(1, best(x).transpose(1, 2).repeat(1, 1, x.shape[1])).transpose(1, 2)
    ),
    "gather by an index for each channel": lambda x: x.gather(3, x.argmax(3, True)),
    "scatter": lambda x: (
        x.new_zeros(2, x.shape[1], 64).scatter_add_(2, best(x).repeat(1, x.shape[1], 1), x.flatten(2)[..., :5])
        + x.flatten(2).scatter(2, best(x).expand(-1, x.shape[1], -1), 1.0)
        + x.flatten(2).scatter(2, best(x).expand(-1, x.shape[1], -1), x.flatten(2)[..., :5])
    ),
    "index_add": lambda x: x.index_add(2, torch.tensor([3, 3, 1]), x[:, :, :3]),
    "cat over space": lambda x: torch.cat([x, -x], 2),
    "stack": lambda x: torch.stack([x, -x], 1).flatten(1, 2),
    "pad": lambda x: F.pad(x, (1, 2, 0, 1), value=0.5),
    "pad channels": lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)),
    "written": lambda x: torch.zeros_like(x).index_put((torch.tensor([1, 0]),), x),
    "channels last": lambda x: F.adaptive_avg_pool2d(x.contiguous(memory_format=torch.channels_last), 1),
}
STATISTICS: dict[str, Operator] = {
    "spatial statistics": lambda x: x.mean((2, 3), True) + x.amax((2, 3), True) + x.amin((2, 3), True) + x.sum(2, True),
    "max and min": lambda x: (x.max(3, True)[0] + x.min(3, True).values) * x.prod(3, True),
    "deviations": lambda x: (
        x.var((2, 3), keepdim=True) + x.std((2, 3), keepdim=True) + torch.var_mean(x, 2, keepdim=True)[1]
    ),
    "norms": lambda x: x.norm(dim=2, keepdim=True) + torch.std_mean(x, 2, keepdim=True)[0] + x.logsumexp(2, True),
    "indices": lambda x: x.argmax(3, True).double() + x.argmin(3, True) + (x > 0).any(3, True) + (x > 0).all(3, True),
    "normalize": lambda x: F.normalize(x, dim=1),
    "sum over channels": lambda x: x * x.sum(1, True),
    "softmax over space": lambda x: x * x.flatten(2).softmax(-1).view_as(x) + x.log_softmax(2),
    "sorted": lambda x: x.sort(2)[0] + x.cumsum(3) + x.cumprod(3),
    "topk": lambda x: x.topk(2, 2).values,
    "medians": lambda x: (
        (x.median(3, True)[0] + x.nanmedian(2, True)[0]) * x.kthvalue(3, 3, True)[0] + x.mode(3, True)[0]
    ),
    "largest so far": lambda x: x.cummax(2)[0] + x.cummin(3).values,
    "batch norm": nn.BatchNorm2d(8),
    "batch norm without affine": nn.BatchNorm2d(8, affine=False),
    "batch statistics": nn.BatchNorm2d(8, track_running_stats=False),
    "instance norm": nn.InstanceNorm2d(8),
    "group norm": nn.GroupNorm(4, 8),
    "group norm of each channel": nn.GroupNorm(8, 8),
    "layer norm over space": lambda x: F.layer_norm(x, x.shape[2:]),
    "rms norm over space": lambda x: F.rms_norm(x, x.shape[2:]),
}
SPATIAL: dict[str, Operator] = {
    "max_pool": lambda x: F.max_pool2d(x, 3, 2, 1) + F.avg_pool2d(x, 3, 2, 1),
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, 3) + F.adaptive_max_pool2d(x, 3),
    "1d": lambda x: (
        F.max_pool1d(x[..., 0], 2)
        + F.avg_pool1d(x[..., 0], 2)
        + F.adaptive_avg_pool1d(x[..., 0], 4)
        + F.adaptive_max_pool1d(x[..., 0], 4)
        + F.interpolate(x[..., :2, 0], scale_factor=2, mode="linear")
        + F.interpolate(x[..., :2, 0], scale_factor=2)
        + F.interpolate(x[..., :2, 0], 4, mode="nearest-exact")
    ),
    "3d": lambda x: (
        F.max_pool3d(x[:, :, None], (1, 2, 2))
        + F.avg_pool3d(x[:, :, None], (1, 2, 2))
        + F.adaptive_avg_pool3d(x[:, :, None], (1, 4, 4))
        + F.adaptive_max_pool3d(x[:, :, None], (1, 4, 4))
        + F.interpolate(x[:, :, None, :2, :2], (1, 4, 4))
        + F.interpolate(x[:, :, None, :2, :2], (1, 4, 4), mode="trilinear")
        + F.interpolate(x[:, :, None, :2, :2], (1, 4, 4), mode="nearest-exact")
    )[:, :, 0],
    "unpool": lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2),
    "unpool other values": lambda x: F.max_unpool2d(
        F.avg_pool2d(x, 2).sigmoid(), F.adaptive_max_pool2d(x, 4, return_indices=True)[1], 2
    ),
    "unpool 3d": lambda x: F.max_unpool3d(*F.max_pool3d(x[:, :, None], (1, 2, 2), return_indices=True), (1, 2, 2))[
        :, :, 0
    ],
    "upsample": lambda x: sum(
        F.interpolate(x, 12, mode=mode) for mode in ("nearest", "nearest-exact", "bilinear", "bicubic")
    ),
    "antialiased": lambda x: (
        F.interpolate(x, 5, mode="bilinear", antialias=True) + F.interpolate(x, 5, mode="bicubic", antialias=True)
    ),
    "padding": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect") + F.pad(x, (1, 1, 1, 1), mode="replicate"),
    "padding 1d": lambda x: F.pad(x[..., 0], (1, 1), mode="reflect") + F.pad(x[..., 0], (1, 1), mode="replicate"),
    "padding 3d": lambda x: (
        F.pad(x[:, :, None], (1, 1, 1, 1, 0, 0), mode="replicate")
        + F.pad(x[:, :, None], (1,) * 4 + (0, 0), mode="reflect")
    )[:, :, 0],
    "circular": lambda x: F.pad(x, (1, 1, 1, 1), mode="circular"),
    "roi_align": lambda x: roi_align(x, BOXES, 3) + roi_pool(x, BOXES, 3),
    "grid_sample": lambda x: F.grid_sample(
        x, F.affine_grid(torch.eye(2, 3, dtype=x.dtype).expand(2, -1, -1), [2, 1, 5, 5], False), align_corners=False
    ),
    "grid_sample 3d": lambda x: F.grid_sample(
        x[:, :, None], torch.zeros(2, 1, 3, 3, 3, dtype=x.dtype), align_corners=False
    )[:, :, 0],
}


def best(x: Tensor) -> Tensor:
    """(n, 1, 5) positions."""
    return x.sum(1, keepdim=True).flatten(2).topk(5).indices


FIXED = torch.randn(8, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def attention(x: Tensor, scale: float | None = None) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2)
    q, k, v = tokens, tokens * 2, tokens.exp()
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


KERNELS = torch.randn(4, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
CONTRACTION: dict[str, Operator] = {
    "convolution": nn.Conv2d(8, 6, 3),
    "strided without bias": nn.Conv2d(8, 6, 3, stride=2, bias=False),
    "grouped": nn.Conv2d(8, 12, 3, groups=2),
    "many groups": nn.Conv2d(8, 16, 3, groups=4),
    "depthwise": nn.Conv2d(8, 16, 3, groups=8),
    "one kernel repeated": lambda x: F.conv2d(x, KERNELS[:1].repeat(x.shape[1], 1, 1, 1), groups=x.shape[1]),
    "one kernel expanded": lambda x: F.conv2d(x, KERNELS[:1].expand(x.shape[1], -1, -1, -1), groups=x.shape[1]),
    "kernels of wavelets": lambda x: F.conv2d(x, KERNELS.repeat(x.shape[1], 1, 1, 1), groups=x.shape[1], stride=2),
    "one kernel transposed": lambda x: F.conv_transpose2d(
        x, KERNELS[:1].repeat(x.shape[1], 1, 1, 1).flip(2, 3), groups=x.shape[1]
    ),
    "separable kernel": lambda x: F.conv2d(
        x, KERNELS[:1, :, 0].repeat(x.shape[1], 1, 1).unsqueeze(3), groups=x.shape[1]
    ),
    "transposed": nn.ConvTranspose2d(8, 6, 2, 2),
    "grouped transposed": nn.ConvTranspose2d(8, 12, 2, 2, groups=2),
    "depthwise transposed": nn.ConvTranspose2d(8, 16, 2, 2, groups=8),
    "to groups of one": nn.ConvTranspose2d(8, 4, 2, 2, groups=4),
    "linear": nn.Sequential(nn.Flatten(), nn.Linear(8 * 64, 7), nn.Unflatten(1, (-1, 1, 1))),
    "tokens": lambda x: (x.flatten(2).transpose(1, 2) @ x.flatten(2)).sum(1)[:, None, None],
    "attention": lambda x: attention(x, scale=0.5),
    "gram": lambda x: torch.einsum("bchw,bdhw->bcd", x, x).sum(-1)[..., None, None],
    "baddbmm": lambda x: torch.baddbmm(x[..., 0], x[..., 1], torch.ones(2, 8, 8, dtype=x.dtype)),
}


class Deformable(nn.Module):
    """A deformable convolution with weights, and offsets from the image itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 8, 3, 3)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        offset = x.new_zeros(x.shape[0], 18, 8, 8)
        return deform_conv2d(x, offset, self.weight, self.bias, padding=1, mask=x.new_ones(x.shape[0], 9, 8, 8))


class Embedded(nn.Module):
    """Channels shifted by an embedding of their position."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table(torch.arange(64)).view(8, 8, -1).permute(2, 0, 1)


class Scored(nn.Module):
    """Every position weighed by its product with a vector, channels last: pooling by attention."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.permute(0, 2, 3, 1) @ self.query).sigmoid()[:, None]


class Recurrent(nn.Module):
    """Rows as time steps."""

    def __init__(self, layer: nn.RNNBase, *, packed: bool = False) -> None:
        super().__init__()
        self.layer, self.packed = layer, packed

    def forward(self, x: Tensor) -> Tensor:
        steps = x.mean(3).transpose(1, 2)
        if self.packed:
            steps = pack_padded_sequence(steps, [8, 7], batch_first=True)
        return self.layer(steps)[1][0].movedim(0, -1)[..., None]


CONTRACTION |= {
    "product with a vector": Scored(),
    "lstm": Recurrent(nn.LSTM(8, 6, batch_first=True)),
    "packed gru": Recurrent(nn.GRU(8, 6, batch_first=True), packed=True),
    "deformable convolution": Deformable(),
    "embedding": Embedded(),
    "matrix": lambda x: (x.mean((2, 3)).t() @ x.mean((2, 3))).sum(1)[None, :, None, None].expand(2, -1, -1, -1),
}
LOSSES: dict[str, Operator] = {
    "squared errors": lambda x: F.mse_loss(x, x.flip(3), reduction="none"),
    "sum of squared errors": lambda x: x * F.mse_loss(x, x.flip(3), reduction="sum"),
    "sum of smooth errors": lambda x: x * F.smooth_l1_loss(x, x.flip(3), reduction="sum"),
    "sum of Huber's errors": lambda x: x * F.huber_loss(x, x.flip(3), reduction="sum"),
    "cross-entropies": lambda x: F.binary_cross_entropy(x.clamp(0, 1), x.clamp(0, 1), reduction="none"),
}
EXACT = {**LOSSES, **ELEMENTWISE, **MOVEMENT, **STATISTICS, **SPATIAL, **CONTRACTION}
REFUSED: dict[str, tuple[Operator, str]] = {
    "layer norm": (lambda x: F.layer_norm(x, x.shape[1:]), "statistic over channels in aten.native_layer_norm"),
    "one group": (lambda x: F.group_norm(x, 1), "statistic over channels in aten.native_group_norm"),
    "softmax": (lambda x: x.softmax(1), "statistic over channels in aten._softmax"),
    "mean": (lambda x: x * x.mean(1, True), "statistic over channels in aten.mean"),
    "max": (lambda x: x * x.amax(1, True), "statistic over channels in aten.amax"),
    "median": (lambda x: x * x.median(1, True)[0], "statistic over channels in aten.median"),
    "sum of constants": (lambda x: x * x.sigmoid().sum(1, True), "constant that enters a sum"),
    "mean error": (lambda x: x * F.mse_loss(x, x.flip(3)), "statistic over channels in aten.mse_loss"),
    "sum of errors of constants": (
        lambda x: x * F.mse_loss(x.sigmoid(), x, reduction="sum"),
        "constant that enters a sum",
    ),
    "classes": (lambda x: x * F.nll_loss(x.mean((2, 3)), torch.tensor([0, 3])), "is a class in aten.nll_loss_forward"),
    "classes of pixels": (
        lambda x: x * F.nll_loss(x, torch.ones(2, 8, 8, dtype=torch.long)),
        "is a class in aten.nll_loss2d_forward",
    ),
    "cumsum": (lambda x: x.cumsum(1), "aten.cumsum"),
    "topk": (lambda x: x.topk(4, 1).values, "aten.topk"),
    "by number": (lambda x: x[:, torch.tensor([1, 0, 2])], "by its number in aten.index"),
    "one channel": (lambda x: x[:, 3:4] * x, "cut at fixed places"),
    "select": (lambda x: x * x.select(1, 2)[:, None], "by its number in aten.select"),
    "every other": (lambda x: x[:, ::2], "by its number in aten.slice"),
    "roll": (lambda x: x.roll(1, 1), "by its number in aten.roll"),
    "uneven pieces": (lambda x: torch.cat(x.split([3, 5], 1)[::-1], 1), "cut at fixed places"),
    "baked view": (lambda x: x.view(2, 8, 64)[..., None], "fixed in the Python code"),
    "baked flatten": (lambda x: x.reshape(-1, 512)[..., None, None], "fixed in the Python code"),
    "kernels of fixed number": (
        lambda x: F.conv2d(x, KERNELS.repeat(2, 1, 1, 1), groups=8),
        "is read by weights of fixed size",
    ),
    "kernels of which one was changed": (
        lambda x: F.conv2d(x, _changed(KERNELS[:1].repeat(x.shape[1], 1, 1, 1)), groups=x.shape[1]),
        "is read by weights of fixed size",
    ),
    "fixed partner": (lambda x: x * FIXED, "fixed size"),
    "numbered": (lambda x: x * torch.arange(x.shape[1])[:, None, None], "meets a tensor of fixed size in aten.mul"),
    "first channels": (lambda x: x * (torch.linspace(0, 1, x.shape[1]) < 0.6).view(-1, 1, 1), "fixed size in aten.mul"),
    "triangle of channels": (lambda x: x.transpose(1, 3).tril().transpose(1, 3), "to a triangle by aten.tril"),
    "counted": (lambda x: x * x.shape[1], "fixed in the Python code"),
    "infinite": (lambda x: x.abs().log(), "is infinite when masked in aten.log"),
    "steep": (lambda x: x.abs().sqrt(), "has an infinite slope when masked, so that gradients are NaN"),
    "attention over channels": (attention, "fixed in the Python code"),
    "channels as positions": (
        lambda x: F.avg_pool1d(x.mean((2, 3))[:, None], 3, 1, 1).transpose(1, 2)[..., None],
        "pools",
    ),
    "written in part": (lambda x: _written(x), "fixed in the Python code"),
    "written through a flat view": (lambda x: _written_flat(x), "written through a view"),
    "gathered channels": (lambda x: x.gather(1, torch.zeros(2, 8, 8, 8).long()), "by its number in aten.gather"),
    "gathered from some channels": (
        lambda x: x.gather(3, torch.zeros(2, 4, 8, 8).long()),
        "by its number in aten.gather",
    ),
    "gathered by an index of fixed size": (
        lambda x: x.gather(3, torch.zeros(2, 8, 8, 8).long() + (FIXED > 9)),
        "fixed size",
    ),
    "scattered channels": (lambda x: x.scatter(1, torch.zeros(2, 8, 8, 8).long(), x), "at fixed places by"),
    "scattered into some": (lambda x: x.scatter(2, torch.zeros(2, 4, 1, 8).long(), 1.0), "at fixed places by"),
    "added to channels": (lambda x: x.index_add(1, torch.arange(8), x), "at fixed places by aten.index_add"),
    "unpooled by an index of fixed size": (
        lambda x: F.max_unpool2d(
            F.avg_pool2d(x, 2), (torch.arange(16).view(4, 4) + 0 * FIXED).long()[None].repeat(2, 1, 1, 1), 2
        ),
        "fixed size",
    ),
    "weight norm": (weight_norm(nn.Conv2d(8, 6, 3).double()), "statistic over channels in aten._weight_norm_interface"),
    "spectral norm": (spectral_norm(nn.Conv2d(8, 6, 3).double()), "statistic of the whole weight in aten.mv"),
    "old spectral norm": (
        nn.utils.spectral_norm(nn.Conv2d(8, 6, 3).double()),
        "statistic of the whole weight in aten.mv",
    ),
    "fake quantizer": (
        lambda x: torch.fake_quantize_per_tensor_affine(x.float(), 0.1, 0, 0, 255).double(),
        "quantizer",
    ),
    "with its scale": (
        lambda x: torch.fake_quantize_per_tensor_affine(
            x.float(), torch.ones(1), torch.zeros(1).int(), 0, 255
        ).double(),
        "quantizer",
    ),
    "per channel": (
        lambda x: torch.fake_quantize_per_channel_affine(
            x.float(), torch.ones(8), torch.zeros(8).int(), 1, 0, 255
        ).double(),
        "quantizer",
    ),
    "learnt scale": (
        lambda x: torch._fake_quantize_learnable_per_tensor_affine(
            x.float(), torch.ones(1), torch.zeros(1), 0, 255, 1.0
        ).double(),
        "quantizer",
    ),
    "learnt scales": (
        lambda x: torch._fake_quantize_learnable_per_channel_affine(
            x.float(), torch.ones(8), torch.zeros(8), 1, 0, 255, 1.0
        ).double(),
        "quantizer",
    ),
    "observed": (lambda x: observed(x.float()).double(), "quantizer"),
    "unknown": (lambda x: x.renorm(2, 1, 1.0), "without a rule, aten.renorm"),
}


def observed(x: Tensor) -> Tensor:
    """The fused operator of a quantizer that watches the range."""
    switch, bound, scale, zero = torch.ones(1).long(), torch.ones(1), torch.ones(1), torch.zeros(1).int()
    return torch.fused_moving_avg_obs_fake_quant(x, switch, switch, -bound, bound, scale, zero, 0.1, 0, 255, 0)


def _changed(kernels: Tensor) -> Tensor:
    kernels[3] = 0
    return kernels


def _written_flat(x: Tensor) -> Tensor:
    flat = x.new_zeros(x.shape[0], x[0].numel())
    flat.view(x.shape).copy_(x)
    return flat.view(x.shape)


def _written(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, :4].mul_(0).add_(x[:, 4:])
    x[:, 4:] = 1.0
    return x


@pytest.mark.parametrize("name", EXACT)
def test_exact(name: str) -> None:
    operator = EXACT[name]
    if isinstance(operator, nn.Module):
        operator = copy.deepcopy(operator).double().eval()
    assert pruned(Between(operator)) is None


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    operator, reason = REFUSED[name]
    assert reason in (pruned(Between(operator)) or "")


class Names(TorchDispatchMode):
    """Collects the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, name = func.overloadpacket._qualified_op_name.split("::")
        self.seen.add(name if namespace == "aten" else f"{namespace}.{name}")
        return func(*args, **(kwargs or {}))


def test_every_rule_is_exercised_here() -> None:
    with Names() as names:
        for operator in (*EXACT.values(), *(operator for operator, _ in REFUSED.values())):
            if isinstance(operator, nn.Module):
                operator = copy.deepcopy(operator).double().eval()
            with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                Between(operator)
    seen = names.seen | {name.removesuffix("_") for name in names.seen}
    assert set(RULES) - seen <= OTHER_DEVICES | OTHER_VERSIONS


# Reached on other devices only, or where another torch version decomposes differently.
OTHER_DEVICES = set(
    "cudnn_convolution cudnn_batch_norm miopen_convolution miopen_depthwise_convolution miopen_batch_norm "
    "mkldnn_convolution mkldnn_max_pool2d convolution_overrideable mkldnn_rnn_layer _cudnn_rnn "
    "_thnn_fused_lstm_cell _thnn_fused_gru_cell".split()
)
OTHER_VERSIONS = set(
    "_convolution _batch_norm_no_update _batch_norm_with_update _native_batch_norm_legit batch_norm relu6 selu square "
    "_native_batch_norm_legit_no_training _fused_rms_norm adaptive_avg_pool1d adaptive_max_pool1d avg_pool1d "
    "max_pool1d max_pool2d max_pool3d alias contiguous narrow norm reshape _reshape_alias isfinite scalar_tensor "
    "empty_strided new_empty_strided native_channel_shuffle native_dropout tril_indices triu_indices".split()
)


class NormAfterShuffle(nn.Module):
    """Channels become positions, and a norm is taken over those that are left (AutoencoderDC)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 24, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pixel_shuffle(self.a(x), 2)
        return self.b(x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1))


def test_a_statistic_over_shuffled_channels_does_not_join_them() -> None:
    group = trace(NormAfterShuffle(), torch.randn(2, 3, 4, 4), statistics=True).group("a")
    assert (group.size, group.prunable) == (6, True)
    assert "enters a statistic over channels" in str(group.statistics)


def test_what_is_shuffled_into_a_single_channel_stays() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.PixelShuffle(2), nn.Conv2d(1, 2, 1))
    assert "makes a single channel" in str(trace(model, torch.randn(2, 3, 4, 4)).group("0").reason)
