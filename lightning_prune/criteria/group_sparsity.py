"""The penalty that shrinks channels with all that goes with them while training: sparse learning on joint groups."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from lightning_prune.errors import ScoreError
from lightning_prune.graph import ChannelGraph
from lightning_prune.plan import Plan


class GroupSparsity:
    r"""The penalty :math:`R = \frac12 \sum_k \lambda_k \|W_k\|_2^2` over the channels of all groups.

    W_k is all that goes when channel k goes: its filters in every layer of the group, their biases and batch norms,
    and the weights that read it, wherever they are. `add_` adds the gradient, :math:`\lambda_k w` for every w in W_k.
    A weight between two groups counts in both, once in each dimension.

    Fang et al., DepGraph (2023), eq. 3, for the strengths `importance_strengths`; Wang et al., Neural Pruning via
    Growing Regularization (2021), GReg-1, for `condemned_strengths` under a growing factor, there on single layers.
    Biases and betas, which both leave out, count too: a channel whose beta stays is not gone when its weights are.

    It holds a copy of the size of the penalised parameters, so that a step costs one multiplication and addition.

    Args:
        model: the model the graph was traced on.
        graph: its channel graph.
        strengths: {group: lambda (channels,)}; groups that it leaves out are not penalised.

    Raises:
        PlanError: the graph belongs to another model, or has no such group.
        ScoreError: strengths of another length, negative or not finite.

    Example:
        >>> import lightning_prune as lp
        >>> model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[2.0], [3.0]])), model[2].weight.data.fill_(1.0)
        >>> graph = lp.trace(model, torch.zeros(1, 1))
        >>> penalty = GroupSparsity(model, graph, {"0": torch.tensor([1.0, 0.0])})
        >>> model(torch.zeros(1, 1)).sum().backward()
        >>> penalty.add_(0.5)
        >>> penalty.value().item(), model[0].weight.grad.tolist(), model[2].weight.grad.tolist()
        (2.5, [[1.0], [0.0]], [[0.5, 0.0]])
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph, strengths: Mapping[str, Tensor]) -> None:
        graph.check(model)
        parameters = dict(model.named_parameters())
        along: dict[str, dict[int, Tensor]] = {}
        for name, values in strengths.items():
            group = graph.group(name)
            values = _checked(values, name, group.size)
            for part in group.slices if values.any() else ():
                if part.tensor in parameters:
                    size = parameters[part.tensor].shape[part.dim]
                    dims = along.setdefault(part.tensor, {})
                    dims.setdefault(part.dim, values.new_zeros(size))[part.index] = values.unsqueeze(1)
        self._parameters = [parameters[name] for name in along]
        self._strengths = [_spread(parameters[name], dims) for name, dims in along.items()]

    @torch.no_grad()
    def add_(self, factor: float = 1.0, parameters: Collection[Tensor] | None = None) -> None:
        """Add the gradient of ``factor * R`` to the gradients, in place.

        Call it between ``backward()`` and ``optimizer.step()``, once per step. What has no gradient is left alone.

        Args:
            factor: weight of the penalty.
            parameters: only to those among these, for example those of one optimizer; None: to all.
        """
        wanted = None if parameters is None else {id(parameter) for parameter in parameters}
        found = [
            (parameter.grad, parameter, strength)
            for parameter, strength in zip(self._parameters, self._strengths, strict=True)
            if parameter.grad is not None and (wanted is None or id(parameter) in wanted)
        ]
        if found:
            gradients, weights, strengths = map(list, zip(*found, strict=True))
            torch._foreach_addcmul_(gradients, weights, strengths, value=factor)

    @torch.no_grad()
    def value(self) -> Tensor:
        """R as a float64 scalar."""
        terms = [
            (strength.double() * parameter.double().square()).sum().cpu()
            for parameter, strength in zip(self._parameters, self._strengths, strict=True)
        ]
        return 0.5 * sum(terms, torch.zeros((), dtype=torch.float64))


def importance_strengths(scores: Mapping[str, Tensor], alpha: float = 4.0) -> dict[str, Tensor]:
    r"""Strengths from 1 for the best channel of a group to 2^alpha for its worst.

    :math:`\lambda_k = 2^{\alpha (I_{max} - I_k) / (I_{max} - I_{min})}`, with the maximum and minimum of the group:
    Fang et al., DepGraph (2023), eq. 4, with alpha = 4. I_k is the score; the paper's text takes the squared norm of
    W_k, its released code the norm. Where all channels of a group score the same, all have 1.

    Args:
        scores: {group: (channels,)}, from `lightning_prune.score`.
        alpha: 0: the same for all.

    Example:
        >>> importance_strengths({"conv": torch.tensor([1.0, 2.0, 3.0])})["conv"].tolist()
        [16.0, 4.0, 1.0]
    """
    found = {}
    for name, values in scores.items():
        values = values.detach().double()
        spread = values.max() - values.min()
        found[name] = torch.exp2(alpha * (values.max() - values) / (spread if spread > 0 else 1.0))
    return found


def condemned_strengths(plan: Plan) -> dict[str, Tensor]:
    """1 for every channel that the plan would remove, 0 for those that it keeps.

    Example:
        >>> from lightning_prune.plan import GroupPlan
        >>> condemned_strengths(Plan({"conv": GroupPlan(3, (0, 2))}))["conv"].tolist()
        [0.0, 1.0, 0.0]
    """
    found = {}
    for name, group in plan.groups.items():
        found[name] = torch.ones(group.size, dtype=torch.float64)
        found[name][list(group.keep)] = 0.0
    return found


def _checked(values: Tensor, name: str, size: int) -> Tensor:
    values = values.detach().double().cpu()
    if values.shape != (size,):
        raise ScoreError(f"group {name!r} has {size} channels, got strengths of shape {list(values.shape)}")
    if not bool((values.isfinite() & (values >= 0)).all()):
        raise ScoreError(f"group {name!r}: strengths must be finite numbers >= 0")
    return values


def _spread(parameter: Tensor, dims: Mapping[int, Tensor]) -> Tensor:
    """The sum over dimensions of the strength of each entry's channel, like the parameter."""
    whole = torch.zeros_like(parameter, requires_grad=False)
    for dim, values in dims.items():
        whole += values.to(whole).view([-1 if other == dim else 1 for other in range(whole.ndim)])
    return whole
