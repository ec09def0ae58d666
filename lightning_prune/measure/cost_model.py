"""What a plan leaves of a model's parameters and multiply-accumulates, from shapes alone: milliseconds per plan."""

from __future__ import annotations

from collections import Counter
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.graph import ChannelGraph, Group
from lightning_prune.measure.counting import OperatorCounter, count_params, samples_in
from lightning_prune.plan import Plan


class CostModel:
    r"""Cost of the reconstructed model of any plan, after one forward pass of the dense one.

    A parameter keeps :math:`\prod_d (n_d - r_d)` entries, where :math:`r_d` are those that its dimension loses: exact.
    A convolution or linear layer costs positions times entries of its weight,
    :math:`k^2 C_{in}/g \, C_{out} H W`, so its multiply-accumulates shrink as the weight does: exact too. Products of
    two activations (attention), and weights that are computed anew at each call (weight norm), keep their dense cost
    here; there it is an upper bound, and `lightning_prune.measure` on the reconstructed model has the last word.

    Args:
        model: the traced model; left as it is.
        graph: its channel graph.
        example_inputs: as for `lightning_prune.trace`.

    Attributes:
        params: of the dense model, frozen ones included.
        macs: of the dense model, per sample.

    Raises:
        PlanError: the graph belongs to another model.
        TraceError: the model does not run on the inputs.

    Example:
        >>> import lightning_prune as lp
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> graph = lp.trace(model, torch.zeros(1, 4))
        >>> plan = lp.LayerRatio(0.5).select(graph, lp.score(model, graph, "l1"))
        >>> cost = CostModel(model, graph, torch.zeros(1, 4))
        >>> (cost.params, cost.macs), cost.of(plan)
        ((58, 48), (30, 24))
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph, example_inputs: Any) -> None:
        graph.check(model)
        self.params = count_params(model, trainable=False)
        counter = _ParameterCounter(model).watch(model, example_inputs)
        batch = samples_in(example_inputs) or 1
        self.macs = counter.macs // batch
        self._macs = {name: macs // batch for name, macs in counter.by_parameter.items()}
        self._shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        self._starts: dict[str, int] = {}  # of the channels of each group, all numbered in one row
        self._channels = 0
        self._owners: dict[tuple[str, int], Tensor] = {}  # {(parameter, dimension): the channel of every entry}
        for group in graph.groups:
            self._starts[group.name] = self._channels
            channels = self._channels + torch.arange(group.size).unsqueeze(1)
            self._channels += group.size
            for part in group.slices:
                if part.tensor in self._shapes:
                    nobody = torch.full((self._shapes[part.tensor][part.dim],), -1)
                    owner = self._owners.setdefault((part.tensor, part.dim), nobody)
                    owner[part.index.flatten()] = channels.expand(part.index.shape).flatten()

    def of_a_channel(self, group: Group) -> tuple[float, float]:
        """Parameters and multiply-accumulates that go with one channel of a group while all others are there."""
        params = macs = 0.0
        for part in group.slices:
            if part.tensor in self._shapes:
                shape = self._shapes[part.tensor]
                share = part.index.shape[1] / shape[part.dim]
                params += share * prod(shape)
                macs += share * self._macs.get(part.tensor, 0)
        return params, macs

    def of(self, plan: Plan) -> tuple[int, int]:
        """Parameters and multiply-accumulates of the reconstructed model."""
        removed = torch.zeros(self._channels + 1, dtype=torch.bool)  # the last one stands for nobody
        for name, group in plan.groups.items():
            removed[self._starts[name] + torch.tensor(group.removed, dtype=torch.int64)] = True
        shapes: dict[str, list[int]] = {}
        for (name, dim), owner in self._owners.items():
            shapes.setdefault(name, list(self._shapes[name]))[dim] -= int(removed[owner].count_nonzero())
        params, macs = self.params, self.macs
        for name, shape in shapes.items():
            before, after = prod(self._shapes[name]), prod(shape)
            params -= before - after
            dense = self._macs.get(name, 0)
            macs -= dense - dense * after // before
        return params, macs


class _ParameterCounter(OperatorCounter):
    """Notes whose multiply-accumulates they are: of the parameter that an operator uses, or uses a view of."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._names = {p.untyped_storage()._cdata: name for name, p in model.named_parameters()}
        self.by_parameter: Counter[str] = Counter()

    def observe(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        before = self.macs
        super().observe(func, args, kwargs, output)
        storages = [t.untyped_storage()._cdata for t in args if isinstance(t, Tensor) and t.dim() > 1]  # no bias
        name = next((self._names[key] for key in storages if key in self._names), None)
        if name is not None:
            self.by_parameter[name] += self.macs - before
