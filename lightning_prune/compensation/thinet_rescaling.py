"""ThiNet's second step: scale what reads the kept channels so that it makes up for the removed ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.criteria.observe.readers import readers_of
from lightning_prune.criteria.observe.sampling import SampledReaderWatcher
from lightning_prune.criteria.observe.watching import Ledger, Place
from lightning_prune.criteria.thinet import GramTerm, check_rows
from lightning_prune.errors import PlanError, ScoreError
from lightning_prune.graph import ChannelGraph, call_model, on_device
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
    run: Callable[[nn.Module, Any], Any] | None = None,
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
        run: ``run(dense, batch)``; by default the model is called on the batch.
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
    places = _places(model, graph, plan, dense)
    watcher, term = SampledReaderWatcher(Ledger(), dense), GramTerm(rows, seed)
    for (group, path), place in places.items():
        watcher.listen(f"{group}/{path}", term, path, place)
    grams = _grams(dense, watcher, batches, run or call_model)
    if places and not grams:
        raise ScoreError("no layer that reads pruned channels ran: batches were empty, or do not reach it")
    found: dict[str, dict[str, Rescaling]] = {}
    for group, path in places:
        if f"{group}/{path}" in grams:
            gram, count = grams[f"{group}/{path}"]
            kept = torch.tensor(plan.groups[group].keep)
            if count < len(kept):
                raise ScoreError(
                    f"{path}: {count} rows cannot determine {len(kept)} factors; pass more batches or rows"
                )
            if not torch.isfinite(gram).all():
                raise ScoreError(f"{path}: what its inputs add to its outputs is NaN or infinite; check batches")
            found.setdefault(group, {})[path] = fit(gram, kept)
    cut = {(cut.tensor, cut.dim): cut.keep for cut in cuts(graph, plan)}
    for group, of in found.items():
        for path, done in of.items():
            place = places[group, path]
            entries = place.index[list(plan.groups[group].keep)]
            factors = torch.ones(graph.shapes[place.tensor][place.dim], dtype=torch.float64)
            factors[entries] = torch.tensor(done.scales, dtype=torch.float64).unsqueeze(1)
            _scale_(model.get_parameter(place.tensor), place.dim, factors, cut.get((place.tensor, place.dim)))
    return found


def fit(gram: Tensor, kept: Tensor) -> Rescaling:
    """Factors of the kept channels from X^T X, (channels, channels).

    Example:
        >>> rows = torch.tensor([[1.0, 1.0], [2.0, 2.0]]).double()  # the second channel repeats the first
        >>> [round(scale, 6) for scale in fit(rows.T @ rows, torch.tensor([0])).scales]
        [2.0]
    """
    gone = torch.ones(len(gram), dtype=torch.bool)
    gone[kept] = False
    inner, missing = gram[kept][:, kept], gram[kept][:, gone].sum(1)
    step = torch.linalg.lstsq(inner, missing.unsqueeze(1), rcond=1e-10, driver="gelsd").solution.flatten()
    total, before = gram.sum(), gram[gone][:, gone].sum()
    after = before - 2 * step @ missing + step @ inner @ step
    size = float(total) or 1.0
    return Rescaling(tuple((1 + step).tolist()), float(before) / size, max(float(after), 0.0) / size)


def _places(model: nn.Module, graph: ChannelGraph, plan: Plan, dense: nn.Module) -> dict[tuple[str, str], Place]:
    """What reads each group that loses channels."""
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
    groups = [name for name, group in plan.groups.items() if group.removed]
    return {(name, path): place for name in groups for path, place in readers_of(dense, graph.group(name)).items()}


def _grams(
    dense: nn.Module, watcher: SampledReaderWatcher, batches: Iterable[Any], run: Callable[[nn.Module, Any], Any]
) -> dict[str, tuple[Tensor, int]]:
    """X^T X and number of rows of everything that is watched."""
    grams: dict[str, tuple[Tensor, int]] = {}
    with preserved(dense):
        dense.eval()
        for batch in batches:
            for key, total, count in _watched(watcher, dense, on_device(batch, dense), run):
                gram, rows = grams.get(key, (torch.zeros_like(total), 0))
                grams[key] = (gram + total, rows + count)
    return grams


def _watched(
    watcher: SampledReaderWatcher, dense: nn.Module, batch: Any, run: Callable[[nn.Module, Any], Any]
) -> Iterator[tuple[str, Tensor, int]]:
    watcher.start()
    try:
        run(dense, batch)
        for key, seen in watcher.totals():
            yield key, seen.partial.cpu(), seen.positions
    finally:
        watcher.stop()


def _scale_(parameter: Tensor, dim: int, factors: Tensor, keep: Tensor | None) -> None:
    """Multiply along a dimension by factors of the dense model's entries; ``keep``: those that are left of them."""
    if keep is not None and parameter.shape[dim] != len(factors):
        factors = factors[keep]
    shape = [-1 if other == dim else 1 for other in range(parameter.ndim)]
    parameter.mul_(factors.view(shape).to(parameter))
