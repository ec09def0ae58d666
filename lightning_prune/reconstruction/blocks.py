"""Residual blocks: where masking the end of a branch leaves a module that computes its shortcut alone."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.graph import ChannelGraph
from lightning_prune.graph.entry_points import double_by_default
from lightning_prune.graph.running import call_model, map_tensors, untouched
from lightning_prune.model_state.copying import copied_to
from lightning_prune.model_state.preservation import without_masks
from lightning_prune.plan import GroupPlan, Plan
from lightning_prune.reconstruction.dropped_blocks import FUNCTIONS, DroppedBlock, not_in_place
from lightning_prune.reconstruction.lossless import TOLERANCE, distance
from lightning_prune.reconstruction.masks import MaskHandle, masked_entries

ACTIVATIONS = (
    *FUNCTIONS.values(),
    *(nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.Mish, nn.Hardtanh, nn.Softplus, nn.Tanh, nn.Sigmoid),
)


@dataclass(frozen=True)
class Block:
    """A module that adds a branch to its input, or to a shortcut of it.

    Attributes:
        name: module path.
        layers: whose channels are masked for the branch to be zero, the last ones before the addition.
        remains: what the block computes then, in this order: names of its children (shortcut, activation), or of an
            activation that is a function; nothing: it hands on what it is given.
        reason: why it cannot be dropped, None if it can.
    """

    name: str
    layers: tuple[str, ...] = ()
    remains: tuple[str, ...] = ()
    reason: str | None = None

    @property
    def removable(self) -> bool:
        """Whether it can be dropped."""
        return self.reason is None


def residual_blocks(model: nn.Module, graph: ChannelGraph, example_inputs: Any) -> tuple[Block, ...]:
    r"""Find the modules that compute :math:`\sigma(s(x) + b(x))` and, with the branch masked, :math:`\sigma(s(x))`.

    The branch :math:`b` is zero for every input once all filters of its last layer, their biases and their batch norm's
    :math:`\gamma` and :math:`\beta` are zero. Whether the whole module computes its shortcut :math:`s` (its input, or
    one of its children) and an activation then is found out by running it alone, in float64, in both modes, on random
    numbers of two magnitudes: no code is read, and what differs is no block. Where one module holds another, the inner
    one counts.

    Args:
        model: the traced model, left as it is.
        graph: from `lightning_prune.trace`; the groups may be such as cannot be pruned.
        example_inputs: as for `lightning_prune.trace`.

    Returns:
        The blocks in the order of the modules; what cannot be dropped carries the reason.

    Raises:
        PlanError: the graph belongs to another model.

    Example:
        >>> import lightning_prune as lp
        >>> model, images = lp.models.cifar_thin.resnet20().eval(), torch.zeros(1, 3, 16, 16)
        >>> blocks = residual_blocks(model, lp.trace(model, images), images)
        >>> [(block.name, block.layers, block.remains) for block in blocks][:1]
        [('layer1.0', ('layer1.0.conv2',), ('relu',))]
    """
    graph.check(model)
    with without_masks(model):
        probe = copied_to(model, torch.float64)
    tied = _tied_layers(graph)
    layers = {layer.name for group in graph.groups for layer in group.layers}
    names = [name for name, _ in probe.named_modules() if name and name not in layers]
    candidates = {name: inside for name in names if (inside := _inside(name, tied))}
    registered = Counter(id(module) for _, module in probe.named_modules(remove_duplicate=False))
    found: dict[str, Block] = {}
    with untouched(probe), double_by_default():
        watch = _Watch(probe, candidates, example_inputs)
        for name in sorted(candidates, key=lambda name: -name.count(".")):
            if any(other.startswith(f"{name}.") for other, block in found.items() if block.removable):
                continue
            given = watch.given.get(name)
            reason = _unfit(model.get_submodule(name), given, registered[id(probe.get_submodule(name))])
            if reason is None and given is not None:
                found[name] = _search(probe, graph, name, candidates[name], watch.sharing[name], given[0][0])
            else:
                found[name] = Block(name, reason=reason)
    removable = [name for name, block in found.items() if block.removable]
    outermost = [
        name
        for name in found
        if name in removable
        or not any(
            name.startswith(f"{other}.") or (other in removable and other.startswith(f"{name}.")) for other in found
        )
    ]
    return tuple(found[name] for name in names if name in outermost)


def block_plan(graph: ChannelGraph, blocks: Iterable[Block], plan: Plan | None = None) -> Plan:
    """The plan that masks the branches of blocks: their last layers keep no channel, all others keep what they had.

    `lightning_prune.mask_` carries it out and holds it while training; `drop_blocks_` drops the blocks afterwards.

    Args:
        graph: from `lightning_prune.trace`.
        blocks: from `residual_blocks`.
        plan: of channels that go, too; None: none.

    Example:
        >>> import lightning_prune as lp
        >>> model, images = lp.models.cifar_thin.resnet20(), torch.zeros(1, 3, 16, 16)
        >>> graph = lp.trace(model, images)
        >>> masks = block_plan(graph, [Block("layer1.1", ("layer1.1.conv2",))])
        >>> with lp.mask_(model, graph, masks):
        ...     bool(model.layer1[1].conv2.weight.any()), bool(model.layer1[1].bn2.bias.any())
        (False, False)
    """
    gone = {layer for block in blocks for layer in block.layers}
    groups = {} if plan is None else dict(plan.groups)
    for group in graph.groups:
        if any(layer.name in gone for layer in group.layers):
            before = groups.get(group.name, GroupPlan.whole(group.size))
            kept = {layer.name: before.kept_by(layer.name) for layer in group.layers}
            groups[group.name] = GroupPlan(
                group.size, before.keep, {name: () if name in gone else keep for name, keep in kept.items()}
            )
    return Plan(groups, "union", plan is None or plan.batch_norm)


def _tied_layers(graph: ChannelGraph) -> dict[str, set[str]]:
    """{layer: the other layers of its groups}, of those that have some."""
    found: dict[str, set[str]] = {}
    for group in graph.groups:
        for layer in group.layers:
            found.setdefault(layer.name, set()).update(other.name for other in group.layers if other is not layer)
    return {name: others for name, others in found.items() if others}


def _inside(name: str, tied: dict[str, set[str]]) -> tuple[str, ...]:
    """Layers in a module that share channels with layers outside of it, or in another of its children."""

    def child(layer: str) -> str | None:
        return layer[len(name) + 1 :].partition(".")[0] if layer.startswith(f"{name}.") else None

    return tuple(
        layer
        for layer, others in tied.items()
        if (own := child(layer)) is not None and any(child(other) != own for other in others)
    )


class _Watch:
    """One run of a model: what candidates are given, and which of their children are given the same."""

    def __init__(self, probe: nn.Module, names: Iterable[str], example_inputs: Any) -> None:
        self.given: dict[str, list[tuple[Any, ...]]] = {}  # the arguments of every call; of tensors that like them
        self.sharing: dict[str, set[str]] = {name: set() for name in names}
        self._open: dict[str, Any] = {}
        inputs = map_tensors(lambda t: t.detach().double() if t.is_floating_point() else t, example_inputs)
        with ExitStack() as hooks:
            for name in self.sharing:
                module = probe.get_submodule(name)
                for hook in (
                    module.register_forward_pre_hook(partial(self._enter, name), with_kwargs=True),
                    module.register_forward_hook(partial(self._leave, name)),
                    *(c.register_forward_pre_hook(partial(self._child, name, k)) for k, c in module.named_children()),
                ):
                    hooks.callback(hook.remove)
            call_model(probe.eval(), inputs)

    def _enter(self, name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        likes = tuple(arg.new_empty(()).expand(arg.shape) if isinstance(arg, Tensor) else arg for arg in args)
        self.given.setdefault(name, []).append((*likes, *kwargs.items()))
        self._open[name] = args[0] if args else None

    def _leave(self, name: str, *_: Any) -> None:
        self._open.pop(name, None)

    def _child(self, name: str, child: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        if args and args[0] is self._open.get(name):
            self.sharing[name].add(child)


def _unfit(original: nn.Module, given: list[tuple[Any, ...]] | None, places: int) -> str | None:
    """Why a module is not even tried."""
    if isinstance(original, DroppedBlock):
        return "was dropped already"
    if given is None:
        return "does not run on the example inputs"
    if not all(len(args) == 1 and isinstance(args[0], Tensor) and args[0].is_floating_point() for args in given):
        return "is called with other things than one tensor"
    if places > 1:
        return "is registered under several names"
    others = [hook for hook in original._forward_pre_hooks.values() if not getattr(hook, "holds_masks", False)]
    return "has forward hooks, which would no longer run" if others or original._forward_hooks else None


def _search(
    probe: nn.Module, graph: ChannelGraph, name: str, inside: tuple[str, ...], sharing: Iterable[str], like: Tensor
) -> Block:
    """What a module computes once a layer in it is masked, or all are; its input before a part, a small part first."""
    module = probe.get_submodule(name)
    children = dict(module.named_children())
    own = [child for child, kind in children.items() if isinstance(kind, ACTIVATIONS)]
    sizes = {child: sum(p.numel() for p in children[child].parameters()) for child in children if child in sharing}
    for shortcut in (None, *sorted(sizes, key=lambda child: sizes[child])):
        layers = [layer for layer in inside if shortcut is None or not f"{layer}.".startswith(f"{name}.{shortcut}.")]
        if shortcut in own:
            continue
        tries = [(layer,) for layer in reversed(layers)]
        for masked in [*tries, tuple(layers)] if len(layers) > 1 else tries:
            with MaskHandle(probe, masked_entries(graph, block_plan(graph, [Block(name, masked)]))):
                runs = _runs(module, None if shortcut is None else children[shortcut], like)
            for activation in (None, *own, *FUNCTIONS):
                act = None if activation is None else not_in_place(children.get(activation) or FUNCTIONS[activation]())
                if runs and all(_equal(out, base if act is None else act(base)) for base, out in runs):
                    return Block(name, masked, tuple(part for part in (shortcut, activation) if part is not None))
    return Block(name, reason="computes more than a shortcut and an activation once its last layers are masked")


def _runs(module: nn.Module, shortcut: nn.Module | None, like: Tensor) -> list[tuple[Tensor, Any]]:
    """(what the shortcut makes, what the module makes) of random numbers, in eval and train mode; none if it fails."""
    generator = torch.Generator().manual_seed(0)
    found: list[tuple[Tensor, Any]] = []
    for training, scale in itertools.product((False, True), (1.0, 30.0)):
        x = scale * torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.device)
        module.train(training)
        try:
            found.append((x if shortcut is None else shortcut(x.clone()), module(x.clone())))
        except Exception:  # noqa: BLE001 - whatever a user's module may raise
            if not training:  # batch norm of one value refuses to train
                return []
    module.eval()
    return found


def _equal(out: Any, expected: Any) -> bool:
    if not isinstance(out, Tensor) or not isinstance(expected, Tensor) or out.shape != expected.shape:
        return False
    with suppress(RuntimeError):
        return distance([expected], [out])[1] <= TOLERANCE[torch.float64]
    return False
