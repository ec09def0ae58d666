"""Models whose own code assigns, folds or averages weights, and what says that they were pruned without loss."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim.swa_utils import AveragedModel

from lightning_prune.graph import ChannelGraph, trace
from lightning_prune.reconstruction.masks import mask_
from lightning_prune.reconstruction.small_model import reconstruct
from tests.helpers import random_plan
from tests.zoo import images

Update = Callable[["Fold"], None]


def conv(into: int, out: int, size: int = 3) -> nn.Conv2d:
    return nn.Conv2d(into, out, size, padding=size // 2)


class Fold(nn.Module):
    """Two branches; their sum is put into a third kernel by ``update`` in forward, or when entering eval mode."""

    def __init__(self, into: int, out: int, update: Update, *, outside: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.into = conv(into, out), conv(into, out), conv(into, out)
        self.update, self.outside = update, outside

    def train(self, mode: bool = True) -> Fold:
        super().train(mode)
        if self.outside and not mode:
            with torch.no_grad():
                self.update(self)
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.a(x) + self.b(x)
        if not self.outside:
            with torch.no_grad():
                self.update(self)
        return self.folded(x)

    def folded(self, x: Tensor) -> Tensor:
        return self.into(x)


def by_data(m: Fold) -> None:
    m.into.weight.data = m.a.weight.data + m.b.weight.data
    m.into.bias.data = m.a.bias.data + m.b.bias.data


def by_copy(m: Fold) -> None:
    m.into.weight.copy_(m.a.weight + m.b.weight)
    m.into.bias.copy_(m.a.bias + m.b.bias)


def by_data_copy(m: Fold) -> None:
    m.into.weight.data.copy_(m.a.weight.data + m.b.weight.data)
    m.into.bias.data[:] = m.a.bias.data + m.b.bias.data


def by_arithmetic(m: Fold) -> None:
    for name in ("weight", "bias"):
        target, a, b = (getattr(part, name).data for part in (m.into, m.a, m.b))
        target.mul_(0).add_(a).lerp_(a + b, 1.0)


def by_new_parameter(m: Fold) -> None:
    m.into.weight = nn.Parameter(m.a.weight + m.b.weight)
    m.into.bias = nn.Parameter(m.a.bias + m.b.bias)


def by_deletion(m: Fold) -> None:
    for name in ("weight", "bias"):
        delattr(m.into, name)
        setattr(m.into, name, nn.Parameter(getattr(m.a, name).detach() + getattr(m.b, name).detach()))


def by_entry(m: Fold) -> None:
    m.into._parameters["weight"] = nn.Parameter(m.a.weight + m.b.weight)
    m.into.register_parameter("bias", nn.Parameter(m.a.bias + m.b.bias))


def by_state_dict(m: Fold) -> None:
    m.into.load_state_dict({key: value + m.b.state_dict()[key] for key, value in m.a.state_dict().items()})


def by_assigned_state_dict(m: Fold) -> None:
    state = {key: value + m.b.state_dict()[key] for key, value in m.a.state_dict().items()}
    m.into.load_state_dict(state, assign=True)


def by_foreach(m: Fold) -> None:
    target, a, b = (list(part.parameters()) for part in (m.into, m.a, m.b))
    torch._foreach_copy_(target, a)
    torch._foreach_add_(target, b)


def by_foreach_arithmetic(m: Fold) -> None:
    target, a, b = (list(part.parameters()) for part in (m.into, m.a, m.b))
    torch._foreach_mul_(target, 0.0)
    torch._foreach_lerp_(target, a, 1.0)
    torch._foreach_addcmul_(target, b, [torch.full_like(t, 2.0) for t in b], value=0.5)


def by_scaled_rows(m: Fold) -> None:
    scale = m.b.bias / (m.b.weight.flatten(1).norm(dim=1) + 1e-5)
    m.into.weight.data = m.a.weight * scale.reshape(-1, 1, 1, 1) + m.b.weight
    m.into.bias.data = m.a.bias * scale + m.b.bias


UPDATES = [value for name, value in list(globals().items()) if name.startswith("by_")]


def net(update: Update, *, outside: bool = False) -> nn.Module:
    torch.manual_seed(0)
    first, second = Fold(3, 8, update, outside=outside), Fold(8, 6, update, outside=outside)
    return nn.Sequential(first, nn.SiLU(), second, nn.ReLU(), nn.Conv2d(6, 4, 1))


def snapshot(model: nn.Module) -> dict[str, tuple[Tensor, int, Tensor]]:
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: (tensor, tensor.data_ptr(), tensor.detach().clone()) for name, tensor in named}


def traced(model: nn.Module, inputs=None) -> ChannelGraph:
    """The graph; the model is left with the same tensors at the same place, with the same values."""
    before = snapshot(model)
    graph = trace(model, images() if inputs is None else inputs)
    after = snapshot(model)
    assert list(before) == list(after)
    for name, (tensor, place, value) in before.items():
        assert after[name][0] is tensor, name
        assert after[name][1] == place, name
        assert torch.equal(after[name][2], value), name
    return graph


def assert_lossless(model: nn.Module, graph: ChannelGraph, ratio: float = 0.5, inputs=None) -> nn.Module:
    """Masked and small agree in both modes, several runs in a row, on inputs that were not traced."""
    plan = random_plan(graph, ratio)
    masked = copy.deepcopy(model)
    handle = mask_(masked, graph, plan)
    small = reconstruct(model, graph, plan)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in masked.parameters())
    new = [images(3, seed=5), images(2, seed=6)[..., :7]] if inputs is None else inputs
    for training in (False, True, False):
        masked.train(training)
        small.train(training)
        for x in new:
            with torch.no_grad():
                expected, found = masked(x), small(x)
            assert float((expected - found).abs().max()) <= 1e-10 * float(expected.abs().max())
            assert handle.is_zero()
    for name, tensor in masked.named_parameters():
        if name not in graph.shapes:
            continue  # made in eval mode
        cut = {
            c.dim: c.keep
            for c in graph.cuts({n: torch.tensor(g.removed) for n, g in plan.groups.items() if g.removed})
            if c.tensor == name
        }
        for dim, keep in cut.items():
            tensor = tensor.index_select(dim, keep)
        assert torch.allclose(tensor, dict(small.named_parameters())[name], rtol=0, atol=1e-10), name
    return small


class RepBlock(nn.Module):
    """RepVGG: 3x3, 1x1 and identity branches, each with a batch norm; in eval one kernel, folded by ``fold``."""

    def __init__(self, channels: int, out: int, how: str, *, identity: bool = False) -> None:
        super().__init__()
        self.dense, self.dense_norm = nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.point, self.point_norm = nn.Conv2d(channels, out, 1, bias=False), nn.BatchNorm2d(out)
        self.norm = nn.BatchNorm2d(out) if identity else None
        self.deploy, self.how = (None if how.startswith("attribute") else nn.Conv2d(channels, out, 3, padding=1)), how
        self.kernel: Tensor | None = None
        self.bias: Tensor | None = None

    def folded(self) -> tuple[Tensor, Tensor]:
        kernel, bias = 0.0, 0.0
        branches = [(self.dense.weight, self.dense_norm), (F.pad(self.point.weight, [1, 1, 1, 1]), self.point_norm)]
        if self.norm is not None:
            eye = torch.zeros_like(self.dense.weight)
            for i in range(len(eye)):
                eye[i, i, 1, 1] = 1
            branches.append((eye, self.norm))
        for weight, norm in branches:
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            kernel = kernel + weight * scale.reshape(-1, 1, 1, 1)
            bias = bias + norm.bias - norm.running_mean * scale
        return kernel.detach(), bias.detach()

    def fold(self) -> None:
        kernel, bias = self.folded()
        if self.how.startswith("data"):
            self.deploy.weight.data, self.deploy.bias.data = kernel, bias
        elif self.how.startswith("module"):
            out, into = kernel.shape[:2]
            self.deploy = nn.Conv2d(into, out, 3, padding=1)
            self.deploy.weight, self.deploy.bias = nn.Parameter(kernel), nn.Parameter(bias)
        else:
            self.kernel, self.bias = kernel, bias

    def train(self, mode: bool = True) -> RepBlock:
        super().train(mode)
        if mode:
            self.kernel = self.bias = None
        elif self.how.endswith("mode"):
            self.fold()
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            y = self.dense_norm(self.dense(x)) + self.point_norm(self.point(x))
            return y if self.norm is None else y + self.norm(x)
        if self.how.endswith("forward"):
            self.fold()
        return self.deploy(x) if self.kernel is None else F.conv2d(x, self.kernel, self.bias, padding=1)


FOLDS = [f"{what} in {where}" for what in ("data", "module", "attribute") for where in ("forward", "mode")]


class Teacher(nn.Module):
    """A student and a moving average of it, updated by ``update`` in forward; batch norms, so buffers too."""

    def __init__(self, update: Callable[[nn.Module, nn.Module], None]) -> None:
        super().__init__()
        self.student = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 6), nn.ReLU(), conv(6, 4))
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.update = update

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.update(self.teacher, self.student)
        return self.student(x) + 0.5 * self.teacher(x)


def pairs(t: nn.Module, s: nn.Module) -> list[tuple[Tensor, Tensor]]:
    return list(zip(t.parameters(), s.parameters(), strict=True))


def mean_in_place(t: nn.Module, s: nn.Module) -> None:
    for p, q in pairs(t, s):
        p.data.mul_(0.9).add_(q.data, alpha=0.1)


def mean_by_data(t: nn.Module, s: nn.Module) -> None:
    for p, q in pairs(t, s):
        p.data = 0.9 * p.data + 0.1 * q.data


def mean_by_lerp(t: nn.Module, s: nn.Module) -> None:
    for p, q in pairs(t, s):
        p.data.lerp_(q.data, 0.1)


def mean_by_foreach(t: nn.Module, s: nn.Module) -> None:
    torch._foreach_lerp_(list(t.parameters()), list(s.parameters()), 0.1)


def mean_by_foreach_sum(t: nn.Module, s: nn.Module) -> None:
    torch._foreach_mul_(list(t.parameters()), 0.9)
    torch._foreach_add_(list(t.parameters()), torch._foreach_mul(list(s.parameters()), 0.1))


def mean_by_state_dict(t: nn.Module, s: nn.Module) -> None:
    for value, new in zip(t.state_dict().values(), s.state_dict().values(), strict=True):
        if value.is_floating_point():
            value.copy_(value * 0.9 + new * 0.1)


def mean_by_loading(t: nn.Module, s: nn.Module) -> None:
    new = s.state_dict()
    t.load_state_dict(
        {key: v if v.dtype == torch.int64 else torch.lerp(v, new[key], 0.1) for key, v in t.state_dict().items()}
    )


def copied(t: nn.Module, s: nn.Module) -> None:
    t.load_state_dict(s.state_dict())


def named_setattr(t: nn.Module, s: nn.Module) -> None:
    for (name, p), q in zip(list(t.named_parameters()), s.parameters(), strict=True):
        path, _, last = name.rpartition(".")
        setattr(t.get_submodule(path), last, nn.Parameter(0.9 * p + 0.1 * q, requires_grad=False))


MEANS = [
    mean_in_place,
    mean_by_data,
    mean_by_lerp,
    mean_by_foreach,
    mean_by_foreach_sum,
    mean_by_state_dict,
    mean_by_loading,
    copied,
    named_setattr,
]


class Averaged(nn.Module):
    """torch's own averages of a module's weights, as a part of the model."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.net = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 4))
        self.mean = AveragedModel(self.net, **options)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.update_parameters(self.net)
        return self.net(x) + self.mean(x)


