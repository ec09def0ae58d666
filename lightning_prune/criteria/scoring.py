"""Scores of all channels of a model under a criterion, with the model left as it was found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.criteria.base import Criterion
from lightning_prune.criteria.batches import Loss, each_batch
from lightning_prune.criteria.scorer import BatchNormMode, Scorer
from lightning_prune.criteria.scores import Scores
from lightning_prune.errors import ScoreError, first_line
from lightning_prune.graph import ChannelGraph, call_model
from lightning_prune.graph.model_checks import check_trainable, without_values


def score(
    model: nn.Module,
    graph: ChannelGraph,
    criterion: Criterion | str,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    *,
    baseline: Mapping[str, Tensor] | None = None,
    bn_mode: BatchNormMode = "eval",
) -> Scores:
    """Importance of every channel of every prunable group; the model is left as it is.

    Args:
        model: the model the graph was traced on.
        graph: its channel graph.
        criterion: a criterion, or its name.
        batches: data, for criteria that look at it; tensors in them are moved to the model's device.
        loss: ``loss(model, batch)``, a scalar that averages over samples. Criteria that need only a forward
            pass use it to run the model, if given; without it the model is called on the batch itself (tuple:
            positional arguments, dict: keyword arguments).
        baseline: see `Scorer`.
        bn_mode: see `Scorer`.

    Raises:
        ScoreError: missing batches, loss or baseline; a loss that cannot be differentiated; scores that are
            not finite.
        PlanError: the graph belongs to another model.

    Example:
        >>> import lightning_prune as lp
        >>> model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0], [-3.0]]))
        >>> lp.score(model, lp.trace(model, torch.randn(2, 1)), "l1")["0"].tolist()
        [0.5, 1.5]
    """
    # Sums made in inference mode could not be added to outside of it.
    with torch.inference_mode(False), torch.enable_grad():
        scorer = Scorer(model, graph, criterion, baseline=baseline, bn_mode=bn_mode)
        criterion = scorer.criterion
        if (name := without_values(model)) is not None:
            return _without_values(scorer, name)
        if not criterion.needs_forward:
            return scorer.compute()
        if batches is None:
            raise ScoreError(f"{criterion!r} needs data: pass batches=..., an iterable of batches such as a DataLoader")
        if criterion.needs_backward and loss is None:
            raise ScoreError(
                f"{criterion!r} needs gradients: pass loss=..., a function of (model, batch) returning a scalar"
            )
        if criterion.needs_backward:
            check_trainable(model)
        again = ", several times" if len(scorer.passes) > 1 else ""
        none = ScoreError(f"{criterion!r} needs data{again}, but batches was empty (a used-up generator?)")
        with scorer:
            for see in scorer.passes:
                for batch in each_batch(model, batches, none):
                    see(partial(loss or _call, model, batch))
        return scorer.compute()


def _call(model: nn.Module, batch: Any) -> Any:
    try:
        return call_model(model, batch)
    except ScoreError:
        raise
    except Exception as error:
        raise ScoreError(
            f"the model does not run on a batch of type {type(batch).__name__}: {first_line(error)}. Pass "
            "loss=lambda model, batch: ..., which runs it on what it takes, such as model(batch[0])"
        ) from error


def _without_values(scorer: Scorer, name: str) -> Scores:
    """Scores of a model on the meta device, where the criterion can do without weights and data."""
    needs = ScoreError(
        f"{name!r} is on the meta device, where nothing has a value, and {scorer.criterion!r} needs weights or data: "
        "load the weights first, use the criterion Random, or select by scores from elsewhere (Scores.load)"
    )
    if scorer.criterion.needs_forward:
        raise needs
    try:
        return scorer.compute()
    except (NotImplementedError, RuntimeError) as error:
        raise needs from error
