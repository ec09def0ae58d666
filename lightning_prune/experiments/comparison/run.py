"""Compute the cells of a comparison: score once per criterion and seed, then prune, test, fine-tune, test per ratio."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from pytorch_lightning import LightningDataModule, LightningModule, seed_everything
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_prune.callbacks import ScoringCallback
from lightning_prune.criteria import Criterion, criterion_from
from lightning_prune.criteria.scoring import Scores
from lightning_prune.errors import PlanError, PruningError
from lightning_prune.experiments.comparison.cells import Cell, CellStore, Comparison, Dense, Refusal, digest
from lightning_prune.experiments.runner import Runner, metric_name, quiet
from lightning_prune.files import atomic
from lightning_prune.graph import ChannelGraph
from lightning_prune.measure.measurement import count_flops, count_params
from lightning_prune.plan import Coupling, Plan
from lightning_prune.reconstruction.checkpoint import load_dense
from lightning_prune.reconstruction.small_model import reconstruct
from lightning_prune.selection import Budget, GlobalRatio, LayerRatio, Selection
from lightning_prune.selection.base import check_ratio

SelectionName = Literal["global", "layer", "flops"]
SELECTIONS: dict[str, Callable[[float], Selection]] = {
    "global": GlobalRatio,
    "layer": LayerRatio,
    "flops": lambda ratio: Budget(flops=1 - ratio),
}


def compare_criteria(
    task: LightningModule,
    data: LightningDataModule,
    criteria: Sequence[str | Criterion] | Mapping[str, str | Criterion],
    *,
    ratios: Sequence[float] = (0.3, 0.5, 0.7),
    seeds: Sequence[int] = (0, 1, 2),
    output: str | Path = "runs/compare",
    epochs: int = 5,
    lr: float | None = None,
    selection: SelectionName = "global",
    coupling: Coupling = "joint",
    score_batches: int | None = None,
    metric: str = "acc",
    note: Any = None,
    told: Callable[[Cell | Refusal], None] | None = None,
) -> Comparison:
    """Prune one trained task by each criterion, fine-tune it in the same way, and test it before and after.

    A criterion is scored once per seed, on frozen weights and batches in that seed's order; that serves every ratio.
    Every cell fine-tunes the reconstructed model from the same seed. Cells are kept in ``output/cells`` when done and
    found there by a later call with the same task, data and settings. A criterion with a ``seed`` of its own gets the
    cell's. Refusals (batch-norm scales of a model without batch norm) are not kept: they take no time.

    Args:
        task: already trained; left as it is. Logs ``test_{metric}``.
        data: training batches score and fine-tune, test batches judge.
        criteria: names or instances; as a mapping under names of your own, for two forms of one criterion.
        ratios: shares in (0, 1).
        seeds: of batches and fine-tuning.
        output: folder.
        epochs: of fine-tuning; 0: none, and accuracy after is that before.
        lr: first learning rate of fine-tuning; None: the task's own.
        selection: ``global`` removes the share of the network's channels, ``layer`` of each layer's; ``flops`` leaves
            all criteria the same cost, 1 - ratio of the dense model's.
        coupling: see `Selection.select`.
        score_batches: batches scored on; None: one pass over the training data.
        metric: name of the logged metric.
        note: plain data that the cells depend on besides: the optimizer's settings, say, which are code in a task.
            Cells under another note are others.
        told: called with every cell and refusal as soon as it is known.

    Raises:
        ScoreError: unknown criterion; names the valid ones. Nothing has been computed then.
        PlanError: no ratio, seed or criterion, one twice, or out of range.

    Example:
        >>> import tempfile
        >>> from lightning_prune.data import DigitsDataModule
        >>> from lightning_prune.tasks import ClassificationTask
        >>> layers = torch.nn.Linear(192, 8), torch.nn.ReLU(), torch.nn.Linear(8, 10)
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), *layers)
        >>> task, data = ClassificationTask(net, 10, input_size=(3, 8, 8)), DigitsDataModule(size=8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     found = compare_criteria(task, data, ["l1"], ratios=[0.5], seeds=[0], epochs=0, output=folder)
        >>> found.dense.macs, [(cell.criterion, cell.ratio, cell.macs) for cell in found.cells]
        (1616, [('l1', 0.5, 808)])
    """
    named = check_request(criteria, ratios, seeds, selection, epochs)
    runner = Runner(data, metric)
    with quiet():
        settings = {
            "weights": weights_digest(task),
            "data": _looks(data),
            "epochs": epochs,
            "lr": lr,
            "selection": selection,
            "coupling": coupling,
            "score_batches": score_batches,
            "metric": metric,
            "note": note,
        }
        store = CellStore(Path(output) / "cells", settings)
        example = task.example_input_array
        dense = Dense(runner.test(task)[0], count_flops(task, example), count_params(task))
        found: list[Cell] = []
        refusals: dict[tuple[str, float], Refusal] = {}
        for name, criterion in named.items():
            for seed in seeds:
                row = _Row(runner, task, name, _seeded(criterion, seed), seed, score_batches)
                for ratio in ratios:
                    if (name, ratio) in refusals:  # from an earlier seed
                        continue
                    outcome = row.outcome(store, ratio, SELECTIONS[selection](ratio), coupling, epochs, lr)
                    if isinstance(outcome, Refusal):
                        refusals[name, ratio] = outcome
                    else:
                        found.append(outcome)
                    if told is not None:
                        told(outcome)
    return Comparison(dense, tuple(found), tuple(refusals.values()), settings, metric_name(metric))


def check_request(
    criteria: Sequence[str | Criterion] | Mapping[str, str | Criterion],
    ratios: Sequence[float],
    seeds: Sequence[int],
    selection: str,
    epochs: int,
) -> dict[str, Criterion]:
    """What to compare, by name; refuses what `compare_criteria` refuses before it computes anything.

    Raises:
        ScoreError: unknown criterion; names the valid ones.
        PlanError: no ratio, seed or criterion, one twice, or out of range.

    Example:
        >>> check_request(["l1"], [0.5], [0], "global", 5)
        {'l1': L1(normalize='mean', combine='mean')}
    """
    named = _named(criteria)
    for what, values in (("ratio", ratios), ("seed", seeds)):
        if not values or len(set(values)) < len(values):
            raise PlanError(f"name at least one {what}, and each once; got {list(values)}")
    for ratio in ratios:
        if check_ratio(ratio) == 0:
            raise PlanError("a ratio of 0 prunes nothing; the dense model is in every table anyway")
    if any(isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31 for seed in seeds):
        raise PlanError(f"seeds must be integers in [0, 2**31), got {list(seeds)}")
    if selection not in get_args(SelectionName):
        raise PlanError(f"selection must be one of {', '.join(get_args(SelectionName))}, got {selection!r}")
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 0:
        raise PlanError(f"epochs must be an integer >= 0, got {epochs!r}")
    return named


def trained_once(task: LightningModule, data: LightningDataModule, epochs: int, folder: str | Path, note: Any) -> bool:
    """Train a task in place, or take its weights from an earlier call with the same note, start and data.

    Args:
        task: as it was built.
        data: what it is trained on.
        epochs: of training.
        folder: keeps the weights as ``dense-*.ckpt``.
        note: plain data that the training depends on besides: the optimizer's settings, the seed.

    Returns:
        Whether it was trained now.

    Raises:
        PruningError: the file there does not belong to the task.
    """
    with quiet():
        key = digest({"start": weights_digest(task), "data": _looks(data), "epochs": epochs, "note": note})
        path = Path(folder) / f"dense-{key[:12]}.ckpt"
        if path.is_file():
            load_dense(path, task)
            return False
        Runner(data, progress=True).fit(task, epochs)
    with atomic(path) as stream:
        torch.save({"state_dict": task.state_dict()}, stream)
    return True


def weights_digest(task: LightningModule) -> str:
    """A name for all parameters and buffers."""
    found = hashlib.sha256()
    for name, tensor in task.state_dict().items():
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


class _Row:
    """One criterion from one seed, scored when its first missing cell is asked for."""

    def __init__(
        self,
        runner: Runner,
        task: LightningModule,
        name: str,
        criterion: Criterion,
        seed: int,
        score_batches: int | None,
    ) -> None:
        self.runner = runner
        self.task = task
        self.name = name
        self.criterion = criterion
        self.seed = seed
        self.score_batches = score_batches
        self._scored: tuple[ChannelGraph, Scores] | PruningError | None = None

    def outcome(
        self, store: CellStore, ratio: float, selection: Selection, coupling: Coupling, epochs: int, lr: float | None
    ) -> Cell | Refusal:
        """The stored cell, or a new one, stored now, or why there is none."""
        path = store.path(self.name, repr(self.criterion), ratio, self.seed)
        cell = store.load(path)
        if cell is not None:
            return cell
        try:
            cell = self.cell(ratio, selection, coupling, epochs, lr)
        except PruningError as error:
            return Refusal(self.name, ratio, str(error))
        store.save(path, cell)
        return cell

    def cell(self, ratio: float, selection: Selection, coupling: Coupling, epochs: int, lr: float | None) -> Cell:
        """Prune, test, fine-tune, test."""
        graph, scores = self._scores()
        example = self.task.example_input_array
        plan: Plan = selection.select(graph, scores, coupling=coupling, model=self.task, example_inputs=example)
        small = reconstruct(self.task, graph, plan, example_inputs=example)
        before = after = self.runner.test(small)[0]
        if epochs:
            seed_everything(self.seed, verbose=False)
            self.runner.fit(small, epochs, lr=lr)
            after = self.runner.test(small)[0]
        macs, params = count_flops(small, example), count_params(small)
        return Cell(self.name, ratio, self.seed, before, after, macs, params, plan.ratio)

    def _scores(self) -> tuple[ChannelGraph, Scores]:
        if self._scored is None:
            seed_everything(self.seed, verbose=False)
            scoring = ScoringCallback(self.criterion, score_batches=self.score_batches)
            task = copy.deepcopy(self.task)
            try:
                self.runner.fit(task, 1, [scoring], max_steps=0)
            except PruningError as error:
                self._scored = error
            else:
                assert scoring.graph is not None
                assert scoring.scores is not None
                self._scored = scoring.graph, scoring.scores
        if isinstance(self._scored, PruningError):
            raise self._scored
        return self._scored


def _named(criteria: Sequence[str | Criterion] | Mapping[str, str | Criterion]) -> dict[str, Criterion]:
    if isinstance(criteria, Mapping):
        pairs = list(criteria.items())
    else:
        pairs = [(given if isinstance(given, str) else type(given).__name__, given) for given in criteria]
    named: dict[str, Criterion] = {}
    for name, given in pairs:
        criterion = criterion_from(given)
        if name in named or criterion in named.values():
            raise PlanError(f"criterion {name!r} is named twice; give two forms of one as {{name: criterion}}")
        named[name] = criterion
    if not named:
        raise PlanError("name at least one criterion to compare")
    return named


def _seeded(criterion: Criterion, seed: int) -> Criterion:
    """The criterion, with the cell's seed if it draws numbers of its own."""
    if not hasattr(criterion, "seed"):
        return criterion
    return replace(criterion, seed=seed)  # type: ignore[type-var]


def _looks(data: LightningDataModule) -> dict[str, Any]:
    """What tells this data from other data: its class, and the first batch of the training and the test part."""
    data.prepare_data()
    looks: dict[str, Any] = {"class": f"{type(data).__module__}.{type(data).__qualname__}"}
    for part, stage, loader in (("train", "fit", data.train_dataloader), ("test", "test", data.test_dataloader)):
        data.setup(stage)
        seed_everything(0, verbose=False)
        batches = loader()
        leaves = [leaf for leaf in tree_leaves(next(iter(batches))) if isinstance(leaf, Tensor)]
        # Three digits: they survive another machine's rounding.
        looks[part] = [len(batches), *([*leaf.shape, f"{leaf.double().mean():.3g}"] for leaf in leaves)]
    return looks
