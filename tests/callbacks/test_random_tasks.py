"""Random modules with code outside forward: they train to the end, and nothing shows that they were traced."""

from __future__ import annotations

import copy
import random
import re
import sys
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

from lightning_prune.callbacks import PruneCallback
from lightning_prune.errors import PruningError
from lightning_prune.model_state.preservation import copy_without_masks
from lightning_prune.session import PruningSession
from tests.callbacks.random_data import Images, training_data, unpack, validation_data
from tests.callbacks.random_runs import Watcher, prune_callback, trainer
from tests.callbacks.random_tasks import RandomTask, Spec, build, spec

ORDINARY, SLOW, PART = 15, 2000, 250


def batches(form: str, sizes: tuple[int, ...]) -> list[Any]:
    """Some that nobody traced."""
    made = []
    for size in sizes:
        data = Images(5, form, 99, size)
        made.append(torch.utils.data.default_collate([data[k] for k in range(5)]))
    return made


def compare(masked: RandomTask, small: RandomTask) -> float:
    """The largest relative difference in float64: forward, and the losses of training and validation, in both modes."""
    own: Spec = masked.spec
    worst = 0.0
    pair = [copy.deepcopy(model).double() for model in (masked, small)]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        for batch in batches(own.batch, (8, 12)):
            for training in (False, True):
                results: list[list[Tensor]] = []
                for model in pair:
                    model.train(training)
                    x, _ = unpack(batch)
                    x = x.double()
                    as_double = _double(batch)
                    out = model(x)
                    found = list(out) if isinstance(out, tuple) else [out]
                    for index, now in ((0, 0), (1, 1)):
                        found.append(model.losses(as_double, index, training, now))
                    results.append([t.detach() for t in found])
                for a, b in zip(*results, strict=True):
                    assert a.shape == b.shape
                    worst = max(worst, float((a - b).abs().max() / a.abs().max().clamp_min(1e-9)))
    finally:
        torch.set_default_dtype(before)
    return worst


def _double(batch: Any) -> Any:
    return tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, copy.deepcopy(batch))


def fit(own: Spec, callback: PruneCallback | None, pairs: list[Any] | None = None) -> tuple[Any, ...]:
    """Train; the task, the Trainer and what training saw."""
    task, watcher = build(own), Watcher()
    runner = trainer(own, *([] if callback is None else [callback]), watcher)
    torch.manual_seed(own.seed)
    random.seed(own.seed)
    train, validation = training_data(own), validation_data(own)
    error = None
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        if pairs is not None:
            _watch(patch, pairs)
        try:
            runner.fit(task, train, validation)
            if validation is not None:
                runner.validate(task, validation, verbose=False)
            if "test" in own.books:
                runner.test(task, validation_data(own) or train, verbose=False)
        except PruningError as found:
            error = found
    return task, runner, watcher, error


def _watch(patch: pytest.MonkeyPatch, pairs: list[Any]) -> None:
    """Keep the masked and the small model of every reconstruction."""
    reconstruct_ = PruningSession.reconstruct_

    def kept(self: PruningSession, **options: Any) -> Any:
        masked = copy_without_masks(self.model)
        report = reconstruct_(self, **options)
        pairs.append((masked, copy_without_masks(self.model)))
        return report

    patch.setattr(PruningSession, "reconstruct_", kept)


def check(seed: int) -> str:
    """What became of one seed; an AssertionError if it was not right."""
    own = spec(seed)
    pairs: list[Any] = []
    callback = prune_callback(own)
    task, _, watcher, error = fit(own, callback, pairs)
    plain, plain_runner, plain_watcher, _ = fit(own, None)
    if error is not None:
        scored_late = own.update_weights or own.schedule  # what cannot be known before training
        assert scored_late or not watcher.batches, f"refused after training began: {error}"
        named = r"backbone\.|teacher\.|Task|max_epochs"
        assert re.search(named, str(error)), f"nothing is named: {error}"
        return f"refused: {error}"
    for masked, small in pairs:
        found = compare(masked, small)
        assert found < 1e-8, f"masked and small model differ by {found:.1e}"
    if own.reconstruct != "never" and not own.schedule:
        assert pairs, "nothing was reconstructed"
    assert plain_watcher.batches == watcher.batches or own.augmented, "training sees other batches"
    assert_untouched(own, plain, plain_runner, plain_watcher)
    gone = sum(p.numel() for p in plain.parameters()) - sum(p.numel() for p in task.parameters())
    masked = callback.masking.plan is not None and callback.masking.plan.ratio > 0
    return "kept" if not masked else f"removed {gone}"


def assert_untouched(own: Spec, plain: RandomTask, runner: Any, watcher: Watcher) -> None:
    """With a ratio of 0 a run is the one without the callback, but for the rounding of tensors that lie elsewhere."""
    task, traced, seen, error = fit(own, prune_callback(own, 0.0))
    assert error is None, error
    assert seen.batches == watcher.batches, "training sees other batches"
    assert seen.random == watcher.random, "the random state is another"
    assert close(traced.logger.logged, runner.logger.logged), "other values are logged"
    assert close(traced.callback_metrics, runner.callback_metrics)
    assert task.calls == plain.calls, "steps were counted that nobody took"
    for name, tensor in plain.state_dict().items():
        assert close(tensor, task.state_dict()[name]), f"{name} is another"


def close(one: Any, other: Any) -> bool:
    (first, form), (second, same) = tree_flatten(one), tree_flatten(other)
    pairs = zip(first, second, strict=True)
    return form == same and all(torch.allclose(*map(torch.as_tensor, p), rtol=1e-4, atol=1e-5) for p in pairs)


def outcomes(seeds: range) -> Counter[str]:
    found: Counter[str] = Counter()
    for seed in seeds:
        try:
            found[check(seed).partition(" ")[0].rstrip(":")] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error}\n{spec(seed)}") from error
    sys.stdout.write(f"{dict(found)}\n")
    return found


def assert_mostly_pruned(found: Counter[str]) -> None:
    assert found["refused"] <= 0.3 * found.total()
    assert found["removed"] >= 0.6 * found.total()


def test_random_tasks() -> None:
    assert_mostly_pruned(outcomes(range(ORDINARY)))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("first", range(ORDINARY, ORDINARY + SLOW, PART))
def test_many_random_tasks(first: int) -> None:
    assert_mostly_pruned(outcomes(range(first, first + PART)))
