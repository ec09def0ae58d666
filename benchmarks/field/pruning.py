"""Networks made smaller, by this library and by Torch-Pruning, to the same MACs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_prune as lp
from benchmarks.cifar_training import Batch
from benchmarks.field.methods import Method, Repair
from lightning_prune.compensation import least_squares_, recalibrate_bn_
from lightning_prune.criteria import Criterion, Scores, criterion_from
from lightning_prune.measure import CostModel, count_flops
from lightning_prune.model_state.copying import copied
from lightning_prune.plan import GroupPlan

CLOSE = 0.004  # of the dense MACs: how far under the target every layer alike may end
PEER_CLOSE = 0.005  # of the dense MACs: how far above it the peer may, whose layers all lose a channel in one step
SENSITIVITY_BATCHES = 4  # on which every masked network is evaluated
PEER_STEPS, PEER_BATCHES = 400, 10  # as the peer's own benchmark has them


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of a batch of images and labels."""
    return F.cross_entropy(model(batch[0]), batch[1])


def prune(model: nn.Module, method: Method, macs: float, batches: list[Batch]) -> nn.Module:
    """A network of at most so many MACs, `PEER_CLOSE` more where the peer prunes alike; the model is left as it is."""
    if method.library == "Torch-Pruning":
        return by_peer(model, method, macs, batches)
    whole = count_flops(model, batches[0][0][:1])
    if macs >= whole:
        return model
    for step in range(1, method.steps + 1):  # each takes the same share of what is left
        model = _pruned(model, method, whole * (macs / whole) ** (step / method.steps), batches)
    return model


def _pruned(model: nn.Module, method: Method, macs: float, batches: list[Batch]) -> nn.Module:
    inputs = batches[0][0][:1]
    whole = count_flops(model, inputs)
    share = macs / whole
    graph = lp.trace(model, inputs)
    scores = lp.score(model, graph, criterion_of(method), batches=batches, loss=loss_of)
    if method.per_mac:
        costs = macs_of_a_channel(model, graph, inputs)
        scores = Scores({name: of / costs[name] for name, of in scores.items()}, scores.layers)
    if method.tolerant:
        selection = _same_tolerance(model, graph, scores, batches, share)
    elif method.uniform:
        selection = _every_layer_alike(model, graph, scores, inputs, share)
    else:
        selection = lp.Budget(flops=share)
    small = lp.prune(
        model, inputs, selection=selection, scores=scores, batches=batches, loss=loss_of,
        compensate=_compensation(method.repair, batches),
    ).model  # fmt: skip
    return repaired(small, method.repair, batches)


def _every_layer_alike(
    model: nn.Module, graph: lp.ChannelGraph, scores: Scores, inputs: Tensor, share: float
) -> lp.LayerRatio:
    """The same ratio for all, as small as the MACs allow."""
    whole = count_flops(model, inputs)

    def cost(ratio: float) -> float:
        plan = lp.LayerRatio(ratio).select(graph, scores)
        return count_flops(lp.reconstruct(model, graph, plan), inputs) / whole

    return lp.LayerRatio(_smallest(cost, share))


def _same_tolerance(
    model: nn.Module, graph: lp.ChannelGraph, scores: Scores, batches: list[Batch], share: float
) -> lp.LayerRatio:
    """Ratios by which every group alone costs about the same loss."""

    def loss(masked: nn.Module) -> float:
        return float(sum(loss_of(masked, batch) for batch in batches[:SENSITIVITY_BATCHES]))

    found = lp.sensitivity.measure_sensitivity(
        model, graph, scores, loss, ratios=[step / 8 for step in range(1, 8)], mode="min", metric="loss"
    )
    return lp.sensitivity.within_budget(found, model, graph, scores, batches[0][0][:1], flops=share).selection


def criterion_of(method: Method) -> Criterion:
    """Of this library."""
    found = criterion_from(method.criterion)
    return replace(found, normalize="mean") if method.relative else found  # type: ignore[call-arg]


def macs_of_a_channel(model: nn.Module, graph: lp.ChannelGraph, inputs: Tensor) -> dict[str, int]:
    """What the dense network saves by one channel of each group that can lose any."""
    cost, found = CostModel(model, graph, inputs), {}
    for group in graph.groups:
        if group.prunable:
            kept = tuple(range(1, group.size))
            plan = lp.Plan({group.name: GroupPlan(group.size, kept, dict.fromkeys(group.layers, kept))})
            found[group.name] = cost.macs - cost.of(plan)[1]
    return found


