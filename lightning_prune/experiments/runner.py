"""Fits and tests of a task that leave nothing behind: no logger, no checkpoints, one device."""

from __future__ import annotations

import itertools
import logging
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from pytorch_lightning.callbacks import LambdaCallback, RichProgressBar
from pytorch_lightning.utilities.model_helpers import is_overridden

from lightning_prune.callbacks import ScoringCallback
from lightning_prune.criteria import Criterion
from lightning_prune.criteria.scores import Scores
from lightning_prune.errors import PruningError
from lightning_prune.graph import ChannelGraph
from lightning_prune.model_state.copying import copied

SHOWN = ("miou", "map", "acc")  # the metric, where none is named: the first of these that is logged
METRICS = {"acc": "accuracy", "miou": "mIoU", "map": "mAP", "map_50": "mAP50"}
Precision = Literal["32-true", "16-mixed", "bf16-mixed"]


@dataclass(frozen=True)
class Runner:
    """Trains, scores and tests tasks on the same data."""

    data: LightningDataModule
    metric: str = "acc"  # logged as test_acc and val_acc
    progress: bool = False
    precision: Precision = "32-true"  # of training; tests are always in float32
    accelerator: str = "auto"

    def fit(
        self,
        task: LightningModule,
        epochs: int,
        callbacks: Sequence[Callback] = (),
        lr: float | None = None,
        *,
        max_steps: int = -1,
        checkpoint: Path | None = None,
    ) -> None:
        """Train in place, from ``lr`` or the task's own; 0 steps run what callbacks do before training, and no more.

        Where there is a ``checkpoint`` already, the fit that wrote it goes on.
        """
        rate = [] if lr is None else [_learning_rate(lr)]
        bars = [RichProgressBar(leave=False)] if self.progress else []
        with self._trainer(
            task,
            max_epochs=epochs,
            max_steps=max_steps,
            precision=self.precision,
            callbacks=[*callbacks, *rate, *bars],
            enable_progress_bar=self.progress,
        ) as trainer:
            trainer.fit(task, self.data, ckpt_path=checkpoint if checkpoint and checkpoint.is_file() else None)

    def score(
        self,
        task: LightningModule,
        criterion: Criterion,
        *,
        batches: int | None = None,
        seed: int = 0,
        example_inputs: Any = None,
        statistics: bool = False,
    ) -> tuple[ChannelGraph, Scores]:
        """Trace a task, left as it is, and score it on its training data, as a fit does before its first step."""
        seed_everything(seed, verbose=False)
        scoring = ScoringCallback(
            criterion, score_batches=batches, example_inputs=example_inputs, statistics=statistics
        )
        self.fit(copied(task).train(), 1, [scoring], max_steps=0)
        assert scoring.dense_graph is not None
        assert scoring.scores is not None
        return scoring.dense_graph, scoring.scores

    def test(self, task: LightningModule) -> tuple[float, float]:
        """(metric on the test part, seconds)."""
        started = time.perf_counter()
        with self._trainer(task) as trainer:
            results = trainer.test(task, self.data, verbose=False)[0]
        name = f"test_{self.metric}"
        if name not in results:
            raise PruningError(f"{type(task).__name__} logs no {name!r} in test_step; it logs {', '.join(results)}")
        return float(results[name]), time.perf_counter() - started

    def results(self, task: LightningModule) -> tuple[str, dict[str, float]]:
        """All that is logged on the test part, or on the validation part where there is no test; and which it was."""
        stage = self._stage(task)
        with self._trainer(task) as trainer:
            run = trainer.test if stage == "test" else trainer.validate
            results = run(task, self.data, verbose=False)
        return stage, {name.removeprefix(f"{stage}_"): float(value) for name, value in (results or [{}])[0].items()}

    def see_training_data(self, task: LightningModule, batches: int, seed: int = 0) -> None:
        """Run the step that `results` measures by on some batches of the training data."""
        stage, data = self._stage(task), self.data
        if not is_overridden("train_dataloader", data, LightningDataModule):
            raise PruningError(f"{type(data).__name__} has no training data")

        def train_batches() -> Any:
            data.setup("fit")
            return data.train_dataloader()

        seed_everything(seed, verbose=False)
        limits: dict[str, Any] = {f"limit_{stage}_batches": batches}
        with self._trainer(task, **limits) as trainer, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*sampler has shuffling enabled")
            name = f"{stage}_dataloader"
            before = vars(data).get(name)
            setattr(data, name, train_batches)
            try:
                (trainer.test if stage == "test" else trainer.validate)(task, data, verbose=False)
            finally:
                vars(data).pop(name)
                if before is not None:
                    setattr(data, name, before)

    def _stage(self, task: LightningModule) -> Literal["test", "val"]:
        steps: dict[Literal["test", "val"], str] = {"test": "test_step", "val": "validation_step"}
        for stage, step in steps.items():
            loaded = is_overridden(f"{stage}_dataloader", self.data, LightningDataModule)
            if loaded and is_overridden(step, task, LightningModule):
                return stage
        raise PruningError(
            f"{type(task).__name__} and {type(self.data).__name__} measure nothing together: neither test_step with "
            "test_dataloader, nor validation_step with val_dataloader"
        )

    def validate(self, task: LightningModule) -> float | None:
        """The metric on the validation part; None if there is none."""
        loaded = is_overridden("val_dataloader", self.data, LightningDataModule)
        if not loaded or not is_overridden("validation_step", task, LightningModule):
            return None
        return self.validated(task).get(self.metric)

    def validated(self, task: LightningModule, batches: int | None = None) -> dict[str, float]:
        """All that is logged on the validation part, or on its first batches."""
        with self._trainer(task, limit_val_batches=batches) as trainer:
            results = trainer.validate(task, self.data, verbose=False)
        return {name.removeprefix("val_"): float(value) for name, value in (results or [{}])[0].items()}

    def predict(self, task: LightningModule, batches: int | None = None) -> list[Any]:
        """What ``predict_step`` gives for batches of the test part, in float64; forward's results without one."""
        exact = copied(task).double().eval()
        if is_overridden("predict_step", exact, LightningModule):
            with self._trainer(exact, precision="64-true", limit_predict_batches=batches) as trainer:
                return trainer.predict(exact, self.data.test_dataloader()) or []
        with torch.no_grad():
            return [exact(batch[0].double()) for batch in itertools.islice(self.data.test_dataloader(), batches)]

    @contextmanager
    def _trainer(self, task: LightningModule, **options: Any) -> Iterator[Trainer]:
        """Let go of the Trainer afterwards: a copy of the task may reach the data, and through it all tasks before."""
        settings: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        settings |= {"enable_model_summary": False, "num_sanity_val_steps": 0, **options}
        try:
            yield Trainer(devices=1, accelerator=self.accelerator, **settings)
        finally:
            task.trainer = None
            self.data.trainer = None


