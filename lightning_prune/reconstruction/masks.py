"""Masks: set the channels that a plan removes to exactly zero, and keep them there while training."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_prune.errors import PlanError
from lightning_prune.graph import ChannelGraph, Slice
from lightning_prune.model_state.cutting import drop_caches_
from lightning_prune.model_state.optimizer_state import change_state_, unwrap
from lightning_prune.model_state.recomputing import recompute_
from lightning_prune.plan import GroupPlan, Plan
from lightning_prune.reconstruction.hold_hooks import Hold, HoldInside
from lightning_prune.reconstruction.holding import Held, HoldZero, Zeros


def mask_(
    model: nn.Module,
    graph: ChannelGraph,
    plan: Plan,
    *,
    optimizers: Iterable[Optimizer] = (),
    undoable: bool = True,
) -> MaskHandle:
    r"""Zero the planned channels in place and hold them at zero: filters, biases, batch-norm :math:`\gamma, \beta`.

    Held means: the entries are set to zero again before every forward of their module if anything has written to it,
    so they are exactly 0.0 in every forward whatever optimizer, weight decay, clipping or averaging does in between;
    their gradients are zero once a backward is over, and before if hooks of others see them. A training step
    dispatches two operators more than without masks, and evaluation none. See Lee et al., "Lossless Reconstruction of
    CNNs for Channel-Based Network Pruning", Sensors 23(4):2102, 2023.

    Args:
        model: the traced model.
        graph: from `lightning_prune.trace`.
        plan: which channels to keep.
        optimizers: their state of masked entries is zeroed too (old momentum would move them).
        undoable: keep the values of masked entries for `MaskHandle.undo`; without them masks take next to no memory.

    Raises:
        PlanError: the plan or the graph does not belong to this model; nothing has been changed then.

    Example:
        >>> from lightning_prune import L1, LayerRatio, score, trace
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
        >>> graph = trace(model, torch.zeros(1, 3, 8, 8))
        >>> plan = LayerRatio(0.5).select(graph, score(model, graph, L1()))
        >>> handle = mask_(model, graph, plan)
        >>> int((model[0].weight.flatten(1).abs().sum(1) == 0).sum())
        4
        >>> handle.undo()
    """
    plan.check(graph)
    graph.check(model)
    plain = unwrap(optimizers)
    if plan:
        graph.warn_of_unreached()
    return MaskHandle(model, masked_entries(graph, plan), plain, undoable)


def mask_once_(model: nn.Module, graph: ChannelGraph, plan: Plan) -> None:
    """Set what a plan masks to zero, without holding it there."""
    _clear_(model, masked_entries(graph, plan))


def masked_entries(graph: ChannelGraph, plan: Plan, *, cut: Collection[str] = ()) -> list[Zeros]:
    """Every parameter entry that a plan sets to zero; of groups that are cut those that need not go with that."""
    gone: dict[tuple[str, str | None], Tensor] = {}
    entries: dict[tuple[str, int], list[tuple[Tensor, Tensor]]] = {}
    for name, group_plan in plan.groups.items():
        for part in graph.group(name).slices:
            if part.masked and (plan.batch_norm or not part.norm):
                own = part.layer and group_plan.kept_by(part.layer) != group_plan.keep
                if name in cut and not own:
                    continue  # what the layer masks is what its group loses
                key = name, part.layer if own else None
                if key not in gone:
                    gone[key] = removed_channels(group_plan, part)
                if len(gone[key]):
                    entries.setdefault((part.tensor, part.dim), []).append((part.index, gone[key]))
    united: dict[tuple[int, ...], Tensor] = {}  # most slices of a group share one index
    found = []
    for (tensor, dim), pairs in entries.items():
        ids = tuple(id(item) for pair in pairs for item in pair)
        if ids not in united:
            united[ids] = torch.cat([index[channels].flatten() for index, channels in pairs]).unique()
        found.append(Zeros(tensor, dim, united[ids]))
    return found


def removed_channels(group_plan: GroupPlan, part: Slice) -> Tensor:
    """Channels of a group that are zero in one slice: its layer's own choice, or the whole group's."""
    kept = group_plan.kept_by(part.layer) if part.layer else group_plan.keep
    gone = torch.ones(group_plan.size, dtype=torch.bool)
    gone[list(kept)] = False
    return gone.nonzero().flatten()


class MaskHandle:
    """Masks in force on a model; a context manager that undoes them.

    Attributes:
        zeros: what is held at zero.
        undoable: whether the values from before are kept.
    """

    def __init__(
        self, model: nn.Module, zeros: list[Zeros], optimizers: list[Optimizer] | None = None, undoable: bool = True
    ) -> None:
        self.model = model
        self.zeros = zeros
        self.undoable = undoable
        self._optimizers = optimizers or []
        self._hooks: list[RemovableHandle] = []
        self._holds: list[HoldZero] = []
        self._held = Held()
        self._before = self._values() if undoable else []
        self.hold()
        self.apply_()
        drop_caches_(model)

    def hold(self) -> None:
        """Keep the entries at zero from now on, or again after `remove`."""
        self.remove()
        held: dict[int, list[Zeros]] = {}
        for parameter, item in _present(self.model, self.zeros):
            held.setdefault(id(parameter), []).append(item)
        self._held = Held.of(self.model)
        for parameter in self.model.parameters():
            if parameter.requires_grad:  # those that nothing masks too: any of them tells that there is a backward
                self._hold(parameter, held.get(id(parameter), []))
        modules = dict(self.model.named_modules())
        inside: dict[str, list[tuple[str, Hold]]] = {}
        for path, module in modules.items():
            own = dict(module.named_parameters(recurse=False))
            owned = {name: held[id(p)] for name, p in own.items() if id(p) in held}
            if owned:
                # First: others compute the weight from these parameters (weight norm, torch's own masks).
                hold = Hold(owned, self._held, {name: own[name].shape for name in owned})
                self._held.join(hold, module)
                self._holds.append(hold)
                self._hooks.append(module.register_forward_pre_hook(hold, prepend=True))
                names = path.split(".") if path else []
                for k in range(len(names)):
                    inside.setdefault(".".join(names[:k]), []).append((".".join(names[k:]), hold))
        for path, holds in inside.items():
            if type(modules[path]).forward is not nn.Module.forward:  # else a container, which is never called
                around = HoldInside(holds, path.count(".") + 1 if path else 0)
                self._hooks.append(modules[path].register_forward_pre_hook(around, prepend=True))

    def apply_(self) -> None:
        """Set every masked entry, its gradient and its optimizer state to zero now."""
        self.clear_(self.model)
        for parameter, item in _present(self.model, self.zeros):
            if parameter.grad is not None:
                item.clear_(parameter.grad)
            change_state_(self._optimizers, parameter, parameter.shape, item.clear_)

    def clear_(self, model: nn.Module) -> None:
        """Zero the same entries of the model, or of a copy such as an average of its weights, once."""
        _clear_(model, self.zeros)

    def remove(self) -> None:
        """Stop holding; the entries stay zero but train again."""
        while self._hooks:
            self._hooks.pop().remove()
        self._held.leave(self._holds)
        self._holds = []

    def undo(self) -> None:
        """Stop holding and put the values from before masking back.

        Raises:
            PlanError: they were not kept.
        """
        if not self.undoable:
            raise PlanError("the values from before masking were not kept: mask_(..., undoable=True)")
        self.remove()
        parameters = dict(self.model.named_parameters())
        for item, before in self._before:
            if item.parameter not in parameters:
                continue
            data = parameters[item.parameter].data
            data.index_copy_(item.dim, item.entries.to(data.device), before.to(data.device))
        torch.clear_autocast_cache()
        drop_caches_(self.model)
        recompute_(self.model)

    def forget(self) -> None:
        """Drop the values from before masking, and their memory."""
        self.undoable, self._before = False, []

    def is_zero(self) -> bool:
        """Whether every masked entry is exactly 0.0."""
        return not any(values.any() for _, values in self._values())

    def __enter__(self) -> MaskHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def _values(self) -> list[tuple[Zeros, Tensor]]:
        tensors = ((parameter.data, item) for parameter, item in _present(self.model, self.zeros))
        return [(item, data.index_select(item.dim, item.entries.to(data.device))) for data, item in tensors]

    def _hold(self, parameter: nn.Parameter, zeros: list[Zeros]) -> None:
        self._hooks.append(parameter.register_hook(self._held.hook(zeros)))


def _clear_(model: nn.Module, zeros: Iterable[Zeros]) -> None:
    for parameter, item in _present(model, zeros):
        item.clear_(parameter.data)
    torch.clear_autocast_cache()  # it would not see that weights changed
    recompute_(model)


def _present(model: nn.Module, zeros: Iterable[Zeros]) -> Iterator[tuple[nn.Parameter, Zeros]]:
    """Every item with its parameter; one that exists in the other mode only is left out."""
    parameters = dict(model.named_parameters())
    return ((parameters[item.parameter], item) for item in zeros if item.parameter in parameters)
