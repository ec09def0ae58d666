"""What a reproduction consists of: a cell for every row and seed, a file each; dense models are trained once."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pytorch_lightning import Callback, LightningDataModule, LightningModule, seed_everything

from lightning_prune.callbacks import RandomStateCallback
from lightning_prune.errors import ConfigurationError, PruningError
from lightning_prune.experiments.comparison.cells import named_path, read_kept, write_kept
from lightning_prune.experiments.reproduce.building import built, built_task
from lightning_prune.experiments.reproduce.history import BestEpoch, Curve, KeepEpochs
from lightning_prune.experiments.reproduce.plain_data import DATA, in_folder
from lightning_prune.experiments.reproduce.recipe import Pruning, Recipe, Row, Scale, Training
from lightning_prune.experiments.runner import Runner
from lightning_prune.files import atomic
from lightning_prune.measure import count_flops, count_params
from lightning_prune.reconstruction.checkpoint import load_dense


@dataclass(frozen=True)
class Cell:
    """One row from one seed.

    Attributes:
        row: its label.
        seed: of everything random.
        values: numbers by column, in the units that the columns show.
        curve: one entry per epoch of its training: times, losses, the metric.
        more: what pictures need: plain data.
        seconds: that it took.
    """

    row: str
    seed: int
    values: dict[str, float]
    curve: list[dict[str, Any]] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


class DenseModel(NamedTuple):
    """A trained dense model: the file of its weights, and what was measured of it."""

    weights: Path
    cell: Cell


Progress = Callable[[str, dict[str, Any]], None]


class Trained(NamedTuple):
    """What a training left: one row per epoch, and the seconds that processes before this one, killed, took for it."""

    curve: list[dict[str, Any]]
    earlier: float


class Study:
    """One recipe at one scale: what its cells share.

    Args:
        recipe: what is reproduced.
        scale: how much of it.
        output: folder for cells and weights.
        folder: that --data named.
        progress: show progress bars.
        on_progress: called after every epoch, or round, with what is trained and what came out: plain numbers.
    """

    def __init__(
        self,
        recipe: Recipe,
        scale: Scale,
        output: Path,
        folder: str | None,
        *,
        progress: bool = False,
        on_progress: Progress | None = None,
    ) -> None:
        self.recipe = recipe
        self.scale = scale
        self.output = output
        self.data_spec = _placed(scale.data, folder, recipe.name)
        self.metric = recipe.metrics[0]
        self.progress = progress
        self.on_progress = on_progress

    @property
    def where(self) -> str:
        """For errors."""
        return f"recipe {self.recipe.name}"

    @cached_property
    def data(self) -> LightningDataModule:
        """The data of the scale.

        Raises:
            DataError: they are not there.
        """
        data: LightningDataModule = built(LightningDataModule, self.data_spec, f"{self.where}, data")
        data.prepare_data()
        data.setup("fit")
        return data

    @cached_property
    def runner(self) -> Runner:
        """What trains and tests on them."""
        return Runner(self.data, self.metric, self.progress)

    def model_spec(self, model: str) -> Mapping[str, Any]:
        """What is trained under a model's name: the stand-in, or the published one."""
        return self.scale.models.get(model, self.recipe.models[model])

    def pruning(self, row: Row) -> Pruning:
        """How a row is pruned here."""
        return self.recipe.pruning(row, self.scale)

    def training(self, stage: str) -> Training:
        """The training of a stage, ``dense`` or ``tune``."""
        found: Training | None = getattr(self.scale, stage)
        if found is None:
            raise ConfigurationError(f"{self.where}: the scale says nothing of {stage!r} training")
        return found

    def trainer(self, stage: str) -> Runner:
        """What trains at a stage, in its precision."""
        return replace(self.runner, precision=self.training(stage).precision)

    def task(self, model: str, stage: str, weights: Path | None = None) -> LightningModule:
        """A task as it is trained at a stage, with fresh weights or those of a dense model."""
        assert self.scale.task is not None
        task = built_task(self.scale.task, self.model_spec(model), self.training(stage), f"{self.where}, {model}")
        if weights is not None:
            load_dense(weights, task)
        return task

    def path(self, name: str, seed: int, depends: Mapping[str, Any]) -> Path:
        """The file of a cell."""
        return named_path(self.output, f"{name}-seed{seed}", {**depends, "seed": seed})

    def depends(self, model: str, **more: Any) -> dict[str, Any]:
        """What all cells of a model depend on."""
        scale = self.scale
        shared = {"kind": self.recipe.kind, "model": self.model_spec(model), "data": self.data_spec, "task": scale.task}
        trained = None if scale.dense is None else asdict(scale.dense)
        return {**shared, "dense": trained, "choose": scale.choose, "metrics": list(self.recipe.metrics), **more}

    def row_path(self, row: Row, seed: int) -> Path:
        """The file of a row's cell."""
        tune = None if self.scale.tune is None else asdict(self.scale.tune)
        how = {"prune": asdict(self.pruning(row)), "tune": tune, "options": dict(self.scale.options)}
        return self.path(row.label, seed, self.depends(row.model, **how))

    def dense(self, model: str, seed: int) -> DenseModel:
        """The dense model of a seed, trained now or found from an earlier run."""
        path = self.path(f"dense-{model}", seed, self.depends(model))
        weights = self.output / f"{path.stem}.ckpt"
        cell = read_kept(path, Cell)
        if cell is None or not weights.is_file():
            started = time.perf_counter()
            seed_everything(seed, verbose=False)
            task = self.task(model, "dense")
            curve, earlier = self.fit(task, "dense", path)
            with atomic(weights) as stream:
                torch.save({"state_dict": task.state_dict()}, stream)
            values, more = self.measured(task)
            cell = Cell(f"dense {model}", seed, values, curve, more, time.perf_counter() - started + earlier)
            self.write(path, cell)
        return DenseModel(weights, cell)

    def fit(self, task: LightningModule, stage: str, path: Path, callbacks: Sequence[Callback] = ()) -> Trained:
        """Train in place, for the cell of this path; a training that was killed goes on after its last whole epoch."""
        training, monitor, kept = self.training(stage), f"val_{self.metric}", partial_path(path)
        curve = Curve(monitor, partial(self.tell, path))
        best = [BestEpoch(monitor)] if self.scale.choose == "best" else []
        callbacks = [curve, *best, *callbacks, RandomStateCallback(), KeepEpochs(kept)]
        task.to(memory_format=torch.channels_last)  # a third faster on CPUs
        self.trainer(stage).fit(task, training.epochs, callbacks, checkpoint=kept)
        task.to(memory_format=torch.contiguous_format)  # as the dense one is timed
        return Trained(curve.rows, curve.earlier)

    def measured(self, task: LightningModule, dense: Cell | None = None) -> tuple[dict[str, float], dict[str, Any]]:
        """What a model costs and reaches, compared with the dense one; and its ROC curves where it has some."""
        example = task.example_input_array
        assert example is not None
        values: dict[str, float] = {"flops": count_flops(task, example[:1], "paper"), "params": count_params(task)}
        values |= self.reached(task)
        if dense is not None:
            values["left"] = 100 * values["flops"] / dense.values["flops"]
            values["params_left"] = 100 * values["params"] / dense.values["params"]
            values["change"] = values[self.metric] - dense.values[self.metric]
        roc = getattr(task, "test_roc", None)
        if roc is None or "roc" not in self.recipe.pictures:
            return values, {}
        names = getattr(self.data, "class_names", None) or range(len(roc.auc))
        return values, {"roc": _thinned(roc), "classes": [str(name) for name in names]}

    def reached(self, task: LightningModule) -> dict[str, float]:
        """Metrics on the test part, in per cent."""
        _, results = self.runner.results(task)
        if missing := [name for name in self.recipe.metrics if name not in results]:
            raise PruningError(f"{type(task).__name__} logs no {missing[0]!r}; it logs {', '.join(results)}")
        found = {name: 100 * results[name] for name in self.recipe.metrics}
        return {**found, "error": 100 - found["acc"]} if self.metric == "acc" else found

    def tell(self, path: Path, values: dict[str, Any]) -> None:
        """Say how far the cell of this path is."""
        if self.on_progress is not None:
            self.on_progress(path.stem.rpartition("-")[0], values)  # without the digest

    def write(self, path: Path, cell: Cell) -> None:
        """Keep a cell, with where it was computed, instead of what a kill would have needed."""
        write_kept(path, cell, machine())
        partial_path(path).unlink(missing_ok=True)


