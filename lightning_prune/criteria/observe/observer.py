"""Batches watched by all the taps of a criterion, and their sums."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.criteria.base import Criterion, Tap, TapSite
from lightning_prune.criteria.observe.activations import ActivationWatcher
from lightning_prune.criteria.observe.reader_outputs import ReaderOutputWatcher, SampledOutputWatcher
from lightning_prune.criteria.observe.rectified_outputs import RectifiedOutputWatcher
from lightning_prune.criteria.observe.watcher import Watcher, key_of
from lightning_prune.criteria.observe.weights import WeightWatcher
from lightning_prune.errors import ScoreError
from lightning_prune.graph import ChannelGraph, Layer
from lightning_prune.graph.describe import shortened
from lightning_prune.graph.running import saved_checkpoints
from lightning_prune.model_state.attention import narrowed

_WATCHERS: dict[TapSite, type[Watcher]] = {
    "conv": ActivationWatcher,
    "bn": ActivationWatcher,
    "activation": ActivationWatcher,
    "weight": WeightWatcher,
    "reader_weight": WeightWatcher,
    "reader": ReaderOutputWatcher,
    "rectifier": RectifiedOutputWatcher,
    "reader_rows": SampledOutputWatcher,
}


class Observer:
    """Watches batches, one at a time, and adds them up in ``state``: per key ``/sum`` and ``/count``, float64.

    Hooks exist only while a batch is open. ``reference``: only the taps that look at the frozen dense model, or only
    the others.
    """

    def __init__(
        self, model: nn.Module, graph: ChannelGraph, criterion: Criterion, state: dict[str, Tensor], *, reference: bool
    ) -> None:
        self.taps = [tap for tap in criterion.taps if tap.reference == reference]
        self._state = state
        self._criterion = criterion
        self._seen_as: dict[str, tuple[Layer, Tap]] = {}  # what every key stands for; its first layer, if for several
        self._differentiated: set[str] = set()
        watchers = {kind: kind(model) for kind in dict.fromkeys(_WATCHERS[tap.site] for tap in self.taps)}
        self._watchers = list(watchers.values())
        self._batch: ExitStack | None = None
        self._model = model
        inside = {
            name for group in graph.prunable_groups for layer in group.layers for name in (layer.name, layer.reader)
        }
        attentions = {path for path, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)}
        self._attends = not attentions.isdisjoint(
            {part for name in inside if name for part in (name, name.rpartition(".")[0])}
        )
        for group in graph.prunable_groups:
            for tap in self.taps:
                watcher = watchers[_WATCHERS[tap.site]]
                watcher.listen(group, tap)
                for layer in group.layers:
                    key = key_of(group, layer, tap)
                    self._seen_as.setdefault(key, (layer, tap))
                    zero = torch.zeros((), dtype=torch.float64, device=model.get_parameter(layer.weight).device)
                    self._state[f"{key}/sum"], self._state[f"{key}/count"] = zero.new_zeros(watcher.shapes[key]), zero

    @contextmanager
    def batch(self, *, required: bool = True) -> Iterator[None]:
        """Watch one batch; an exception discards it. ``required``: see `end_batch`."""
        self.begin_batch()
        try:
            yield
        except BaseException:
            self.end_batch(discard=True)
            raise
        self.end_batch(required=required)

    def begin_batch(self) -> None:
        """Start watching."""
        if self._batch is not None:
            raise ScoreError("a batch is already open; call end_batch first")
        with ExitStack() as stack:
            stack.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code knows nothing of the hooks
            stack.enter_context(saved_checkpoints())
            if self._attends:
                stack.enter_context(narrowed(self._model))
            for watcher in self._watchers:
                stack.enter_context(watcher)
            self._batch = stack.pop_all()

    def end_batch(self, *, discard: bool = False, required: bool = True) -> None:
        """Add the batch to the state, or forget it, and remove the hooks. Does nothing if no batch is open.

        ``required``: a batch without the gradients that the criterion needs is an error; else it is forgotten.
        """
        if self._batch is None:
            return
        stack, self._batch = self._batch, None
        with stack:
            if discard:
                return
            seen = [pair for watcher in self._watchers for pair in watcher.found()]
            arrived = {key for key, found in seen if found.differentiated}
            if not arrived and any(tap.gradient for tap in self.taps):
                if not required:
                    return
                raise ScoreError(
                    f"{self._criterion!r} needs gradients, but no backward pass reached a layer in this batch; "
                    f"{self._scored_on()}"
                )
            self._differentiated |= arrived
            for key, found in seen:
                channels, tap = found.partial, found.tap
                if tap.gradient and not tap.joint:
                    channels = channels * float(len(channels)) ** tap.degree
                total, count = tap.reduce(channels, max(found.positions, 1))
                self._state[f"{key}/sum"] += total.to(self._state[f"{key}/sum"].device)
                self._state[f"{key}/count"] += count

    def backward(self, loss: Any) -> None:
        """Differentiate with respect to the sites only, once per batch: ``.grad`` of parameters is not touched."""
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ScoreError(f"the loss must be a scalar tensor, got {got}; return the mean over samples")
        edges = [edge for watcher in self._watchers for edge in watcher.edges]
        if not loss.requires_grad or not edges:
            raise ScoreError(
                "the loss does not depend on any layer that is scored through autograd: run the model inside "
                f"the batch, without torch.no_grad, inference_mode or detach; {self._scored_on()}"
            )
        torch.autograd.grad(loss.sum(), edges, allow_unused=True)

    def _scored_on(self) -> str:
        layers = list(dict.fromkeys(layer.name for layer, _ in self._seen_as.values()))
        if not layers:
            return "no channels are left that could be scored"
        return f"scored are {shortened(layers)}, where they or their norms run as they did while tracing"

    def means(self) -> dict[str, Tensor]:
        """Mean of every key over what was seen so far."""
        unseen = self.unseen()
        return {
            key: self._state[f"{key}/sum"] / self._state[f"{key}/count"]
            for key in self._seen_as
            if key not in unseen and bool(self._state[f"{key}/count"])
        }

    def unseen(self) -> dict[str, ScoreError]:
        """Keys that were never seen, or without the gradient that they need, with the error that says so."""
        found = {key: self._why_unseen(layer, tap, key) for key, (layer, tap) in self._seen_as.items()}
        return {key: error for key, error in found.items() if error is not None}

    def _why_unseen(self, layer: Layer, tap: Tap, key: str) -> ScoreError | None:
        if tap.optional:
            return None
        no_gradient = tap.gradient and key not in self._differentiated
        if no_gradient and any(key in watcher.without_grad for watcher in self._watchers):
            return ScoreError(
                f"{layer.name}: ran under torch.no_grad or inference_mode, so there is no gradient to score "
                "it by; let gradients through it while scoring (parameters may stay frozen), or use L1, FPGM or LRE"
            )
        if not bool(self._state[f"{key}/count"]):
            return ScoreError(
                f"{layer.name}: never called while scoring ({self._criterion!r} needs data); score on batches "
                "that reach it, or trace the model without it"
            )
        # Another process may have seen it: the sum tells.
        if no_gradient and not self._state[f"{key}/sum"].any():
            return ScoreError(
                f"{layer.name}: no gradient of the loss ever reached it; make the loss depend on it, or use a "
                "criterion that needs none, such as L1, FPGM or LRE"
            )
        return None
