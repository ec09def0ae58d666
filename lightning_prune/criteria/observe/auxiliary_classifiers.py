"""Auxiliary classifiers on intermediate layers: how well the classes can be told apart there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_prune.criteria import functional
from lightning_prune.criteria.observe.watcher import calls_of
from lightning_prune.errors import ScoreError
from lightning_prune.graph import ChannelGraph
from lightning_prune.graph.running import saved_checkpoints

_SHRINKAGE = 0.1
_TINY = 1e-12


class AuxiliaryClassifiers:
    """Linear classifiers of relu(z), averaged over positions, at some layers' outputs z (after batch norm).

    ``count`` of them, evenly spread in the order in which the layers run. Their labels are those that the step gives to
    `torch.nn.functional.cross_entropy`, so that a training step needs no change.
    Two passes: `fit` on every batch, then `joint`.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph, count: int, weight: float) -> None:
        self._model = model
        self._candidates = sorted({layer.norm or layer.name for layer in graph.layers.values()})
        self._count = count
        self._weight = weight
        self.moments: dict[str, Moments] = {}
        self._classifiers: dict[str, Callable[[Tensor], Tensor]] | None = None

    def fit(self, step: Callable[[], Any]) -> None:
        """Learn from one batch; ``step`` runs the model and its loss."""
        seen: dict[str, Tensor] = {}

        def keep(path: str, output: Tensor) -> None:
            if path not in seen:
                seen[path] = _features(output)

        with self._watched(self.moments, keep), _Labels() as labels, torch.no_grad():
            step()
        shares = labels.shares()
        if not self.moments:
            order = list(seen)
            places = sorted({(1 + number) * len(order) // (self._count + 1) for number in range(self._count)})
            self.moments = {order[place]: Moments() for place in places if place < len(order)}
        for path in self.moments.keys() & seen.keys():
            if len(seen[path]) != len(shares):
                raise ScoreError(
                    f"{path}: sees {len(seen[path])} samples where the loss has {len(shares)}; use heads=0"
                )
            self.moments[path].add(seen[path], shares)
        self._classifiers = None

    def joint(self, step: Callable[[], Any]) -> Callable[[], Any]:
        """A step whose loss has the cross-entropies of the classifiers added."""
        if not self.moments:
            raise ScoreError("auxiliary classifiers have to be fitted first: call Scorer.fit(step) on every batch")
        if self._classifiers is None:
            for path, moments in self.moments.items():
                if not torch.isfinite(moments.squares).all():
                    raise ScoreError(f"{path}: what it puts out is NaN or infinite; check batches and precision")
            self._classifiers = {path: moments.classifier() for path, moments in self.moments.items()}
        classifiers = self._classifiers

        def run() -> Any:
            outputs: dict[str, Tensor] = {}

            def keep(path: str, output: Tensor) -> None:
                # A copy, which may not be overwritten; classified later, as a checkpoint would run this a second time.
                if path not in outputs:
                    outputs[path] = output.clone()

            with self._watched(classifiers, keep), _Labels() as labels:
                loss = step()
            if isinstance(loss, Tensor) and loss.numel() == 1:
                shares = labels.shares()
                for path, output in outputs.items():
                    found = classifiers[path](_features(output))
                    entropy = -(shares.to(found) * F.log_softmax(found, 1)).sum() / shares.sum().clamp(min=1).to(found)
                    loss = loss + self._weight * entropy
            return loss

        return run

    @contextmanager
    def _watched(self, only: Iterable[str], look: Callable[[str, Tensor], Any]) -> Iterator[None]:
        """Show the output z of these layers, or of all if none are named."""

        def see(path: str, module: nn.Module, _value: Any, output: Any) -> None:
            if isinstance(output, Tensor) and (output.ndim == 2 or not isinstance(module, nn.Linear)):
                look(path, output)

        with saved_checkpoints(), calls_of(self._model, only or self._candidates, see):
            yield


def _features(output: Tensor) -> Tensor:
    """relu(z), averaged over positions."""
    with torch.autocast(output.device.type, enabled=False):
        z = functional.widened(output).relu()
        return z.flatten(2).mean(2) if z.ndim > 2 else z


class Moments:
    """Sums over samples from which a linear discriminant follows; float64, additive over batches."""

    def __init__(self) -> None:
        self.origin: Tensor | float = 0.0  # (F,), mean of the first batch: features of a network hardly vary around it
        self.counts: Tensor | None = None  # samples of each class, (K,)
        self.sums = self.squares = torch.zeros(())  # features of each class, (K, F), and their products, (F, F)

    def add(self, features: Tensor, shares: Tensor) -> None:
        """One batch: (N, F), and (N, K) by how much each sample belongs to each class."""
        features, shares = features.double(), shares.to(features.device, torch.float64)
        if self.counts is None:
            self.origin = features.mean(0)
            self.counts, self.sums, self.squares = (features.new_zeros(()) for _ in range(3))
        features = features - self.origin
        self.counts = self.counts + shares.sum(0)
        self.sums = self.sums + shares.T @ features
        self.squares = self.squares + (features * shares.sum(1, keepdim=True)).T @ features

    def classifier(self) -> Callable[[Tensor], Tensor]:
        r"""Fisher's linear discriminant of what was added: features f, (N, F), to logits w_k^T (f - c) + b_k, (N, K).

        With c the mean of all features and :math:`d_k` from there to that of class k, :math:`w_k = S^{-1} d_k` and
        :math:`b_k = \log \pi_k - w_k^T d_k / 2`; S is the covariance within the classes, a tenth of it replaced by its
        mean variance on the diagonal.
        """
        assert self.counts is not None
        total = self.counts.sum()
        means = self.sums / self.counts.clamp(min=_TINY).unsqueeze(1)
        within = (self.squares - means.T @ self.sums) / total
        spread = within.diagonal().mean().clamp(min=_TINY)
        within = (1 - _SHRINKAGE) * within + _SHRINKAGE * spread * torch.eye(len(within)).to(within)
        centre = self.sums.sum(0) / total
        weight = torch.linalg.solve(within, (means - centre).T).T
        bias = (self.counts / total).clamp(min=_TINY).log() - (weight * (means - centre)).sum(1) / 2
        origin = self.origin + centre
        return lambda features: F.linear(features - origin.to(features), weight.to(features), bias.to(features))


class _Labels(TorchFunctionMode):
    """Remembers what the first cross-entropy over (N, classes) was told about the samples."""

    def __init__(self) -> None:
        super().__init__()
        self._target: Tensor | None = None
        self._classes = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.cross_entropy and self._target is None:
            logits, target = (*args, *(kwargs[name] for name in ("input", "target")[len(args) :]))[:2]
            if logits.ndim == 2:
                self._target, self._classes = target.detach(), logits.shape[1]
        return func(*args, **kwargs)

    def shares(self) -> Tensor:
        """By how much each sample belongs to each class, (N, K) float64; ignored ones to none."""
        if self._target is None:
            raise ScoreError(
                "auxiliary classifiers need labels, but no torch.nn.functional.cross_entropy of (N, classes) was "
                "computed; use DCP(heads=0), or another criterion, such as Taylor"
            )
        if self._target.is_floating_point():
            return self._target.double()
        known = (self._target >= 0) & (self._target < self._classes)
        return F.one_hot(self._target.clamp(0, self._classes - 1), self._classes).double() * known.unsqueeze(1)
