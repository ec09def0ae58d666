"""ThiNet's second step: scale what reads the kept channels so that it makes up for the removed ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.criteria.batches import Loss, each_batch
from lightning_prune.criteria.channel_contributions import next_layers
from lightning_prune.criteria.observe.reader_outputs import SampledOutputWatcher
from lightning_prune.criteria.thinet import GramTerm, check_rows
from lightning_prune.errors import PlanError, ScoreError
from lightning_prune.graph import ChannelGraph, call_model
from lightning_prune.graph.readers import Reader
from lightning_prune.model_state.preservation import preserved
from lightning_prune.plan import Plan
from lightning_prune.reconstruction.small_model import cuts


@dataclass(frozen=True)
class Rescaling:
    """What `rescale_` did to one layer for one group.

    Attributes:
        scales: factor of every kept channel, in their order.
        before: error of the layer's sampled outputs without the removed channels, over their own size (both squared).
        after: the same with the factors; never more.
    """

    scales: tuple[float, ...]
    before: float
    after: float


@torch.no_grad()
def rescale_(
    model: nn.Module,
    graph: ChannelGraph,
    plan: Plan,
    batches: Iterable[Any],
    *,
    dense: nn.Module,
    loss: Loss = call_model,
    rows: int | None = 10,
    seed: int = 0,
) -> dict[str, dict[str, Rescaling]]:
    r"""Scale, in place, the weights that read each kept channel by one factor, by least squares; no step of `prune`.

    Luo, Wu and Lin, ThiNet (ICCV 2017), eq. 7: :math:`\hat w = \arg\min_w \sum_r (y_r - \sum_{c \in S} w_c x_{rc})^2`
    and W_next[:, c] *= w_c, where :math:`x_{rc}` is what kept channel c adds to a sampled output of the next layer in
    the dense model and :math:`y_r` what all channels of the group add. Solved from X^T X in float64; where the rows do
    not determine a factor, it stays as near to 1 as can be. Every layer that reads the group has factors of its own.

    Call it before fine-tuning, once. The result is no longer equal to the masked model: this is compensation, not
    reconstruction.
    Deviation: all layers are fitted to the dense model, not one after the other to what the earlier ones left. With
    ``coupling="union"`` only channels that the whole group lost count as removed.

    Args:
        model: masked or reconstructed by ``plan``.
        graph: of the dense model.
        plan: what was removed.
        batches: data; the dense model runs on them once, in eval mode.
        dense: the model before pruning, in the same device and type; left as it is.
        loss: ``loss(dense, batch)`` runs the dense model on a batch, see `recalibrate_bn_`.
        rows: outputs drawn per sample and next layer, see `lightning_prune.criteria.ThiNet`.
        seed: of the draw.

    Returns:
        {group: {layer that reads it: what was done}}; layers that do not run are left alone.

    Raises:
        PlanError: plan, graph and models do not belong together; nothing has been changed then.
        ScoreError: fewer rows than factors, values that are not finite, or a next layer that cannot be computed.

    Example:
        >>> import lightning_prune as lp
        >>> dense = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> images = torch.randn(16, 3, 8, 8)
        >>> result = lp.prune(dense, images, criterion="thinet", ratio=0.5, batches=[images])
        >>> done = rescale_(result.model, result.graph, result.plan, [images], dense=dense)["0"]["2"]
        >>> len(done.scales), done.after < done.before
        (4, True)
    """
    check_rows(rows)
    readers = _pruned_readers(model, graph, plan, dense)
    grams = _grams(dense, readers, GramTerm(rows, seed), batches, loss) if readers else {}
    fits: dict[str, Rescaling] = {}
    for key, (gram, count) in grams.items():
        group, reader = readers[key]
        kept = torch.tensor(plan.groups[group].keep)
        if count < len(kept):
            raise ScoreError(
                f"{reader.path}: {count} rows cannot determine {len(kept)} factors; pass more batches or rows"
            )
        if not torch.isfinite(gram).all():
            raise ScoreError(f"{reader.path}: what its inputs add to its outputs is NaN or infinite; check batches")
        fits[key] = fit(gram, kept)
    small = {(cut.tensor, cut.dim): cut.keep for cut in cuts(graph, plan)}
    found: dict[str, dict[str, Rescaling]] = {}
    for key, done in fits.items():
        group, reader = readers[key]
        found.setdefault(group, {})[reader.path] = done
        size = graph.shapes[reader.weight][reader.dim]
        factors = torch.ones(size, dtype=torch.float64)
        factors[reader.index[list(plan.groups[group].keep)]] = factors.new_tensor(done.scales).unsqueeze(1)
        parameter = model.get_parameter(reader.weight)
        if parameter.shape[reader.dim] != size:
            factors = factors[small[reader.weight, reader.dim]]
        parameter.mul_(factors.view([-1 if dim == reader.dim else 1 for dim in range(parameter.ndim)]).to(parameter))
    return found


def fit(gram: Tensor, kept: Tensor) -> Rescaling:
    """Factors of the kept channels from X^T X, (channels, channels)."""
    gone = torch.ones(len(gram), dtype=torch.bool)
    gone[kept] = False
    inner, missing = gram[kept][:, kept], gram[kept][:, gone].sum(1)
    step = torch.linalg.lstsq(inner, missing.unsqueeze(1), rcond=1e-10, driver="gelsd").solution.flatten()
    total, before = gram.sum(), gram[gone][:, gone].sum()
    after = before - 2 * step @ missing + step @ inner @ step
    size = float(total) or 1.0
    return Rescaling(tuple((1 + step).tolist()), float(before) / size, max(float(after), 0.0) / size)


def _pruned_readers(
    model: nn.Module, graph: ChannelGraph, plan: Plan, dense: nn.Module
) -> dict[str, tuple[str, Reader]]:
    """What reads each group that loses channels, by names of both."""
    plan.check(graph)
    graph.check(dense)
    if model is dense:
        raise PlanError("dense must be the model before pruning, such as a copy.deepcopy of it, not the pruned one")
    shapes = {name: list(shape) for name, shape in graph.shapes.items()}
    small = {name: list(shape) for name, shape in shapes.items()}
    for cut in cuts(graph, plan):
        small[cut.tensor][cut.dim] = len(cut.keep)
    found = {name: list(p.shape) for name, p in (*model.named_parameters(), *model.named_buffers()) if name in shapes}
    if found not in (shapes, small):
        raise PlanError("the model is neither the masked nor the reconstructed one of this plan; its shapes differ")
    return {
        f"{name}/{path}": (name, reader)
        for name, group in plan.groups.items()
        if group.removed
        for path, reader in next_layers(dense, graph.group(name)).items()
    }


def _grams(
    dense: nn.Module, readers: dict[str, tuple[str, Reader]], term: GramTerm, batches: Iterable[Any], loss: Loss
) -> dict[str, tuple[Tensor, int]]:
    """X^T X and number of rows of every reader that ran."""
    watcher = SampledOutputWatcher(dense)
    grams: dict[str, tuple[Tensor, int]] = {}
    for key, (_, reader) in readers.items():
        watcher.look(key, term, reader)
    none = ScoreError("no layer that reads pruned channels ran: batches were empty, or do not reach it")
    with preserved(dense):
        dense.eval()
        for batch in each_batch(dense, batches, none):
            with watcher:
                loss(dense, batch)
                for key, seen in watcher.found():
                    gram, rows = grams.get(key, (torch.zeros(()), 0))
                    grams[key] = gram + seen.partial.cpu(), rows + seen.positions
    if not grams:
        raise none
    return {key: grams[key] for key in readers if key in grams}