class Swapped(nn.Module):
    """A network that runs with the weights of another, in one of the ways that there are."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.net, self.other = (nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 4)) for _ in range(2))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        own, other = list(self.net.parameters()), list(self.other.parameters())
        if self.how == "call":
            return self.net(x) + functional_call(self.net, dict(self.other.named_parameters()), (x,))
        if self.how == "mean call":
            mean = {name: (p + q) / 2 for (name, p), q in zip(self.net.named_parameters(), other, strict=True)}
            return self.net(x) + functional_call(self.net, mean, (x,))
        if self.how == "data":
            before = [p.data for p in own]
            for p, q in zip(own, other, strict=True):
                p.data = q.data
            y = self.net(x)
            for p, data in zip(own, before, strict=True):
                p.data = data
            return y + self.net(x)
        weight, bias = self.net[0].weight, self.net[0].bias
        before = weight.data
        weight.data = self.other[0].weight.data
        y = F.conv2d(x, weight, bias, padding=1)
        weight.data = before
        return self.net[2](F.relu(y)) + self.net(x) + self.other[2](F.relu(self.other[0](x)))


class Remembering(nn.Module):
    """A buffer that is written from activations in one of many ways, and read."""

    def __init__(self, write: Callable[[Remembering, Tensor], None]) -> None:
        super().__init__()
        self.encoder, self.read, self.write = conv(3, 8), conv(8, 4), write
        for name, shape in {"queue": (8, 12), "keys": (12, 8), "center": (1, 8), "scale": (8,)}.items():
            self.register_buffer(name, torch.randn(shape, generator=torch.Generator().manual_seed(1)).abs())
        self.register_buffer("at", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x)
        features = F.relu(x).mean((2, 3))
        with torch.no_grad():
            self.write(self, features)
        near = features @ self.queue @ self.keys - self.center
        return self.read(x * self.scale.view(1, -1, 1, 1) + (near * features)[..., None, None])


def queue_columns(m: Remembering, f: Tensor) -> None:
    at = int(m.at)
    m.queue[:, at : at + len(f)] = f.t()
    m.at.copy_((m.at + len(f)) % 4)


def queue_rows(m: Remembering, f: Tensor) -> None:
    m.keys[: len(f)] = f


def queue_indexed(m: Remembering, f: Tensor) -> None:
    m.keys[torch.arange(len(f))] = f


def queue_shifted(m: Remembering, f: Tensor) -> None:
    m.keys = torch.cat([f, m.keys[: -len(f)]])


def center_replaced(m: Remembering, f: Tensor) -> None:
    m.center = m.center * 0.9 + f.mean(0, keepdim=True) * 0.1


def center_in_place(m: Remembering, f: Tensor) -> None:
    m.center.mul_(0.9).add_(f.mean(0, keepdim=True), alpha=0.1)


def center_by_data(m: Remembering, f: Tensor) -> None:
    m.center.data = m.center.data * 0.9 + f.mean(0, keepdim=True) * 0.1


def scale_overwritten(m: Remembering, f: Tensor) -> None:
    m.scale.copy_(f.mean(0))


def scale_replaced(m: Remembering, f: Tensor) -> None:
    m.scale = f.std(0) if len(f) > 1 else f[0]


def scale_constant(m: Remembering, f: Tensor) -> None:
    m.scale.fill_(0.5)


def scale_reset(m: Remembering, f: Tensor) -> None:
    m.scale = torch.ones_like(m.scale)


def all_state(m: Remembering, f: Tensor) -> None:
    m.load_state_dict({**m.state_dict(), "scale": f.mean(0)})


WRITES = [
    queue_columns,
    queue_rows,
    queue_indexed,
    queue_shifted,
    center_replaced,
    center_in_place,
    center_by_data,
    scale_overwritten,
    scale_replaced,
    scale_constant,
    scale_reset,
    all_state,
]


class Conv3XC(nn.Module):
    """SPAN: 1x1, 3x3 and 1x1 kernels without anything between are folded into one; a 1x1 shortcut is padded."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.skip, self.a, self.b, self.c = (
            conv(into, out, 1),
            conv(into, 2 * into, 1),
            nn.Conv2d(2 * into, 2 * out, 3),
            conv(2 * out, out, 1),
        )
        self.single = conv(into, out)

    def fold(self) -> None:
        (wa, ba), (wb, bb), (wc, bc) = ((m.weight.data, m.bias.data) for m in (self.a, self.b, self.c))
        w = F.conv2d(wa.flip(2, 3).permute(1, 0, 2, 3), wb, padding=2, stride=1).flip(2, 3).permute(1, 0, 2, 3)
        b = (wb * ba.reshape(1, -1, 1, 1)).sum((1, 2, 3)) + bb
        w = F.conv2d(w.flip(2, 3).permute(1, 0, 2, 3), wc).flip(2, 3).permute(1, 0, 2, 3)
        b = (wc * b.reshape(1, -1, 1, 1)).sum((1, 2, 3)) + bc
        self.single.weight.data = (w + F.pad(self.skip.weight.data, [1, 1, 1, 1])).contiguous()
        self.single.bias.data = (b + self.skip.bias.data).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.c(self.b(self.a(F.pad(x, (1, 1, 1, 1))))) + self.skip(x)
        self.fold()
        return self.single(x)


