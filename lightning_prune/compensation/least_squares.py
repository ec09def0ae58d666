"""Remaining input weights refitted, layer by layer, so that outputs come nearest to the dense model's."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from lightning_prune.compensation.repair import Missing, check_reached, measured, repairable, repairing, warn_of_nothing
from lightning_prune.criteria.batches import Loss
from lightning_prune.criteria.channel_contributions import windows
from lightning_prune.criteria.observe.watcher import calls_of
from lightning_prune.errors import CompensationError
from lightning_prune.graph import ChannelGraph, call_model
from lightning_prune.plan import Plan
from lightning_prune.reconstruction.masks import mask_once_

CHUNK = 2**22  # entries of a matrix of inputs held at once: 32 MiB in float64


def least_squares_(
    model: nn.Module,
    graph: ChannelGraph,
    plan: Plan,
    batches: Iterable[Any],
    *,
    damping: float = 1e-4,
    loss: Loss = call_model,
    missing: Missing = "refuse",
) -> tuple[str, ...]:
    r"""Mask a model and refit the remaining input weights of every layer that reads removed channels, in place.

    .. math:: \min_{W, b} \; \lVert Y - X W - b \rVert_F^2 + \lambda \lVert W - W_0 \rVert_F^2, \quad
        \lambda = \text{damping} \cdot \operatorname{mean} \operatorname{diag} X^\top X

    Y is the dense layer's output, X what enters the same layer in the pruned model whose earlier layers are refitted
    already (He et al., Channel Pruning for Accelerating Very Deep Neural Networks, ICCV 2017: asymmetric, in execution
    order): a row per sample and position, a column per kept input and kernel tap. W_0 are the weights there were;
    holding on to them deviates from the paper: where data say nothing, weights stay. A layer with a bias has it
    refitted too, undamped; without one, follow with `recalibrate_bn_`.

    Grouped convolutions are refitted group by group. Depthwise ones read no other channel and stay as they are, as do
    layers that read no removed channel. Normal equations are summed in float64 by chunks of rows: memory is bounded by
    (inputs x taps)^2 and 32 MiB. Time: the dense and the pruned model run on all batches once per refitted layer.

    Args:
        model: dense, not masked. Afterwards the planned channels are zero, but not held there (`mask_`, or
            `reconstruct`, which stays lossless).
        graph: from `lightning_prune.trace`.
        plan: what goes.
        batches: kept in memory while it runs; more rows than columns are wanted, or damping decides.
        damping: how strongly weights are held, relative to the mean energy of an input.
        loss: runs the model on a batch, see `recalibrate_bn_`.
        missing: what to do about transposed convolutions, layers with a forward of their own, and those that no batch
            reaches (auxiliary heads): ``refuse``, or ``skip``.

    Returns:
        The module paths of the layers that were refitted, in that order; empty, with a warning, if there is none: the
        model is as it was then.

    Raises:
        CompensationError: the model is masked already, no batch, a layer that cannot be refitted, equations without a
            finite solution, or damping that is not positive. The model is as it was then, as after any exception from
            ``loss``.
        PlanError: the plan or the graph does not belong to this model.

    Example:
        >>> import lightning_prune as lp
        >>> from lightning_prune.plan import GroupPlan, Plan
        >>> model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 1))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0, 1.0, 0.0], [2.0, 2.0, 0.0]]))
        >>> inputs = torch.randn(16, 3)
        >>> before, graph = model(inputs), lp.trace(model, inputs)  # the second is twice the first
        >>> least_squares_(model, graph, Plan({"0": GroupPlan(2, (0,))}), [inputs], damping=1e-9)
        ('1',)
        >>> torch.allclose(model(inputs), before, atol=1e-5)
        True
    """
    if isinstance(damping, bool) or not isinstance(damping, int | float) or not 0 < damping < float("inf"):
        raise CompensationError(f"damping must be a positive number, got {damping!r}")
    transposed = "a transposed convolution"
    found = repairable(
        model, graph, plan, missing, lambda _, module: transposed if isinstance(module, _ConvTransposeNd) else None
    )
    with repairing(model) as dense:
        seen = list(measured(model, batches))
        ordered: dict[str, None] = {}
        with calls_of(dense, found, lambda path, *_: ordered.setdefault(path)):
            loss(dense, seen[0])
        check_reached(found, ordered, missing)
        if not ordered:
            warn_of_nothing()
            return ()
        mask_once_(model, graph, plan)
        for path in ordered:
            fit = _Fit(model.get_submodule(path), found[path])
            for batch in seen:
                pairs = zip(_calls(model, path, batch, loss), _calls(dense, path, batch, loss), strict=True)
                for (value, _), (_, target) in pairs:
                    fit.add(value, target)
            fit.solve_(damping, path)
            mask_once_(model, graph, plan)  # its own removed filters
    return tuple(ordered)


class _Fit:
    """Normal equations of one layer, per group of a convolution."""

    def __init__(self, layer: Any, kept: Tensor) -> None:
        self.layer = layer
        self.kept = kept.to(layer.weight.device)
        self.groups: int = getattr(layer, "groups", 1)
        self.spatial = layer.weight.ndim - 2
        columns = len(self.kept) * prod(layer.weight.shape[2:]) + (layer.bias is not None)
        outputs = layer.weight.shape[0] // self.groups
        like = {"dtype": torch.float64, "device": layer.weight.device}
        self.gram = torch.zeros(self.groups, columns, columns, **like)
        self.cross = torch.zeros(self.groups, columns, outputs, **like)

    def add(self, value: Tensor, target: Tensor) -> None:
        """One call: what enters the layer, and what the dense layer returns."""
        if isinstance(self.layer, nn.Linear):
            value, target = value.reshape(-1, value.shape[-1]), target.reshape(-1, target.shape[-1])
            per_sample = 1
        else:
            if value.dim() == self.layer.weight.dim() - 1:  # without a batch dimension
                value, target = value[None], target[None]
            per_sample = prod(target.shape[2:])
        samples = max(1, CHUNK // (per_sample * self.gram.shape[1] * self.groups))
        for part, wanted in zip(value.split(samples), target.split(samples), strict=True):
            rows = self._rows(part)
            goal = wanted.movedim(1, -1).reshape(-1, self.groups, self.cross.shape[2]).transpose(0, 1).double()
            self.gram += rows.mT @ rows
            self.cross += rows.mT @ goal

    def solve_(self, damping: float, path: str) -> None:
        """Write the solution into the layer."""
        if not (bool(self.gram.isfinite().all()) and bool(self.cross.isfinite().all())):
            raise CompensationError(f"{path}: its inputs or outputs are NaN or infinite on these batches")
        now = self._solution()
        biased = self.layer.bias is not None
        weights = self.gram.shape[1] - biased
        diagonal = self.gram.diagonal(dim1=1, dim2=2)
        if not bool(diagonal[:, :weights].any()):
            return  # nothing ever enters: any weights do
        strength = damping * diagonal[:, :weights].mean(1, keepdim=True)
        held = torch.zeros_like(diagonal)
        held[:, :weights] = strength.clamp_min(torch.finfo(torch.float64).tiny)
        residual = self.cross - self.gram @ now
        factor, failed = torch.linalg.cholesky_ex(self.gram + torch.diag_embed(held))
        if bool(failed.any()):
            raise CompensationError(f"{path}: its normal equations are singular; raise damping, or pass more batches")
        solution = now + torch.cholesky_solve(residual, factor)
        found = solution[:, :weights].mT.reshape(-1, len(self.kept), *self.layer.weight.shape[2:])
        self.layer.weight.data[:, self.kept] = found.to(self.layer.weight)
        if biased:
            self.layer.bias.data.copy_(solution[:, -1].flatten())

    def _solution(self) -> Tensor:
        """What the layer computes with now, as (groups, columns, outputs)."""
        weight = self.layer.weight.detach()[:, self.kept].flatten(1).double().unflatten(0, (self.groups, -1)).mT
        if self.layer.bias is None:
            return weight
        return torch.cat([weight, self.layer.bias.detach().double().view(self.groups, 1, -1)], 1)

    def _rows(self, value: Tensor) -> Tensor:
        """(groups, rows, columns): a row per sample and output position, a column per kept input and kernel tap."""
        value = value.double()
        if isinstance(self.layer, nn.Linear):
            rows = value[None, :, self.kept]
        else:
            seen = windows(self.layer, value.unflatten(1, (self.groups, -1))[:, :, self.kept].flatten(0, 1))
            # (N x groups, C, *positions, *taps) to (groups, N x positions, C x taps)
            moved = seen.unflatten(0, (-1, self.groups)).movedim((1, 2), (0, -self.spatial - 1))
            rows = moved.flatten(-self.spatial - 1).flatten(1, -2)
        if self.layer.bias is None:
            return rows
        return torch.cat([rows, torch.ones_like(rows[..., :1])], -1)


def _calls(model: nn.Module, path: str, batch: Any, loss: Loss) -> list[tuple[Tensor, Tensor]]:
    """What enters a layer and what comes out, call by call; copies, for both may be overwritten in place."""
    found: list[tuple[Tensor, Tensor]] = []
    with calls_of(model, [path], lambda _path, _module, *call: found.append((call[0].clone(), call[1].clone()))):
        loss(model, batch)
    return found
