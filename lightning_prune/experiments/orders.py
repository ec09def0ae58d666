"""Train, prune and fine-tune in both orders, and report them side by side."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pytorch_lightning import LightningDataModule, LightningModule, seed_everything
from rich.console import Console

from lightning_prune.callbacks import EpochTimerCallback, PruneCallback
from lightning_prune.criteria import Criterion
from lightning_prune.errors import PruningError
from lightning_prune.experiments.predictions import check_predictions, draw_predictions
from lightning_prune.experiments.runner import Precision, Runner, metric_name, quiet
from lightning_prune.files import atomic, check_writable
from lightning_prune.measure import compare_latency, count_params, flops_by_convention, state_size
from lightning_prune.model_state.copying import copied
from lightning_prune.plan import Coupling, Plan
from lightning_prune.reconstruction.checkpoint import load_dense, save
from lightning_prune.reconstruction.masks import mask_
from lightning_prune.reconstruction.small_model import reconstruct
from lightning_prune.report import DENSE, FINE_TUNED, MASKED, RECONSTRUCTED, OrderTiming, PruneReport, StageResult
from lightning_prune.report.tracking import layer_channels
from lightning_prune.selection import GlobalRatio, Selection
from lightning_prune.selection.base import check_ratio

Order = Literal["A", "B"]
ORDERS: dict[Order, str] = {"A": "mask, fine-tune, reconstruct", "B": "mask, reconstruct, fine-tune"}


@dataclass(frozen=True)
class OrderSettings:
    """How both orders are run: the options of ``lightning-prune experiment`` beside task, data and criterion.

    Args:
        title: of the report.
        ratio: share of channels removed over the network; ignored if ``selection`` is given.
        selection: for example ``LayerRatio(0.3)``.
        coupling: see `Selection.select`.
        dense: file with weights to start from, such as ``dense.pt`` of another run or a Lightning checkpoint; then
            no dense model is trained.
        dense_epochs: of training before pruning.
        finetune_epochs: in either order.
        finetune_lr: first learning rate of fine-tuning; None: the task's own.
        orders: "A", "B" or both.
        metric: name of the logged metric, a number from 0 to 1.
        precision: of training, as Lightning names it; the models are measured in float32.
        seed: of everything random; both orders start from it.
        latency_repeats: passes timed per model, in turns.
        output: folder for the checkpoints.
        progress: show progress bars.

    Raises:
        PruningError: no order, or one twice; a number that nothing can be done with.
    """

    title: str = "Pruning experiment"
    ratio: float = 0.5
    selection: Selection | None = None
    coupling: Coupling = "joint"
    dense: str | None = None
    dense_epochs: int = 10
    finetune_epochs: int = 5
    finetune_lr: float | None = None
    orders: Sequence[Order] = ("A", "B")
    metric: str = "acc"
    precision: Precision = "32-true"
    seed: int = 0
    latency_repeats: int = 30
    output: str = "runs/experiment"
    progress: bool = True

    def __post_init__(self) -> None:
        orders = self.orders
        if not orders or len(set(orders)) < len(orders) or not set(orders) <= set(ORDERS):
            raise PruningError(f"orders must be A, B or both, each once, got {list(orders)}")
        fewest = {"dense_epochs": self.dense is None, "finetune_epochs": 1, "latency_repeats": 1, "seed": 0}
        for name, least in fewest.items():
            if (value := getattr(self, name)) < least:
                raise PruningError(f"{name} must be at least {int(least)}, got {value}")
        if self.seed >= 2**32 - 1:  # fine-tuning begins with the next one
            raise PruningError(f"seed must be below {2**32 - 1}, got {self.seed}")
        if self.finetune_lr is not None and not 0 < self.finetune_lr < math.inf:
            raise PruningError(f"finetune_lr must be a number above 0, got {self.finetune_lr}")
        check_ratio(self.ratio)


class _Stage(NamedTuple):
    """One state of the model, and what was measured of it while it was trained and tested."""

    task: LightningModule
    accuracy: float
    training: OrderTiming = OrderTiming("A")
    eval_seconds: float | None = None


def compare_orders(
    task: LightningModule, data: LightningDataModule, criterion: Criterion, settings: OrderSettings | None = None
) -> PruneReport:
    """Train a dense model, then prune and fine-tune it twice from the same weights and seed.

    Order A masks, fine-tunes and reconstructs at the end; order B reconstructs first and fine-tunes the small model
    (Lee et al., Sensors 23(4):2102, 2023, Figure 6). Writes the dense weights to ``output/dense.pt`` and the pruned
    checkpoint of the last order to ``output/pruned.pt``. Where the task has ``draw_predictions``, as the package's
    segmentation and detection tasks do, the report shows what the models find in a few test images.

    Args:
        task: what to train; knows nothing of pruning. Logs ``val_{metric}`` and ``test_{metric}``.
        data: batches whose first entry the task's forward takes.
        criterion: how channels are scored.
        settings: everything else; None: the defaults.

    Raises:
        PruningError: one of its kinds, naming the cause.
    """
    settings = settings or OrderSettings()
    output, orders = Path(settings.output), settings.orders
    check_writable(output / "pruned.pt")
    runner = Runner(data, settings.metric, settings.progress, settings.precision)
    with quiet():
        dense = _dense_stage(runner, task, settings)
        dense_validation = runner.validate(task)
        tuned = {order: _prune_and_tune(runner, order, task, criterion, settings) for order in orders}
        last, pruning = tuned[orders[-1]]
        graph, plan = pruning.scoring.dense_graph, pruning.masking.plan
        assert graph is not None
        assert plan is not None
        _announce("Measuring")
        masked, small = copied(task), reconstruct(task, graph, plan)
        mask_(masked, graph, plan)
        lossless, changed = check_predictions(runner, masked, small)
        stages = {
            DENSE: dense,
            MASKED: _Stage(masked, runner.test(masked)[0]),
            RECONSTRUCTED: _Stage(small, runner.test(small)[0]),
            **{FINE_TUNED[order]: stage for order, (stage, _) in tuned.items()},
        }
        results = _measure(stages, settings)
        shown = (DENSE, RECONSTRUCTED, FINE_TUNED[orders[-1]])
        predictions = draw_predictions(runner, {name: stages[name].task for name in shown})
    save(output / "pruned.pt", last.task, plan, accuracy=last.accuracy)
    return PruneReport(
        settings.title,
        _described(criterion, plan, settings),
        results,
        tuple(stage.training for stage, _ in tuned.values()),
        layer_channels(graph, plan, prefix="model."),
        lossless,
        _notes(settings),
        convention="paper",
        predictions=predictions,
        dense_validation=dense_validation,
        changed_predictions=changed,
    )


def _announce(phase: str, epochs: int | None = None) -> None:
    Console().rule(f"[bold]{phase}[/bold]" + (f"  {epochs} epochs" if epochs else ""), align="left")


def _dense_stage(runner: Runner, task: LightningModule, settings: OrderSettings) -> _Stage:
    """Train the dense model in place, or load its weights."""
    seed_everything(settings.seed, verbose=False)
    timer = EpochTimerCallback(f"val_{settings.metric}")
    if settings.dense is not None:
        _announce(f"Dense model: {settings.dense}")
        load_dense(settings.dense, task)
    else:
        _announce("Training the dense model", settings.dense_epochs)
        runner.fit(task, settings.dense_epochs, [timer])
        with atomic(Path(settings.output) / "dense.pt") as stream:
            torch.save(task.state_dict(), stream)
    accuracy, eval_seconds = runner.test(task)
    return _Stage(task, accuracy, OrderTiming("A", tuple(timer.records)), eval_seconds)


def _prune_and_tune(
    runner: Runner, order: Order, dense: LightningModule, criterion: Criterion, settings: OrderSettings
) -> tuple[_Stage, PruneCallback]:
    """Prune a copy of the dense task inside a fit of its own."""
    _announce(f"Order {order}: {ORDERS[order]}", settings.finetune_epochs)
    task = copied(dense)
    prune = PruneCallback(
        criterion,
        selection=settings.selection or GlobalRatio(settings.ratio),
        coupling=settings.coupling,
        reconstruct="after" if order == "A" else "before",
        monitor=f"val_{settings.metric}",
    )
    seed_everything(settings.seed + 1, verbose=False)  # both orders see the same batches
    runner.fit(task, settings.finetune_epochs, [prune], settings.finetune_lr)
    accuracy, eval_seconds = runner.test(task)
    reached = f"{metric_name(settings.metric)} {accuracy:.2%}"
    Console().print(f"order {order}: test {reached}, {count_params(task):,} parameters", highlight=False)
    assert prune.reconstruction is not None
    return _Stage(task, accuracy, OrderTiming(order, tuple(prune.reconstruction.records)), eval_seconds), prune


def _measure(stages: dict[str, _Stage], settings: OrderSettings) -> tuple[StageResult, ...]:
    pairs = {name: (s.task, s.task.example_input_array[:1]) for name, s in stages.items()}  # type: ignore[index]
    latency = compare_latency(pairs, warmup=5, repeats=settings.latency_repeats)
    return tuple(
        StageResult(
            name,
            stage.accuracy,
            metric_name(settings.metric),
            count_params(stage.task),
            dict(flops_by_convention(*pairs[name])),
            latency[name].median,
            latency[name].iqr,
            stage.training.epoch_seconds,
            stage.eval_seconds,
            state_size(stage.task),
        )
        for name, stage in stages.items()
    )


def _described(criterion: Criterion, plan: Plan, settings: OrderSettings) -> dict[str, Any]:
    dense = "" if settings.dense else f"{settings.dense_epochs} dense, "
    return {
        "criterion": repr(criterion),
        "selection": repr(settings.selection or GlobalRatio(settings.ratio)),
        "coupling": plan.coupling,
        "channels removed": f"{plan.ratio:.1%} of those in prunable groups",
        "seed": settings.seed,
        "epochs": f"{dense}{settings.finetune_epochs} fine-tuning",
        "precision": settings.precision,
        "torch": torch.__version__,
        "lightning": version("pytorch-lightning"),
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()} {platform.system()}, Python {platform.python_version()}",
    }


def _notes(settings: OrderSettings) -> tuple[str, ...]:
    notes = [
        "Training time excludes evaluation.",
        "FLOPs by the convention of Lee et al. (Sensors 23(4):2102): 2 x (multiply-accumulates + bias, batch-norm, "
        "activation and pooling elements). Latency: one image, models timed in turns.",
    ]
    if len(settings.orders) > 1:
        notes.insert(0, "Both orders start from the same dense weights, seed and batches.")
        if settings.coupling == "joint":
            notes.append(
                "With joint coupling both orders compute the same in exact arithmetic; what differs is rounding, which "
                "training amplifies."
            )
    return tuple(notes)