def _learning_rate(lr: float) -> Callback:
    """Start a fit from another learning rate than the task's own; its schedule keeps its shape."""

    def set_(trainer: Trainer, task: LightningModule) -> None:  # noqa: ARG001
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] = lr
        for config in trainer.lr_scheduler_configs:
            config.scheduler.base_lrs = [lr] * len(config.scheduler.base_lrs)

    return LambdaCallback(on_fit_start=set_)


def logged_metric(task: LightningModule, wanted: str | None, logged: Mapping[str, float], stage: str) -> str:
    """The metric that is meant, by its name without the stage: of those that are logged."""
    names = (*SHOWN, *METRICS) if wanted is None else (wanted,)
    for name in names:
        if name in logged:
            return name
    asked = f"no '{stage}_{wanted}'" if wanted else f"none of {', '.join(f'{stage}_{name}' for name in SHOWN)}"
    known = ", ".join(f"{stage}_{name}" for name in logged) or "nothing"
    raise PruningError(f"{type(task).__name__} logs {asked}; it logs {known}: name a metric")


def metric_name(metric: str) -> str:
    """What readers call a logged metric."""
    return METRICS.get(metric, metric)


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out what Lightning says about devices, seeds and loaders at every start."""
    levels = {logger: logger.level for logger in map(logging.getLogger, ("pytorch_lightning", "lightning_fabric"))}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message="The number of training batches")
            warnings.filterwarnings("ignore", message="You defined a `validation_step` but have no")
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
