"""Slow references of the criteria: python loops, one sample at a time, explicit masks, finite differences."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Multiply = Callable[[Tensor], Tensor]


@contextmanager
def changed_output(model: nn.Module, path: str, change: Multiply) -> Iterator[None]:
    """The model with a function applied to what a module returns."""
    handle = model.get_submodule(path).register_forward_hook(lambda _m, _a, out: change(out))
    try:
        yield
    finally:
        handle.remove()


def norm(weight: Tensor, dim: int, index: Tensor, p: int) -> list[float]:
    scores = []
    for filters in index.tolist():
        values = [v for f in filters for v in weight.select(dim, f).flatten().tolist()]
        scores.append(sum(abs(v) ** p for v in values) ** (1 / p))
    return scores


def geometric_median(weight: Tensor, dim: int, index: Tensor, distance: str) -> list[float]:
    vectors = [[v for f in row for v in weight.select(dim, f).flatten().tolist()] for row in index.tolist()]

    def apart(a: list[float], b: list[float]) -> float:
        if distance == "l1":
            return sum(abs(x - y) for x, y in zip(a, b, strict=True))
        if distance == "l2":
            return math.dist(a, b)
        return 1 - sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))

    live = [i for i, vector in enumerate(vectors) if any(vector)]
    return [
        sum(apart(vectors[i], vectors[j]) for j in live if j != i) if i in live else -1.0 for i in range(len(vectors))
    ]


def minmax(values: list[float]) -> list[float]:
    low, high = min(values), max(values)
    return [0.0 if high == low else (v - low) / (high - low) for v in values]


def rank(values: list[float]) -> list[float]:
    below = [sum(w < v for w in values) + (sum(w == v for w in values) - 1) / 2 for v in values]
    return [0.0 if len(set(values)) == 1 else b / (len(values) - 1) for b in below]


def channel_loss(
    model: nn.Module, path: str, image: Tensor, label: Tensor, filters: list[int], scale: float, last: bool
) -> float:
    """Loss of one sample when a channel is multiplied by ``scale`` at the output of a module."""

    def change(out: Tensor) -> Tensor:
        factor = torch.ones_like(out)
        factor[(..., filters) if last else (slice(None), filters)] = scale
        return out * factor

    with torch.no_grad(), changed_output(model, path, change):
        return F.cross_entropy(model(image[None]), label[None]).item()


def signed_taylor(
    model: nn.Module, path: str, images: Tensor, labels: Tensor, index: Tensor, last: bool = False
) -> list[list[float]]:
    """Sum of g * h by sample and channel: central difference of the loss by a multiplier of h."""
    step = 1e-5
    return [
        [
            (
                channel_loss(model, path, image, label, filters, 1 + step, last)
                - channel_loss(model, path, image, label, filters, 1 - step, last)
            )
            / (2 * step)
            for filters in index.tolist()
        ]
        for image, label in zip(images, labels, strict=True)
    ]


def element_taylor(
    model: nn.Module, path: str, image: Tensor, label: Tensor, power: int, index: Tensor, last: bool = False
) -> list[float]:
    """Mean over positions of |g * h| ** power by channel, by autograd on a mask of every element."""
    masks: list[Tensor] = []

    def change(out: Tensor) -> Tensor:
        masks.append(torch.ones_like(out, requires_grad=True))
        return out * masks[-1]

    with changed_output(model, path, change):
        loss = F.cross_entropy(model(image[None]), label[None])
    (product,) = torch.autograd.grad(loss, masks)
    maps = product[0].movedim(-1, 0) if last else product[0]
    return [sum((maps[f].abs() ** power).mean().item() for f in filters) for filters in index.tolist()]


def local_energy(
    model: nn.Module, path: str, images: Tensor, index: Tensor, spatial: str, last: bool = False
) -> list[float]:
    """Mean over samples of the squared entries of a channel, summed or averaged over positions."""
    totals = [0.0] * len(index)
    for image in images:
        seen: list[Tensor] = []
        with (
            torch.no_grad(),
            changed_output(model, path, lambda out, seen=seen: seen.append(out.clone()) or out),
        ):
            model(image[None])
        maps = seen[0][0].movedim(-1, 0) if last else seen[0][0]
        for channel, filters in enumerate(index.tolist()):
            for f in filters:
                squares = [v * v for v in maps[f].flatten().tolist()]
                totals[channel] += sum(squares) / (len(squares) if spatial == "mean" else 1)
    return [total / len(images) for total in totals]


def reduce_taylor(products: list[list[float]], magnitude: str, reduce: str) -> list[float]:
    """Per-sample products to channel scores; one batch."""
    size = {"abs": abs, "square": lambda v: v * v, "signed": lambda v: v}[magnitude]
    columns = list(zip(*products, strict=True))
    if reduce == "sample":
        return [sum(size(v) for v in column) / len(column) for column in columns]
    return [size(sum(column) / len(column)) for column in columns]