class LowRank(nn.Linear):
    """LoRA as loralib writes it: eval mode merges the product into the weight in place, train mode takes it out."""

    def __init__(self, into: int, out: int, rank: int = 4) -> None:
        super().__init__(into, out)
        self.down, self.up = nn.Parameter(torch.randn(rank, into)), nn.Parameter(torch.randn(out, rank))
        self.merged = False

    def train(self, mode: bool = True) -> LowRank:
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * self.up.data @ self.down.data
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y if self.merged else y + x @ self.down.t() @ self.up.t()


def exponential(m: Fold) -> None:
    m.into.weight.data = m.a.weight.exp()


def shifted(m: Fold) -> None:
    m.into.weight.copy_(m.a.weight + 0.1)


def filled(m: Fold) -> None:
    m.into.weight.data.fill_(0.1)


def noisy(m: Fold) -> None:
    m.into.weight.data.add_(
        torch.randn(m.into.weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    )


def replaced_by_ones(m: Fold) -> None:
    m.into.weight = nn.Parameter(torch.ones_like(m.a.weight))


def foreign(m: Fold) -> None:
    m.into.weight.data = torch.from_numpy(m.a.weight.detach().numpy() * 2)


def clamped_away_from_zero(m: Fold) -> None:
    m.into.weight.data.clamp_(min=0.01)


def flipped(m: Fold) -> None:
    m.into.weight.data, m.into.bias.data = m.a.weight.data.flip(0), m.a.bias.data.flip(0)


def transposed(m: Fold) -> None:
    m.into.weight.data = m.a.weight.data.transpose(0, 1)
    m.into.bias.data = m.a.bias.data + m.b.bias.data


def halves(m: Fold) -> None:
    half = len(m.into.weight) // 2
    m.into.weight.data[:half] = m.a.weight.data[:half]
    m.into.weight.data[half:] = m.b.weight.data[half:]
    m.into.bias.data = torch.cat([m.a.bias.data[:half], m.b.bias.data[half:]])


def another_shape(m: Fold) -> None:
    m.into.weight.data = F.pad(m.a.weight.data, [1, 1, 1, 1])
    m.into.padding = (2, 2)
    m.into.bias.data = m.a.bias.data


def viewed(m: Fold) -> None:
    m.into.weight.data.view(-1).copy_((m.a.weight.data * 2).view(-1))
    m.into.bias.data.copy_(m.a.bias.data)


class Fused(nn.Module):
    """A convolution and a batch norm that torch fuses into a new module in eval; train mode takes it away again."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(into, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)

    def train(self, mode: bool = True) -> Fused:
        super().train(mode)
        if not mode:
            self.fused = fuse_conv_bn_eval(self.conv, self.norm)
        elif hasattr(self, "fused"):
            del self.fused
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.fused(x) if hasattr(self, "fused") else self.norm(self.conv(x))


class Direct(Fold):
    """Reads the kernel by itself, after constants (sigmoid) whose weights have to be masked."""

    def folded(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.into.weight, self.into.bias, padding=1)
