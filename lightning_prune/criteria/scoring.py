"""Scores of all channels of a model under a criterion, with the model left as it was found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_prune.criteria import functional
from lightning_prune.criteria.base import Criterion, Member, criterion_from
from lightning_prune.criteria.baseline import fit_baseline, swapped
from lightning_prune.criteria.bn_scale import batch_norm_scales
from lightning_prune.criteria.observe.auxiliary_classifiers import AuxiliaryHeads
from lightning_prune.criteria.observe.recording import Recorder, key_of
from lightning_prune.criteria.scores import Scores
from lightning_prune.errors import ScoreError
from lightning_prune.graph import ChannelGraph, Group, Layer, call_model, on_device
from lightning_prune.model_state.preservation import preserved, random_state, set_random_state

__all__ = ["BatchNormMode", "Scorer", "Scores", "score"]

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
        bn_mode: modules while scoring inside ``with``. ``eval``: all in eval mode. ``train``: all in train
            mode (batch statistics, dropout). ``keep``: as they are.

    Raises:
        ScoreError: unknown bn_mode, missing or unfit baseline, or a site that the model does not have.
        PlanError: the graph belongs to another model.

    Example:
        >>> from lightning_prune.graph import trace
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 1, 1))
        >>> images = torch.randn(4, 1, 3, 3)
        >>> with Scorer(model, trace(model, images), "gre") as scorer:
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
        if bn_mode not in get_args(BatchNormMode):
            accepted = ", ".join(map(repr, get_args(BatchNormMode)))
            raise ScoreError(f"bn_mode must be one of {accepted}, got {bn_mode!r}")
        graph.check(model)
        self.model = model
        self.graph = graph
        self.criterion = criterion_from(criterion)
        self.bn_mode = bn_mode
        self.state: dict[str, Tensor] = {}
        self._taps = self.criterion.taps
        self._recorder = Recorder(model, graph, self._taps)
        self._baseline = fit_baseline(model, baseline) if self.criterion.needs_reference else None
        self._heads = AuxiliaryHeads(model, graph, *self.criterion.auxiliary) if self.criterion.needs_heads else None
        self._stack: ExitStack | None = None
        for group, layer in _layers(graph):
            device = _parameter(model, layer.weight).device
            for tap in self._taps:
                key = key_of(group, layer, tap)
                if f"{key}/sum" in self.state:
                    continue
                shape = self._recorder.shape(group, layer, tap)
                self.state[f"{key}/sum"] = torch.zeros(shape, dtype=torch.float64, device=device)
                self.state[f"{key}/count"] = torch.zeros((), dtype=torch.float64, device=device)

    def __enter__(self) -> Scorer:
        if self._stack is not None:
            raise ScoreError("this Scorer is already in use; make one per model and pass")
        self._stack = ExitStack()
        self._stack.enter_context(preserved(self.model))
        if self.bn_mode != "keep":
            self.model.train(self.bn_mode == "train")
        return self

    def __exit__(self, *error: Any) -> None:
        self._recorder.stop()
        if self._stack is not None:
            stack, self._stack = self._stack, None
            stack.__exit__(*error)

    @property
    def passes(self) -> tuple[Callable[[Callable[[], Any]], None], ...]:
        """What to call with the step of every batch, one pass after the other."""
        return (self.update,) if self._heads is None else (self.fit, self.update)

    def fit(self, step: Callable[[], Any]) -> None:
        """Fit auxiliary classifiers to one batch; for criteria that need them, a pass of its own before `update`.

        Raises:
            ScoreError: the criterion has none, or ``step`` computes no cross-entropy over (N, classes).
        """
        if self._heads is None:
            raise ScoreError(f"{self.criterion!r} has no auxiliary heads to fit")
        self._heads.fit(step)

    def update(self, step: Callable[[], Any]) -> None:
        """Score one batch: run ``step``, which runs the model and returns the loss if the criterion needs
        one.

        With a baseline, ``step`` runs a second time under `torch.no_grad` with the dense weights in place,
        from the same random state.

        Raises:
            ScoreError: what ``step`` returns is no loss, or the tensors at a site are not what the graph
                says.
        """
        if self.criterion.needs_reference:
            before = random_state(self.model)
            with self._reference():
                step()
            set_random_state(before)
        if all(tap.reference for tap in self._taps):
            return
        if self._heads is not None:
            step = self._heads.joint(step)
        self._recorder.start(reference=False)
        with self._closing(), torch.set_grad_enabled(self.criterion.needs_backward):
            loss = step()
            if self.criterion.needs_backward:
                self.backward(loss)

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Watch one batch: run the model, then `backward`. An exception discards the batch."""
        self.begin_batch()
        with self._closing():
            yield

    def begin_batch(self) -> None:
        """Start watching.

        Raises:
            ScoreError: a batch is already open, or a baseline needs `update`.
        """
        if self._recorder.on:
            raise ScoreError("a batch is already open; call end_batch first")
        if self.criterion.needs_reference:
            raise ScoreError("reference='baseline' runs the model twice per batch; use Scorer.update(step)")
        if self._heads is not None:
            raise ScoreError("auxiliary heads add to the loss and need a pass of their own; use Scorer.fit and update")
        self._recorder.start(reference=False)

    def backward(self, loss: Any) -> None:
        """Differentiate with respect to the sites only: no parameter gradient is computed, ``.grad`` is not
        touched.

        Frees the autograd graph. Call it once per batch.

        Raises:
            ScoreError: not a scalar tensor, or nothing to differentiate.
        """
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ScoreError(f"the loss must be a scalar tensor, got {got}; return the mean over samples")
        if not loss.requires_grad or not self._recorder.edges:
            raise ScoreError(
                "the loss does not depend on any layer that is scored through autograd: run the model inside "
                "the batch, without torch.no_grad, inference_mode or detach"
            )
        torch.autograd.grad(loss.sum(), self._recorder.edges, allow_unused=True)

    def end_batch(self, *, discard: bool = False) -> None:
        """Add the batch to `state` and remove the hooks. Does nothing if no batch is open.

        Args:
            discard: forget the batch instead.

        Raises:
            ScoreError: the criterion needs gradients and no backward pass ran.
        """
        try:
            if discard or not self._recorder.on:
                return
            if self.criterion.needs_backward and not self._recorder.got_gradient():
                raise ScoreError(
                    f"{self.criterion!r} needs gradients, but no backward pass reached a layer in this batch"
                )
            self._add_totals()
        finally:
            self._recorder.stop()

    def compute(self) -> Scores:
        """Scores from everything seen so far. To reduce over processes, sum `state` over them first.

        Raises:
            ScoreError: a layer was never reached, or scores are NaN or infinite.
        """
        members = []
        counts = {name.removesuffix("/count"): n for name, n in self.state.items() if name.endswith("/count") and n}
        found = {key: self.state[f"{key}/sum"] / count for key, count in counts.items()}
        for group, layer in _layers(self.graph):
            keys = {tap.name: key_of(group, layer, tap) for tap in self._taps}
            self._check_seen(layer.name, keys)
            means = {name: found[key] for name, key in keys.items() if key in found}
            scales = batch_norm_scales(self.model, group, layer)
            members.append(Member(group.name, layer, _parameter(self.model, layer.weight), means, scales))
        layers: dict[str, dict[str, Tensor]] = {}
        for member, scores in zip(members, self.criterion.scores(members), strict=True):
            _check_finite(member, scores)
            layers.setdefault(member.group, {})[member.layer.name] = scores.detach().to("cpu", torch.float64)
        how = self.criterion.combine
        return Scores({group: functional.combine(list(of.values()), how) for group, of in layers.items()}, layers)

    @contextmanager
    def _closing(self) -> Iterator[None]:
        """End the open batch; an exception discards it."""
        try:
            yield
        except BaseException:
            self.end_batch(discard=True)
            raise
        self.end_batch()

    @contextmanager
    def _reference(self) -> Iterator[None]:
        assert self._baseline is not None
        self._recorder.start(reference=True)
        try:
            with torch.no_grad(), swapped(self.model, self._baseline):
                yield
            self._add_totals()
        finally:
            self._recorder.stop()

    def _add_totals(self) -> None:
        for key, total, count in self._recorder.totals():
            self.state[f"{key}/sum"] += total.to(self.state[f"{key}/sum"].device)
            self.state[f"{key}/count"] += count

    def _check_seen(self, layer: str, keys: Mapping[str, str]) -> None:
        for tap in self._taps:
            key = keys[tap.name]
            if tap.optional:
                continue
            if tap.gradient and key in self._recorder.without_grad and key not in self._recorder.differentiated:
                raise ScoreError(
                    f"{layer}: ran under torch.no_grad or inference_mode, so there is no gradient to score "
                    "it by; let gradients through it while scoring (parameters may stay frozen), or use L1, FPGM or LRE"
                )
            if not self.state[f"{key}/count"]:
                raise ScoreError(
                    f"{layer}: never called while scoring ({self.criterion!r} needs data); score on batches "
                    "that reach it, or trace the model without it"
                )
            # Another process may have seen it: the sum tells.
            if tap.gradient and key not in self._recorder.differentiated and not self.state[f"{key}/sum"].any():
                raise ScoreError(
                    f"{layer}: no gradient of the loss ever reached it; make the loss depend on it, or use a "
                    "criterion that needs none, such as L1, FPGM or LRE"
                )