def repaired(small: nn.Module, repair: Repair, batches: list[Batch]) -> nn.Module:
    """Batch norms measured anew, which follows least squares too."""
    if repair != "none":
        recalibrate_bn_(small, batches, loss=loss_of)
    return small


def _compensation(repair: Repair, batches: list[Batch]) -> Callable[..., Any] | None:
    if repair != "least squares":
        return None
    images = [images for images, _ in batches[:4]]  # every position of an image is a row
    return lambda *of: least_squares_(*of, images)


def _smallest(cost: Callable[[float], float], share: float) -> float:
    """The smallest ratio whose cost is no more than the share."""
    low, high = 0.0, 1.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        found = cost(middle)
        low, high = (low, middle) if found <= share else (middle, high)
        if share - CLOSE < found <= share:
            break
    return high


def by_peer(model: nn.Module, method: Method, macs: float, batches: list[Batch]) -> nn.Module:
    """Torch-Pruning's steps until the MACs are reached, as its own benchmark takes them."""
    small, inputs = copied(model), batches[0][0][:1]
    reached = macs + PEER_CLOSE * count_flops(small, inputs) * method.uniform
    pruner = peer_pruner(small, method, inputs)
    for _ in range(PEER_STEPS):
        if count_flops(small, inputs) <= reached:
            break
        if method.criterion == "taylor":
            small.zero_grad()
            for batch in batches[:PEER_BATCHES]:
                loss_of(small.eval(), batch).backward()
        pruner.step()
    small.zero_grad()
    return small


def peer_pruner(model: nn.Module, method: Method, inputs: Tensor) -> Any:
    """A pruner of Torch-Pruning, with the settings of its own benchmark on CIFAR-10."""
    import torch_pruning as tp

    criterion = method.criterion
    magnitude = tp.importance.GroupMagnitudeImportance
    importance = {
        "l1": lambda: tp.importance.MagnitudeImportance(p=1),
        "l2": lambda: tp.importance.MagnitudeImportance(p=2),
        "group_norm": lambda: magnitude(p=2),
        "group_sl": lambda: magnitude(p=2, normalizer="max"),
        "bn_scale": lambda: tp.importance.BNScaleImportance(),
        "taylor": lambda: tp.importance.GroupTaylorImportance(),
    }[criterion]()
    kinds: dict[str, Any] = dict.fromkeys(("group_norm", "group_sl"), tp.pruner.GroupNormPruner)
    kinds["bn_scale"] = tp.pruner.BNScalePruner
    strength = {"group_sl": {"reg": 5e-4}, "bn_scale": {"reg": 1e-5}}.get(criterion, {})
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
    return kinds.get(criterion, tp.pruner.MagnitudePruner)(
        model, inputs, importance=importance, global_pruning=not method.uniform, pruning_ratio=1.0,
        iterative_steps=PEER_STEPS, ignored_layers=last, in_channel_groups={}, out_channel_groups={}, num_heads={},
        channel_groups={}, **strength,
    )  # fmt: skip


@torch.no_grad()
def projected(network: nn.Module, batches: list[Batch]) -> nn.Module:
    """The same function with a convolution and batch norm in every shortcut that pads channels with zeros.

    Torch-Pruning, and the networks of its published table, have such shortcuts; so both libraries prune the same.
    """
    layers = sum(isinstance(module, nn.Conv2d) for module in network.modules()) + 1
    other = lp.models.ThinCifarResNet(layers, shortcut="B", num_classes=network.linear.out_features)
    known = {name: of for name, of in network.state_dict().items() if ".shortcut." not in name}
    other.load_state_dict({**other.state_dict(), **known})
    seen: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}

    def note(norm: nn.Module, args: tuple[Tensor]) -> None:
        seen[norm].append(torch.var_mean(args[0], (0, 2, 3)))

    for name, padded in network.named_modules():
        if isinstance(padded, lp.models.cifar_thin.PaddedShortcut):
            convolution, norm = other.get_submodule(name)
            convolution.weight.zero_()
            rows = torch.arange(convolution.in_channels)
            convolution.weight[rows + padded.before.shape[1], rows] = 1.0
            norm.weight.copy_((norm.running_var + norm.eps).sqrt())  # the identity
            seen[norm] = []
            norm.register_forward_pre_hook(note)
    other.eval()
    for images, _ in batches:
        other(images)
    for norm, found in seen.items():  # the identity again, now with the statistics that training will find
        norm._forward_pre_hooks.clear()
        variance, mean = (torch.stack(of).mean(0) for of in zip(*found, strict=True))
        norm.running_var.copy_(variance)
        norm.running_mean.copy_(mean)
        norm.weight.copy_((variance + norm.eps).sqrt())
        norm.bias.copy_(mean)
    return other
