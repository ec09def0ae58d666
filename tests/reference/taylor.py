"""Slow references of the Taylor criteria, APoZ and batch-norm scales: one sample, one channel, one layer at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def loss_of(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(images), labels)


def captured(model: nn.Module, paths: list[str], images: Tensor, labels: Tensor):
    """Per module path its input, its output and the gradient of the mean loss there, of its last call."""
    found: dict[str, dict[str, Tensor]] = {}

    def keep(path):
        def hook(_module, args, out):
            found[path] = {"input": args[0].detach().clone(), "kept": out}
            return out.clone()  # whatever works in place behind works on the copy

        return hook

    handles = [model.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    try:
        loss = loss_of(model, images, labels)
    finally:
        for handle in handles:
            handle.remove()
    gradients = torch.autograd.grad(loss, [found[path]["kept"] for path in paths])
    for path, gradient in zip(paths, gradients, strict=True):
        found[path] |= {"output": found[path].pop("kept").detach(), "gradient": gradient}
    return found


def maps_of(tensor: Tensor, filters: list[int], last: bool) -> Tensor:
    """(filters, positions) of one sample."""
    rows = tensor[0].movedim(-1, 0) if last else tensor[0]
    return torch.stack([rows[f].reshape(-1) for f in filters])


def taylor(model, path, images, labels, index, definition: str, last: bool) -> list[float]:
    """Molchanov 2016 under its three definitions, before the division by the layer's norm."""
    columns: list[list[float]] = []
    for image, label in zip(images, labels, strict=True):
        seen = captured(model, [path], image[None], label[None])[path]
        row = []
        for filters in index.tolist():
            h, g = maps_of(seen["output"], filters, last), maps_of(seen["gradient"], filters, last)
            positions = h.shape[1]
            if definition == "nvlabs":
                row.append(sum(abs(float(a * b)) for a, b in zip(h.flatten(), g.flatten(), strict=True)) / positions)
            else:
                row.append(sum(float(a * b) for a, b in zip(h.flatten(), g.flatten(), strict=True)) / positions)
        columns.append(row)
    count = len(images)
    if definition == "jacobgil":
        return [abs(sum(row[c] for row in columns) / count) for c in range(len(index))]
    return [sum(abs(row[c]) for row in columns) / count for c in range(len(index))]


def gate_loss(model, path, images, labels, filters: list[int], last: bool, gate: float) -> float:
    def change(_module, _args, out):
        factor = torch.ones_like(out)
        factor[(..., filters) if last else (slice(None), filters)] = gate
        return out * factor

    handle = model.get_submodule(path).register_forward_hook(change)
    try:
        with torch.no_grad():
            return loss_of(model, images, labels).item()
    finally:
        handle.remove()


def gates(model, path, images, labels, index, last: bool) -> list[float]:
    """(dL/dgate)^2 by central differences of the batch's mean loss."""
    step = 1e-5
    return [
        (
            (
                gate_loss(model, path, images, labels, filters, last, 1 + step)
                - gate_loss(model, path, images, labels, filters, last, 1 - step)
            )
            / (2 * step)
        )
        ** 2
        for filters in index.tolist()
    ]


def weight_squares(model, name: str, dim: int, images, labels, index) -> list[float]:
    """Sum over a filter's weights of (g w)^2."""
    weight = model.get_parameter(name)
    (gradient,) = torch.autograd.grad(loss_of(model, images, labels), [weight])
    weight = weight.detach()
    return [
        sum(
            float(g * w) ** 2
            for f in filters
            for g, w in zip(gradient.select(dim, f).flatten(), weight.select(dim, f).flatten(), strict=True)
        )
        for filters in index.tolist()
    ]


def inputs_of(module: nn.Module, entries: list[int]) -> list[int]:
    """Input channels of a layer that belong to entries of its weight's input dimension."""
    groups = getattr(module, "groups", 1)
    if groups == 1 or isinstance(module, nn.ConvTranspose2d):
        return entries
    share = module.in_channels // groups
    return [g * share + entry for g in range(groups) for entry in entries]


def next_output(model, reader: str, images, labels, index, magnitude: str) -> list[float]:
    """Sum over outputs of |dz * g|: the reader runs again with the channel zeroed, as the authors do; sample mean."""
    module = model.get_submodule(reader)
    size = {"abs": torch.abs, "square": torch.square, "signed": lambda t: t}[magnitude]
    totals = [0.0] * len(index)
    for image, label in zip(images, labels, strict=True):
        seen = captured(model, [reader], image[None], label[None])[reader]
        for channel, entries in enumerate(index.tolist()):
            without = seen["input"].clone()
            chosen = inputs_of(module, entries)
            if isinstance(module, nn.Linear):
                without[..., chosen] = 0
            else:
                without[:, chosen] = 0
            with torch.no_grad():
                change = seen["output"] - module(without)
            totals[channel] += size(change * seen["gradient"]).sum().item()
    return [total / len(images) for total in totals]


def next_weight(model, name: str, dim: int, images, labels, index, magnitude: str) -> list[float]:
    weight = model.get_parameter(name)
    (gradient,) = torch.autograd.grad(loss_of(model, images, labels), [weight])
    weight = weight.detach()
    size = {"abs": abs, "square": lambda v: v * v, "signed": lambda v: v}[magnitude]
    return [
        sum(
            size(float(g * w))
            for entry in entries
            for g, w in zip(gradient.select(dim, entry).flatten(), weight.select(dim, entry).flatten(), strict=True)
        )
        for entries in index.tolist()
    ]


def zeros(maps: Tensor, filters: list[int], eps: float, last: bool = False) -> float:
    """Share of the entries of some maps, of all samples, that are at most eps."""
    count = total = 0
    for sample in maps:
        rows = sample.movedim(-1, 0) if last else sample
        for f in filters:
            for value in rows[f].flatten().tolist():
                count += value <= eps
                total += 1
    return count / total


def lamp(values: list[float]) -> list[float]:
    return [v * v / sum(w * w for w in values if w >= v) for v in values]