def score(
    model: nn.Module,
    graph: ChannelGraph,
    criterion: Criterion | str,
    batches: Iterable[Any] | None = None,
    loss: Callable[[nn.Module, Any], Any] | None = None,
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
        >>> from lightning_prune.graph import trace
        >>> model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0], [-3.0]]))
        >>> score(model, trace(model, torch.randn(2, 1)), "l1")["0"].tolist()
        [0.5, 1.5]
    """
    # Sums made in inference mode could not be added to outside of it.
    with torch.inference_mode(False), torch.enable_grad():
        scorer = Scorer(model, graph, criterion, baseline=baseline, bn_mode=bn_mode)
        if scorer.criterion.needs_forward:
            with scorer:
                _run(scorer, batches, loss)
        return scorer.compute()


def _run(scorer: Scorer, batches: Iterable[Any] | None, loss: Callable[[nn.Module, Any], Any] | None) -> None:
    criterion, model = scorer.criterion, scorer.model
    if batches is None or isinstance(batches, Tensor):
        raise ScoreError(f"{criterion!r} needs data: pass batches=..., an iterable of batches such as a DataLoader")
    if criterion.needs_backward and loss is None:
        raise ScoreError(
            f"{criterion!r} needs gradients: pass loss=..., a function of (model, batch) returning a scalar"
        )
    run: Callable[[nn.Module, Any], Any] = loss if loss is not None else call_model
    for see in scorer.passes:
        empty = True
        for batch in batches:
            empty = False
            see(partial(run, model, on_device(batch, model)))
        if empty:
            again = ", several times" if len(scorer.passes) > 1 else ""
            raise ScoreError(f"{criterion!r} needs data{again}, but batches was empty (a used-up generator?)")


def _layers(graph: ChannelGraph) -> Iterator[tuple[Group, Layer]]:
    for group in graph.prunable_groups:
        for layer in group.layers:
            yield group, layer


def _parameter(model: nn.Module, name: str) -> Tensor:
    path, _, attribute = name.rpartition(".")
    weight = getattr(model.get_submodule(path), attribute)
    assert isinstance(weight, Tensor)
    return weight


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
