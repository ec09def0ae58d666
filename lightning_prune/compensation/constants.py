"""What removed channels contribute on average, folded into the bias of the layers that read them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_prune.compensation.common import (
    Forward,
    Missing,
    Reader,
    listed,
    repairable,
    repairing,
    unreached,
    warn_of_nothing,
)
from lightning_prune.criteria.channel_contributions import first_input
from lightning_prune.errors import CompensationError
from lightning_prune.graph import ChannelGraph, call_model
from lightning_prune.plan import Plan
from lightning_prune.reconstruction.masks import mask_once_


def fold_constants_(
    model: nn.Module,
    graph: ChannelGraph,
    plan: Plan,
    batches: Iterable[Any],
    *,
    forward: Forward = call_model,
    missing: Missing = "refuse",
) -> tuple[str, ...]:
    r"""Give every layer that reads removed channels what they contributed to it on average, and mask them, in place.

    .. math:: b_o \leftarrow b_o + \mathbb{E}\Big[\sum_{c \in R} (W_{oc} * a_c)\Big]

    R are the removed channels that layer o reads, a their activations in the dense model; the mean is over samples and
    output positions, so zeros of the padding count as the layer sees them. The expected pre-activation is then that of
    the dense model wherever nothing changed upstream. A channel that is constant is replaced exactly, but for the
    border of a zero-padded layer. The idea is that of Ye et al., Rethinking the Smaller-Norm-Less-Informative
    Assumption (ICLR 2018), who fold constants, and of Nagel et al., Data-Free Quantization (ICCV 2019), who correct
    means.

    A convolution without bias takes it in the batch norm behind it, as :math:`-` the running mean: the same in eval
    mode, with no new parameter; in train mode a batch norm removes any constant, here as in the dense model.

    Args:
        model: dense, not masked. Afterwards the planned channels are zero, but not held there (`mask_`, or
            `reconstruct`, which stays lossless).
        graph: from `lightning_prune.trace`.
        plan: what goes. Under ``union`` only channels that the whole group loses are made up for.
        batches: what to average over; tensors in them are moved to the model's device.
        forward: runs the model on a batch, see `recalibrate_bn_`.
        missing: what to do about layers with neither bias nor a batch norm right behind, with a forward of their own,
            or that no batch reaches (auxiliary heads): ``refuse``, or ``skip``.

    Returns:
        The module paths of the layers that were repaired; empty, with a warning, if there is none: the model is as it
        was then.

    Raises:
        CompensationError: the model is masked already, no batch, a layer that cannot be repaired, or means that are
            not finite. The model is as it was then, as after any exception from ``forward``.
        PlanError: the plan or the graph does not belong to this model.

    Example:
        >>> import lightning_prune as lp
        >>> from lightning_prune.plan import GroupPlan, Plan
        >>> model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0], [0.0]]))
        >>> _ = model[0].bias.data.copy_(torch.tensor([0.0, 5.0]))  # the second channel is always 5
        >>> inputs = torch.rand(4, 1)
        >>> before, graph = model(inputs), lp.trace(model, inputs)
        >>> fold_constants_(model, graph, Plan({"0": GroupPlan(2, (0,))}), [inputs])
        ('2',)
        >>> torch.allclose(model(inputs), before)
        True
    """
    norms = {layer.name: layer.norm for group in graph.groups for layer in group.layers}
    found = repairable(model, graph, plan, missing, lambda module, reader: _unfit(module, norms.get(reader.path)))
    with repairing(model) as dense:
        means = {reader.path: _Mean(reader, dense, norms.get(reader.path)) for reader in found}
        for mean in means.values():
            mean.watch()
        for batch in listed(batches, dense):
            forward(dense, batch)
        never = [path for path, mean in means.items() if not mean.reached]
        if never and missing == "refuse":
            raise unreached(never)
        indirect = [path for path, mean in means.items() if not mean.direct]
        if indirect and missing == "refuse":
            raise CompensationError(
                f"cannot repair {', '.join(indirect)}: no bias, and no batch norm right behind; give it a bias and "
                "trace again, or pass missing='skip'"
            )
        repaired = [mean for mean in means.values() if mean.direct and mean.reached]
        if not repaired:
            warn_of_nothing()
            return ()
        for mean in repaired:
            mean.fold_(model)
        mask_once_(model, graph, plan)
    return tuple(mean.reader.path for mean in repaired)


def _unfit(module: Any, norm: str | None) -> str | None:
    return "neither bias nor batch norm" if module.bias is None and norm is None else None


class _Mean:
    """Mean contribution of removed channels to each output of one reader."""

    def __init__(self, reader: Reader, dense: nn.Module, norm: str | None) -> None:
        self.reader = reader
        self.layer = reader.module(dense)
        self.norm = None if self.layer.bias is not None or norm is None else norm
        self.direct = True  # whether the batch norm reads just what the layer returns
        self._batch_norm = None if self.norm is None else dense.get_submodule(self.norm)
        kept = (~reader.removed).nonzero().flatten().to(self.layer.weight.device)
        self._parameters = {"weight": self.layer.weight.index_fill(reader.dim, kept, 0)}
        if self.layer.bias is not None:
            self._parameters["bias"] = torch.zeros_like(self.layer.bias)
        self._sum: Tensor | None = None
        self._count = 0
        self._output: Tensor | None = None
        self._inside = False

    @property
    def reached(self) -> bool:
        """Whether any batch got there."""
        return self._count > 0

    def watch(self) -> None:
        """Hooks on the dense copy, which nobody else sees."""
        self.layer.register_forward_hook(self._leave, with_kwargs=True)
        if self._batch_norm is not None:
            self._batch_norm.register_forward_pre_hook(self._enter)

    def fold_(self, model: nn.Module) -> None:
        assert self._sum is not None
        mean = self._sum / self._count
        if not bool(mean.isfinite().all()):
            raise CompensationError(f"{self.reader.path}: its inputs are NaN or infinite on these batches")
        if self.norm is None:
            self.reader.module(model).bias.data += mean.to(self.layer.bias)
            return
        behind = model.get_submodule(self.norm)
        if isinstance(behind, _BatchNorm) and behind.running_mean is not None:  # else the batch's mean is taken off
            behind.running_mean -= mean.to(behind.running_mean)

    def _leave(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        if self._inside:
            return
        self._output = output
        self._inside = True  # functional_call runs this hook too
        try:
            part: Tensor = functional_call(layer, self._parameters, args=first_input(args, kwargs))
        finally:
            self._inside = False
        channel = -1 if isinstance(layer, nn.Linear) else 1
        part = part.movedim(channel, -1).flatten(0, -2)
        total = part.sum(0, dtype=torch.float64)
        self._sum = total if self._sum is None else self._sum + total
        self._count += len(part)

    def _enter(self, _norm: nn.Module, args: tuple[Any, ...]) -> None:
        self.direct = self.direct and bool(args) and args[0] is self._output
