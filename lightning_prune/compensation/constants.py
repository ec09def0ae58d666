"""What removed channels contribute on average, folded into the bias of the layers that read them."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_prune.compensation.repair import Missing, check_reached, measured, repairable, repairing, warn_of_nothing
from lightning_prune.criteria.batches import Loss
from lightning_prune.criteria.observe.watcher import calls_of
from lightning_prune.errors import CompensationError
from lightning_prune.graph import ChannelGraph, call_model
from lightning_prune.graph.readers import input_dim
from lightning_prune.plan import Plan
from lightning_prune.reconstruction.masks import mask_once_


def fold_constants_(
    model: nn.Module,
    graph: ChannelGraph,
    plan: Plan,
    batches: Iterable[Any],
    *,
    loss: Loss = call_model,
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
        loss: runs the model on a batch, see `recalibrate_bn_`.
        missing: what to do about layers with neither bias nor a batch norm right behind, with a forward of their own,
            or that no batch reaches (auxiliary heads): ``refuse``, or ``skip``.

    Returns:
        The module paths of the layers that were repaired; empty, with a warning, if there is none: the model is as it
        was then.

    Raises:
        CompensationError: the model is masked already, no batch, a layer that cannot be repaired, or means that are
            not finite. The model is as it was then, as after any exception from ``loss``.
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
    norms = {layer.name: layer.norm for group in graph.groups for layer in group.layers if layer.norm is not None}
    neither = "neither bias nor batch norm"
    found = repairable(
        model, graph, plan, missing, lambda path, layer: neither if layer.bias is None and path not in norms else None
    )
    with repairing(model) as dense:
        means = {path: _Mean(path, dense, kept, norms.get(path)) for path, kept in found.items()}
        outputs: dict[str, Any] = {}

        def see(path: str, _module: nn.Module, value: Tensor, output: Tensor) -> None:
            if path in means:
                means[path].add(value)
                outputs[path] = output
            for mean in means.values():
                if mean.norm == path:
                    mean.direct = mean.direct and value is outputs.get(mean.path)

        watched = dict.fromkeys([*means, *(mean.norm for mean in means.values() if mean.norm is not None)])
        with calls_of(dense, watched, see):
            for batch in measured(dense, batches):
                loss(dense, batch)
        check_reached(means, [path for path, mean in means.items() if mean.count], missing)
        indirect = [path for path, mean in means.items() if not mean.direct]
        if indirect and missing == "refuse":
            raise CompensationError(
                f"cannot repair {', '.join(indirect)}: no bias, and no batch norm right behind; give it a bias and "
                "trace again, or pass missing='skip'"
            )
        repaired = [mean for mean in means.values() if mean.direct and mean.count]
        if not repaired:
            warn_of_nothing()
            return ()
        for mean in repaired:
            mean.fold_(model)
        mask_once_(model, graph, plan)
    return tuple(mean.path for mean in repaired)


class _Mean:
    """Mean contribution of removed channels to each output of one layer, and where it can be folded into."""

    def __init__(self, path: str, dense: nn.Module, kept: Tensor, norm: str | None) -> None:
        self.path = path
        layer: Any = dense.get_submodule(path)
        self.norm = norm if layer.bias is None else None
        self.direct = True  # whether the batch norm reads just what the layer returns
        self.count = 0
        self._sum: Tensor | float = 0.0
        self._part: Any = copy.deepcopy(layer)  # the removed inputs' share of the layer
        dim = input_dim(layer)
        assert dim is not None
        self._part.weight.data.index_fill_(dim, kept.to(layer.weight.device), 0)
        if layer.bias is not None:
            self._part.bias.data.zero_()

    def add(self, value: Tensor) -> None:
        """One call: what enters the layer."""
        part: Tensor = self._part(value)
        part = part.movedim(-1 if isinstance(self._part, nn.Linear) else 1, -1).flatten(0, -2)
        self._sum = self._sum + part.sum(0, dtype=torch.float64)
        self.count += len(part)

    def fold_(self, model: nn.Module) -> None:
        """Write the mean into the bias, or into the running mean of the batch norm behind."""
        mean = torch.as_tensor(self._sum / self.count)
        if not bool(mean.isfinite().all()):
            raise CompensationError(f"{self.path}: its inputs are NaN or infinite on these batches")
        if self.norm is None:
            layer: Any = model.get_submodule(self.path)
            layer.bias.data += mean.to(layer.bias)
            return
        behind = model.get_submodule(self.norm)
        if isinstance(behind, _BatchNorm) and behind.running_mean is not None:  # else the batch's mean is taken off
            behind.running_mean -= mean.to(behind.running_mean)
