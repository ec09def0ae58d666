"""What random tasks are made of: backbones, and what their training steps use besides forward."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 3


class DomainNorm(nn.Module):
    """One batch norm per domain; the step sets which."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(2))
        self.domain = 0

    def forward(self, x):
        return self.norms[self.domain](x)


class Branch(nn.Module):
    """Taken when the step says so."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)
        self.taken = False

    def forward(self, x):
        return x + self.conv(x) if self.taken else x


def conv(norm: str, inputs: int, outputs: int, groups: int = 1) -> nn.Module:
    layers = [nn.Conv2d(inputs, outputs, 3, padding=1, groups=groups, bias=not norm)]
    if norm:
        layers.append(nn.BatchNorm2d(outputs) if norm == "batch" else DomainNorm(outputs))
    return nn.Sequential(*layers, nn.ReLU())


class Backbone(nn.Module):
    """Inner and last feature maps of images."""

    def __init__(self, kind: str, width: int, norm: str) -> None:
        super().__init__()
        self.kind, self.inner, self.channels = kind, width, width + 2
        self.stem = conv(norm, 3, width)
        self.branch: nn.Module = nn.Identity()
        if kind == "concat":
            self.a, self.b = conv(norm, width, 4), conv(norm, width, 3)
            self.last = conv(norm, 7, self.channels)
        else:
            self.a = conv(norm, width, width, width if kind == "depthwise" else 1)
            self.last = conv(norm, width, self.channels)

    def forward(self, x):
        inner = self.stem(x)
        if self.kind == "concat":
            out = torch.cat([self.a(inner), self.b(inner)], 1)
        else:
            out = self.a(inner) + inner if self.kind == "residual" else self.a(inner)
        return inner, self.branch(self.last(F.max_pool2d(out, 2)))


# --- parts: called as part(task, x, y, inner, vector, logits, training) they return a loss ---------------------


class Auxiliary(nn.Module):
    """A classifier on inner maps, for training only."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Conv2d(backbone.inner, 5, 1), nn.ReLU(), nn.Conv2d(5, CLASSES, 1))

    def forward(self, task, x, y, inner, vector, logits, training):
        return F.cross_entropy(self.head(inner).mean((2, 3)), y) if training else 0.0


class Projector(nn.Module):
    """Contrastive loss between two views."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(backbone.channels, 6), nn.ReLU(), nn.Linear(6, 4))

    def forward(self, task, x, y, inner, vector, logits, training):
        if not training:
            return 0.0
        other = task.backbone(x.flip(-1))[1].mean((2, 3))
        a, b = (F.normalize(self.net(v), dim=1) for v in (vector, other))
        return F.cross_entropy(a @ b.T / 0.5, torch.arange(len(x), device=x.device))


class Monitor(nn.Module):
    """A head that only validation uses."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.head = nn.Linear(backbone.inner + backbone.channels, 2)

    def forward(self, task, x, y, inner, vector, logits, training):
        return 0.0 if training else self.head(torch.cat([inner.mean((2, 3)), vector], 1)).square().mean()


class Queue(nn.Module):
    """Momentum contrast: a buffer of earlier features, overwritten in the step."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.register_buffer("queue", torch.randn(backbone.channels, 8))
        self.place = 0

    def forward(self, task, x, y, inner, vector, logits, training):
        loss = F.cross_entropy(F.normalize(vector, dim=1) @ self.queue.clone(), y % 8)
        if training:
            count = min(len(x), 8 - self.place)
            self.queue[:, self.place : self.place + count] = F.normalize(vector.detach(), dim=1)[:count].T
            self.place = (self.place + count) % 8
        return loss


class Centers(nn.Module):
    """A center per class in a buffer, moved in the step."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.register_buffer("centers", torch.zeros(CLASSES, backbone.channels))

    def forward(self, task, x, y, inner, vector, logits, training):
        if training:
            with torch.no_grad():
                for label in y.unique():
                    self.centers[label] = 0.9 * self.centers[label] + 0.1 * vector[y == label].mean(0)
        return (vector - self.centers[y]).square().mean()


