"""Slow reference of the reduced DCP: heads of scikit-learn, one norm per channel."""

from __future__ import annotations

import math

import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor, nn
from torch.nn import functional as F


def outputs(model: nn.Module, paths: list[str], images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """What the model returns, and what these modules returned, before anything works in place on it."""
    found: dict[str, Tensor] = {}

    def keep(path):
        def hook(_module, _args, out):
            found[path] = out
            return out.clone()

        return hook

    handles = [model.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    result = model(images)
    for handle in handles:
        handle.remove()
    return result, found


def pooled(z: Tensor) -> Tensor:
    """(N, channels)."""
    rows = [torch.stack([torch.relu(each).mean() for each in sample]) for sample in z]
    return torch.stack(rows)


def joint_loss(model: nn.Module, paths: list[str], images: Tensor, labels: Tensor, weight: float) -> Tensor:
    result, seen = outputs(model, paths, images)
    loss = F.cross_entropy(result, labels)
    for path in paths:
        features = pooled(seen[path])
        features = features - features.detach().mean(0)  # scikit-learn loses digits far from the origin
        head = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.1)
        head.fit(features.detach().numpy(), labels.numpy())
        logits = features @ torch.tensor(head.coef_).T + torch.tensor(head.intercept_)
        loss = loss + weight * F.cross_entropy(logits, labels)
    return loss


def norms(gradients: list[tuple[Tensor, int, Tensor]]) -> list[float]:
    """Per channel the root of the sum of squares over all entries of all (gradient, dim, index)."""
    channels = len(gradients[0][2])
    totals = [0.0] * channels
    for gradient, dim, index in gradients:
        for channel, entries in enumerate(index.tolist()):
            for entry in entries:
                totals[channel] += sum(g * g for g in gradient.select(dim, entry).flatten().tolist())
    return [math.sqrt(total) for total in totals]