def partial_path(path: Path) -> Path:
    """The file from which a cell that a kill interrupted goes on."""
    return path.with_suffix(".ckpt")


def machine() -> dict[str, Any]:
    """Where and with what something was computed."""
    return {
        "machine": f"{platform.machine()} {platform.system()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": version("pytorch-lightning"),
        "lightning-prune": version("lightning-prune"),
    }


def _placed(spec: Any, folder: str | None, name: str) -> Any:
    """The data's settings with the folder of --data in its place; "data" where they are downloaded."""
    if spec is None or DATA not in str(spec):
        return spec
    if folder is None and not spec.get("init_args", {}).get("download"):
        raise ConfigurationError(
            f"{name} at this scale needs data of yours: say with --data where {_needed(spec)} lies"
        )
    return in_folder(spec, folder or "data")


def _needed(spec: Any) -> str:
    paths = [value for value in spec.get("init_args", {}).values() if isinstance(value, str) and DATA in value]
    return ", ".join(path.removeprefix(DATA).strip("/") or "the data set" for path in paths)


def _thinned(roc: Any, points: int = 200) -> dict[str, Any]:
    """ROC curves in a few points each."""

    def some(rows: Sequence[torch.Tensor]) -> list[list[float]]:
        places = [torch.linspace(0, len(row) - 1, min(points, len(row))).round().long() for row in rows]
        return [row[place].tolist() for row, place in zip(rows, places, strict=True)]

    return {"fpr": some(roc.fpr), "tpr": some(roc.tpr), "auc": roc.auc.tolist()}