class Prototypes(nn.Module):
    """Learned prototypes, a bare parameter in the width of the features."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(CLASSES, backbone.channels))

    def forward(self, task, x, y, inner, vector, logits, training):
        return F.cross_entropy(-torch.cdist(vector, self.weight), y)


class Discriminator(nn.Module):
    """Tells features from noise."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(backbone.channels, 4), nn.ReLU(), nn.Linear(4, 1))

    def forward(self, task, x, y, inner, vector, logits, training):
        noise = torch.ones_like(vector) * 0.5
        real, fake = self.net(noise), self.net(vector.detach())
        return (F.softplus(-real) + F.softplus(fake)).mean() + F.softplus(-self.net(vector)).mean() * 0.1


class Decoder(nn.Module):
    """Reconstructs the image from the maps, in training."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(backbone.inner, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1)
        )

    def forward(self, task, x, y, inner, vector, logits, training):
        return F.mse_loss(self.net(inner), x)


class Penalty(nn.Module):
    """Losses on weights and features themselves."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()

    def forward(self, task, x, y, inner, vector, logits, training):
        weights = sum(p.abs().sum() for name, p in task.backbone.named_parameters() if name.endswith("weight"))
        return 1e-4 * weights + 1e-3 * inner.abs().sum() / len(x)


PARTS: dict[str, type[nn.Module]] = {
    "auxiliary": Auxiliary,
    "projector": Projector,
    "monitor": Monitor,
    "queue": Queue,
    "centers": Centers,
    "prototypes": Prototypes,
    "discriminator": Discriminator,
    "decoder": Decoder,
    "penalty": Penalty,
}


# --- averages of weights, by hand --------------------------------------------------------------------------------


class Teacher(nn.Module):
    """An average of a student's weights, as a submodule, out of sight in a list, or as tensors in a dict."""

    def __init__(self, student: nn.Module, held_by: str) -> None:
        super().__init__()
        twin = copy.deepcopy(student).requires_grad_(False).eval()
        self.held_by = held_by
        if held_by == "module":
            self.net = twin
        elif held_by == "list":
            self.hidden = [twin]
        else:
            self.shadow = {name: tensor.clone() for name, tensor in student.state_dict().items()}

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            net = self.net if self.held_by == "module" else self.hidden[0].to(x)
            if isinstance(net, nn.Sequential):  # backbone and classifier
                return net[1](net[0](x)[1].mean((2, 3)))
            return net(x)[1]

    def follow_(self, student: nn.Module, how: str) -> None:
        if self.held_by == "shadow":
            with torch.no_grad():
                for name, tensor in student.state_dict().items():
                    if tensor.is_floating_point():
                        self.shadow[name].mul_(0.9).add_(tensor, alpha=0.1)
            return
        average_(self.net if self.held_by == "module" else self.hidden[0], student, how)


def average_(teacher: nn.Module, student: nn.Module, how: str) -> None:
    """In the ways that people write it."""
    if how == "state_dict":
        new = student.state_dict()
        teacher.load_state_dict(
            {k: v * 0.9 + new[k] * 0.1 if v.is_floating_point() else new[k] for k, v in teacher.state_dict().items()}
        )
        return
    if how == "foreach":
        with torch.no_grad():
            mine, theirs = list(teacher.parameters()), [p.detach() for p in student.parameters()]
            torch._foreach_mul_(mine, 0.9)
            torch._foreach_add_(mine, theirs, alpha=0.1)
        return
    if how == "state_dict_copy":
        with torch.no_grad():
            for mine, theirs in zip(teacher.state_dict().values(), student.state_dict().values(), strict=True):
                mine.copy_(mine * 0.9 + theirs * 0.1)
        return
    with torch.no_grad():
        for p, q in zip(teacher.parameters(), student.parameters(), strict=True):
            if how == "data":
                p.data.mul_(0.9).add_(q.data, alpha=0.1)
            elif how == "lerp":
                p.lerp_(q, 0.1)
            elif how == "copy":
                p.copy_(p * 0.9 + q * 0.1)
            elif how == "assign":
                p.data = p.data * 0.9 + q.data * 0.1
            else:
                p.mul_(0.9).add_(q * 0.1)
        if how == "buffers":
            for p, q in zip(teacher.buffers(), student.buffers(), strict=True):
                p.copy_(q)
