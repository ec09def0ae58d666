"""A criterion's sums over batches of a model that runs its own training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module

from lightning_prune.criteria import functional
from lightning_prune.criteria.base import Criterion, Member, criterion_from
from lightning_prune.criteria.bn_scale import batch_norm_scales
from lightning_prune.criteria.observe.auxiliary_classifiers import AuxiliaryClassifiers
from lightning_prune.criteria.observe.observer import Observer
from lightning_prune.criteria.observe.watcher import key_of
from lightning_prune.criteria.scores import Scores
from lightning_prune.errors import ScoreError, check_choice
from lightning_prune.graph import ChannelGraph
from lightning_prune.graph.computed_weights import effective_weight
from lightning_prune.model_state.preservation import preserved, random_state, set_random_state, without_masks

BatchNormMode = Literal["eval", "train", "keep"]


class Scorer:
    """Sums what a criterion wants to know over batches, by hooks on a model that runs its own training step.

    As a context manager it keeps the model as it is: on leaving, also by an exception, train and eval modes,
    buffers, gradients, ``requires_grad`` flags and random states are what they were. Without ``with`` it only
    watches, for scoring while the model trains (`begin_batch`, the trainer's own backward pass, `end_batch`).
    Hooks exist only while a batch is open.

    A sample is an entry of the first dimension of the tensor at a site; the loss is taken to average over
    samples.

    Args:
        model: the model the graph was traced on.
        graph: its channel graph.
        criterion: a criterion, or its name.
        baseline: state dict of the dense model, for criteria with ``reference="baseline"``; same shapes as
            the model.
        bn_mode: modules while scoring inside ``with``: all in ``eval`` mode, all in ``train`` mode (batch
            statistics, dropout), or ``keep``: as they are.

    Raises:
        ScoreError: unknown bn_mode, missing or unfit baseline, or a site that the model does not have.
        PlanError: the graph belongs to another model.

    Example:
        >>> import lightning_prune as lp
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 1, 1))
        >>> images = torch.randn(4, 1, 3, 3)
        >>> with Scorer(model, lp.trace(model, images), "gre") as scorer:
        ...     scorer.update(lambda: model(images).square().mean())
        >>> sorted(scorer.compute()["0"].tolist())
        [0.0, 1.0]
    """

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        criterion: Criterion | str,
        *,
        baseline: Mapping[str, Tensor] | None = None,
        bn_mode: BatchNormMode = "eval",
    ) -> None:
        check_choice("bn_mode", bn_mode, BatchNormMode, ScoreError)
        graph.check(model)
        self.model = model
        self.graph = graph
        self.criterion = criterion_from(criterion)
        self.bn_mode = bn_mode
        self.state: dict[str, Tensor] = {}
        self._observer = Observer(model, graph, self.criterion, self.state, reference=False)
        self._dense = Observer(model, graph, self.criterion, self.state, reference=True)
        self._baseline = _fit_baseline(model, baseline) if self.criterion.needs_reference else None
        count, weight = self.criterion.auxiliary
        self._classifiers = AuxiliaryClassifiers(model, graph, count, weight) if count else None
        self._preserved: AbstractContextManager[None] | None = None

    def __enter__(self) -> Scorer:
        if self._preserved is not None:
            raise ScoreError("this Scorer is already in use; make one per model and pass")
        self._preserved = preserved(self.model)
        self._preserved.__enter__()
        if self.bn_mode != "keep":
            self.model.train(self.bn_mode == "train")
        return self

    def __exit__(self, *error: Any) -> None:
        self.end_batch(discard=True)
        if self._preserved is not None:
            kept, self._preserved = self._preserved, None
            kept.__exit__(*error)

    @property
    def passes(self) -> tuple[Callable[[Callable[[], Any]], None], ...]:
        """What to call with the step of every batch, one pass after the other."""
        return (self.update,) if self._classifiers is None else (self.fit, self.update)

    def fit(self, step: Callable[[], Any]) -> None:
        """Fit auxiliary classifiers to one batch; for criteria that need them, a pass of its own before `update`.

        Raises:
            ScoreError: the criterion has none, or ``step`` computes no cross-entropy over (N, classes).
        """
        if self._classifiers is None:
            raise ScoreError(f"{self.criterion!r} has no auxiliary classifiers to fit")
        self._classifiers.fit(step)

    def update(self, step: Callable[[], Any], *, differentiates: bool = False) -> None:
        """Score one batch: run ``step``, which runs the model and returns the loss if the criterion needs one.

        ``differentiates``: it calls ``backward`` itself, once or several times, whose gradients add up, or not on this
        batch, which is left out then.

        With a baseline, ``step`` runs a second time under `torch.no_grad` with the dense weights in place,
        from the same random state.

        Raises:
            ScoreError: what ``step`` returns is no loss, or the tensors at a site are not what the graph says.
        """
        if self._baseline is not None:
            before = random_state(self.model)
            dense = _reparametrize_module(self.model, self._baseline, stack_weights=True)
            with self._dense.batch(), torch.no_grad(), dense, without_masks(self.model):
                step()
            set_random_state(before)
        if not self._observer.taps:
            return
        if self._classifiers is not None:
            step = self._classifiers.joint(step)
        with self._observer.batch(required=not differentiates), torch.set_grad_enabled(self.criterion.needs_backward):
            loss = step()
            if self.criterion.needs_backward and not differentiates:
                self._observer.backward(loss)

    def begin_batch(self) -> None:
        """Start watching a batch whose backward pass is the trainer's own.

        Raises:
            ScoreError: a batch is already open, or a baseline or auxiliary classifiers need `update`.
        """
        if self.criterion.needs_reference:
            raise ScoreError("reference='baseline' runs the model twice per batch; use Scorer.update(step)")
        if self._classifiers is not None:
            raise ScoreError(
                "auxiliary classifiers add to the loss and need a pass of their own; use Scorer.fit and update"
            )
        self._observer.begin_batch()

    def end_batch(self, *, discard: bool = False, required: bool = True) -> None:
        """Add the batch to `state` and remove the hooks. Does nothing if no batch is open.

        Args:
            discard: forget the batch instead.
            required: whether a batch without a backward pass is an error; else it is left out.

        Raises:
            ScoreError: the criterion needs gradients and no backward pass ran.
        """
        self._observer.end_batch(discard=discard, required=required)

    def compute(self) -> Scores:
        """Scores from everything seen so far. To reduce over processes, sum `state` over them first.

        Raises:
            ScoreError: a layer was never reached, or scores are NaN or infinite.
        """
        found = {**self._observer.means(), **self._dense.means()}
        unseen = {**self._observer.unseen(), **self._dense.unseen()}
        members: list[Member] = []
        left_out: list[tuple[str, str, ScoreError]] = []
        for group in self.graph.prunable_groups:
            for layer in group.layers:
                keys = {tap.name: key_of(group, layer, tap) for tap in self.criterion.taps}
                if errors := [unseen[key] for key in keys.values() if key in unseen]:
                    left_out.append((group.name, layer.name, errors[0]))
                    continue
                means = {name: found[key] for name, key in keys.items() if key in found}
                scales = batch_norm_scales(self.model, group, layer)
                members.append(Member(group.name, layer, effective_weight(self.model, layer.weight), means, scales))
        layers: dict[str, dict[str, Tensor]] = {group: {} for group, _, _ in left_out}
        for member, scores in zip(members, self.criterion.scores(members), strict=True):
            _check_finite(member, scores)
            layers.setdefault(member.group, {})[member.layer.name] = scores.detach().to("cpu", torch.float64)
        for name, _, error in left_out:
            if not layers[name]:
                raise error
        how = self.criterion.combine
        whole = {group: functional.combine(list(of.values()), how) for group, of in layers.items()}
        for name, layer_name, _ in left_out:  # a teacher without gradients, a branch not taken: as the others say
            layers[name][layer_name] = whole[name]
        return Scores(whole, layers)


def _fit_baseline(model: nn.Module, baseline: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Copies of the dense model's tensors on the model's devices."""
    if baseline is None:
        raise ScoreError(
            "reference='baseline' needs the weights of the dense model: pass baseline={name: tensor}, for example a "
            "deep copy of model.state_dict() taken before pruning"
        )
    fitted = {}
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            continue
        if name not in baseline or baseline[name].shape != tensor.shape:
            found = f"shape {list(baseline[name].shape)}" if name in baseline else "nothing"
            raise ScoreError(
                f"baseline: expected {name!r} with shape {list(tensor.shape)}, found {found}; the model being scored "
                "must still have the dense shapes (mask it, and reconstruct at the end), or use reference='self'"
            )
        fitted[name] = baseline[name].detach().to(tensor.device, tensor.dtype, copy=True)
    return fitted


def _check_finite(member: Member, scores: Tensor) -> None:
    bad = int((~torch.isfinite(scores)).sum())
    if not bad:
        return
    if not torch.isfinite(member.weight).all():
        cause = "its weights hold NaN or infinite values: training has diverged"
    elif member.means:
        cause = "activations or gradients are NaN or overflow: check batches, loss and precision (try float32)"
    else:
        cause = "its weights are too large"
    raise ScoreError(f"{member.layer.name}: {bad} of {len(scores)} scores are NaN or infinite; {cause}")
