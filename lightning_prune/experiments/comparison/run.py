"""Compute the cells of a comparison: score once per criterion and seed, then prune, test, fine-tune, test per ratio."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pytorch_lightning import LightningDataModule, LightningModule, seed_everything
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_prune.criteria import Criterion, criterion_from
from lightning_prune.criteria.scores import Scores
from lightning_prune.errors import PlanError, PruningError
from lightning_prune.experiments.comparison.cells import (
    Cell,
    Comparison,
    Dense,
    Refusal,
    cell_path,
    described,
    digest,
    read_cell,
    write_kept,
)
from lightning_prune.experiments.runner import Runner, metric_name, quiet
from lightning_prune.files import atomic, check_writable
from lightning_prune.graph import ChannelGraph
from lightning_prune.measure import count_flops, count_params
from lightning_prune.model_state.digest import digest_of
from lightning_prune.plan import Coupling
from lightning_prune.reconstruction.checkpoint import load_dense
from lightning_prune.reconstruction.small_model import reconstruct
from lightning_prune.selection import Budget, GlobalRatio, LayerRatio, Selection
from lightning_prune.selection.base import check_ratio

Criteria = Sequence[str | Criterion] | Mapping[str, str | Criterion]
SelectionName = Literal["global", "layer", "flops"]
SELECTIONS: dict[str, Callable[[float], Selection]] = {
    "global": GlobalRatio,
    "layer": LayerRatio,
    "flops": lambda ratio: Budget(flops=1 - ratio),
}


def compare_criteria(
    task: LightningModule,
    data: LightningDataModule,
    criteria: Criteria,
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
    task_settings: Any = None,
    on_outcome: Callable[[Cell | Refusal], None] | None = None,
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
        task_settings: plain data that the cells depend on besides: the optimizer's settings, say, which are code in a
            task. Cells under other settings are others.
        on_outcome: called with every cell and refusal as soon as it is known.

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
    check_writable(Path(output) / "cells" / "cell.json")
    with quiet():
        settings = {
            "weights": weights_digest(task),
            "data": data_summary(data),
            "epochs": epochs,
            "lr": lr,
            "selection": selection,
            "coupling": coupling,
            "score_batches": score_batches,
            "metric": metric,
            "note": task_settings,
        }
        study = _Study(Runner(data, metric), task, Path(output), settings)
        example = task.example_input_array
        dense = Dense(study.runner.test(task)[0], count_flops(task, example), count_params(task))
        found: list[Cell] = []
        refusals: dict[tuple[str, float], Refusal] = {}
        for name, criterion in named.items():
            for seed in seeds:
                left = [ratio for ratio in ratios if (name, ratio) not in refusals]  # by an earlier seed
                for outcome in study.row(name, criterion, seed, left):
                    if isinstance(outcome, Refusal):
                        refusals[name, outcome.ratio] = outcome
                    else:
                        found.append(outcome)
                    if on_outcome is not None:
                        on_outcome(outcome)
    return Comparison(dense, tuple(found), tuple(refusals.values()), settings, metric_name(metric))


def check_request(
    criteria: Criteria, ratios: Sequence[float], seeds: Sequence[int], selection: str, epochs: int
) -> dict[str, Criterion]:
    """The criteria to compare, by name; refuses what `compare_criteria` refuses before it computes anything."""
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
    for what, values in (("ratio", ratios), ("seed", seeds)):
        if not values or len(set(values)) < len(values):
            raise PlanError(f"name at least one {what}, and each once; got {list(values)}")
    for ratio in ratios:
        if check_ratio(ratio) == 0:
            raise PlanError("a ratio of 0 prunes nothing; the dense model is in every table anyway")
    if any(isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31 for seed in seeds):
        raise PlanError(f"seeds must be integers in [0, 2**31), got {list(seeds)}")
    if selection not in SELECTIONS:
        raise PlanError(f"selection must be one of {', '.join(SELECTIONS)}, got {selection!r}")
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 0:
        raise PlanError(f"epochs must be an integer >= 0, got {epochs!r}")
    return named


def trained_once(
    task: LightningModule, data: LightningDataModule, epochs: int, folder: str | Path, task_settings: Any
) -> bool:
    """Train a task in place, or take its weights from an earlier call with the same settings, start and data.

    Args:
        task: as it was built.
        data: what it is trained on.
        epochs: of training.
        folder: keeps the weights as ``dense-*.ckpt``.
        task_settings: plain data that the training depends on besides: the optimizer's settings, the seed.

    Returns:
        Whether it was trained now.

    Raises:
        PruningError: the file there does not belong to the task.
    """
    with quiet():
        start = {"start": weights_digest(task), "data": data_summary(data)}
        key = digest({**start, "epochs": epochs, "note": task_settings})
        path = Path(folder) / f"dense-{key[:12]}.ckpt"
        if path.is_file():
            load_dense(path, task)
            return False
        check_writable(path)
        Runner(data, progress=True).fit(task, epochs)
    with atomic(path) as stream:
        torch.save({"state_dict": task.state_dict()}, stream)
    return True


def weights_digest(task: LightningModule) -> str:
    """A name for all parameters and buffers."""
    return digest_of(task.state_dict())


def data_summary(data: LightningDataModule, parts: Sequence[str] = ("train", "test")) -> dict[str, Any]:
    """What tells this data from other data: its class, and the first batch of some parts."""
    data.prepare_data()
    summary: dict[str, Any] = {"class": f"{type(data).__module__}.{type(data).__qualname__}"}
    for part in parts:
        data.setup({"train": "fit", "val": "validate"}.get(part, part))
        seed_everything(0, verbose=False)
        batches = getattr(data, f"{part}_dataloader")()
        leaves = [leaf for leaf in tree_leaves(next(iter(batches))) if isinstance(leaf, Tensor)]
        # Three digits: they survive another machine's rounding.
        summary[part] = [len(batches), *([*leaf.shape, f"{leaf.double().mean():.3g}"] for leaf in leaves)]
    return summary


@dataclass(frozen=True)
class _Study:
    """What all cells share: they are found on disk, or the task is pruned, tested, fine-tuned and tested."""

    runner: Runner
    task: LightningModule
    folder: Path
    settings: dict[str, Any]

    def row(self, name: str, criterion: Criterion, seed: int, ratios: Sequence[float]) -> Iterator[Cell | Refusal]:
        """Cells of one criterion from one seed, which is scored once, and only if one is missing."""
        if hasattr(criterion, "seed"):
            criterion = replace(criterion, seed=seed)  # type: ignore[type-var]
        depends = {**self.settings, "criterion": described(criterion), "seed": seed}
        paths = {ratio: cell_path(self.folder, name, {**depends, "ratio": ratio}) for ratio in ratios}
        kept = {ratio: read_cell(path) for ratio, path in paths.items()}
        scored: tuple[ChannelGraph, Scores] | str = ""
        if None in kept.values():
            try:
                scored = self.runner.score(self.task, criterion, batches=self.settings["score_batches"], seed=seed)
            except PruningError as error:
                scored = str(error)
        for ratio, cell in kept.items():
            if cell is not None:
                yield cell
            elif isinstance(scored, str):
                yield Refusal(name, ratio, scored)
            else:
                try:
                    cell = self.compute(name, ratio, seed, *scored)
                except PruningError as error:
                    yield Refusal(name, ratio, str(error))
                else:
                    write_kept(paths[ratio], cell, self.settings)
                    yield cell

    def compute(self, name: str, ratio: float, seed: int, graph: ChannelGraph, scores: Scores) -> Cell:
        """Prune, test, fine-tune, test."""
        settings, example = self.settings, self.task.example_input_array
        about = {"coupling": settings["coupling"], "model": self.task, "example_inputs": example}
        plan = SELECTIONS[settings["selection"]](ratio).select(graph, scores, **about)
        small = reconstruct(self.task, graph, plan, example_inputs=example)
        before = after = self.runner.test(small)[0]
        if settings["epochs"]:
            seed_everything(seed, verbose=False)
            self.runner.fit(small, settings["epochs"], lr=settings["lr"])
            after = self.runner.test(small)[0]
        macs, params = count_flops(small, example), count_params(small)
        return Cell(name, ratio, seed, before, after, macs, params, plan.ratio)
