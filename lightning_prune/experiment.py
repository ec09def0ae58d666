"""Train, prune and fine-tune in both orders, and report them side by side."""

from __future__ import annotations

import copy
import logging
import platform
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from pytorch_lightning.callbacks import RichProgressBar
from rich.console import Console
from torch import Tensor

from lightning_prune.callbacks import EpochTimer, PruneCallback
from lightning_prune.checkpoint import save
from lightning_prune.criteria import Criterion
from lightning_prune.equivalence import check_lossless
from lightning_prune.graph import ChannelGraph
from lightning_prune.masking import mask_
from lightning_prune.measurement import (
    Latency,
    compare_latency,
    count_params,
    flops_by_convention,
    state_size,
)
from lightning_prune.plan import Coupling, Plan
from lightning_prune.reconstruction import reconstruct
from lightning_prune.report import (
    DENSE,
    FINE_TUNED,
    MASKED,
    RECONSTRUCTED,
    LayerChannels,
    Losslessness,
    OrderTiming,
    PruneReport,
    StageResult,
)
from lightning_prune.selection import GlobalRatio, Selection

ORDERS = {"A": "mask, fine-tune, reconstruct", "B": "mask, reconstruct, fine-tune"}


@dataclass(frozen=True)
class FineTuned:
    """One order: the pruned and fine-tuned task, and the callback that pruned it."""

    task: LightningModule
    callback: PruneCallback
    timing: OrderTiming
    eval_seconds: float
    accuracy: float


def compare_orders(
    task: LightningModule,
    data: LightningDataModule,
    criterion: Criterion,
    *,
    title: str = "Pruning experiment",
    ratio: float = 0.5,
    selection: Selection | None = None,
    coupling: Coupling = "joint",
    dense_epochs: int = 10,
    finetune_epochs: int = 5,
    finetune_lr: float | None = None,
    metric: str = "acc",
    seed: int = 0,
    latency_repeats: int = 30,
    output: str = "runs/experiment",
    progress: bool = True,
) -> PruneReport:
    """Train a dense model, then prune and fine-tune it twice from the same weights and seed.

    Order A masks, fine-tunes and reconstructs at the end; order B reconstructs first and fine-tunes the small model
    (Lee et al., Sensors 23(4):2102, 2023, Figure 6). Writes the pruned checkpoint of order B to ``output/pruned.pt``.

    Args:
        task: what to train; knows nothing of pruning. Logs ``val_{metric}`` and ``test_{metric}``.
        data: batches whose first entry the task's forward takes.
        criterion: how channels are scored.
        title: of the report.
        ratio: share of channels removed over the network; ignored if ``selection`` is given.
        selection: for example ``LayerRatio(0.3)``.
        coupling: see `Selection.select`.
        dense_epochs: of training before pruning.
        finetune_epochs: in either order.
        finetune_lr: first learning rate of fine-tuning; None: the task's own.
        metric: name of the logged metric.
        seed: of everything random; both orders start from it.
        latency_repeats: passes timed per model, in turns.
        output: folder for the checkpoint.
        progress: show progress bars.

    Raises:
        PruningError: one of its kinds, naming the cause.
    """
    run = _Run(data, metric, seed, progress)
    choice = selection if selection is not None else GlobalRatio(ratio)
    with quiet():
        run.say("Training the dense model", dense_epochs)
        seed_everything(seed, verbose=False)
        dense_timer = EpochTimer(f"val_{metric}")
        run.fit(task, dense_epochs, [dense_timer])
        dense_accuracy, dense_eval = run.test(task)

        tuned = {}
        for order, steps in ORDERS.items():
            run.say(f"Order {order}: {steps}", finetune_epochs)
            tuned[order] = run.fine_tune(order, task, criterion, choice, coupling, finetune_epochs, finetune_lr)
        run.say("Measuring")
        graph, plan = tuned["B"].callback.scoring.graph, tuned["B"].callback.masking.plan
        assert graph is not None
        assert plan is not None
        masked, small = copy.deepcopy(task), reconstruct(task, graph, plan)
        mask_(masked, graph, plan)
        lossless = run.compare(masked, small)
        models: dict[str, LightningModule] = {DENSE: task, MASKED: masked, RECONSTRUCTED: small}
        models |= {FINE_TUNED[order]: tuned[order].task for order in tuned}
        measured = {
            DENSE: (dense_accuracy, OrderTiming("A", tuple(dense_timer.records)).epoch_seconds, dense_eval),
            MASKED: (run.test(masked)[0], None, None),
            RECONSTRUCTED: (run.test(small)[0], None, None),
            **{FINE_TUNED[o]: (t.accuracy, t.timing.epoch_seconds, t.eval_seconds) for o, t in tuned.items()},
        }
        stages = _stages(models, measured, latency_repeats, metric)
    save(Path(output) / "pruned.pt", tuned["B"].task, plan, accuracy=tuned["B"].accuracy)
    return PruneReport(
        title,
        _settings(criterion, choice, plan, seed, dense_epochs, finetune_epochs),
        stages,
        tuple(tuned[order].timing for order in tuned),
        _layers(graph, plan),
        lossless,
        _notes(coupling),
        convention="paper",
    )


class _Run:
    """What every phase of an experiment shares."""

    def __init__(self, data: LightningDataModule, metric: str, seed: int, progress: bool) -> None:
        self.data = data
        self.metric = metric
        self.seed = seed
        self.progress = progress
        self.console = Console()

    def say(self, what: str, epochs: int | None = None) -> None:
        """Announce a phase."""
        self.console.rule(f"[bold]{what}[/bold]" + (f"  {epochs} epochs" if epochs else ""), align="left")

    def trainer(self, epochs: int, callbacks: list[Callback]) -> Trainer:
        bars: list[Callback] = [RichProgressBar(leave=False)] if self.progress else []
        return Trainer(
            max_epochs=epochs,
            callbacks=[*callbacks, *bars],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=self.progress,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )

    def fit(self, task: LightningModule, epochs: int, callbacks: list[Callback]) -> None:
        self.trainer(epochs, callbacks).fit(task, self.data)

    def test(self, task: LightningModule) -> tuple[float, float]:
        """(metric on the test part, seconds)."""
        started = time.perf_counter()
        results = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False).test(
            task, self.data, verbose=False
        )
        return float(results[0][f"test_{self.metric}"]), time.perf_counter() - started

    def fine_tune(
        self,
        order: str,
        dense: LightningModule,
        criterion: Criterion,
        selection: Selection,
        coupling: Coupling,
        epochs: int,
        lr: float | None,
    ) -> FineTuned:
        """Prune a copy of the dense task inside a fit of its own."""
        task = copy.deepcopy(dense)
        prune = PruneCallback(
            criterion,
            selection=selection,
            coupling=coupling,
            reconstruct="after" if order == "A" else "before",
            monitor=f"val_{self.metric}",
        )
        seed_everything(self.seed + 1, verbose=False)  # both orders see the same batches
        self.fit(task, epochs, [prune, *([] if lr is None else [_LearningRate(lr)])])
        accuracy, seconds = self.test(task)
        assert prune.reconstruction is not None
        self.console.print(
            f"order {order}: test {self.metric} {accuracy:.2%}, {count_params(task):,} parameters",
            highlight=False,
        )
        timing = OrderTiming(order, tuple(prune.reconstruction.records))
        return FineTuned(task, prune, timing, seconds, accuracy)

    @torch.no_grad()
    def compare(self, masked: LightningModule, small: LightningModule) -> Losslessness:
        """Masked against reconstructed: float64 outputs of one test batch, predicted classes of all."""
        masked.eval()
        small.eval()
        inputs: list[Tensor] = [batch[0] for batch in self.data.test_dataloader()]
        report = check_lossless(masked, small, inputs[0])
        changed = sum(int((masked(x).argmax(1) != small(x).argmax(1)).sum()) for x in inputs)
        return Losslessness(
            report.max_abs_error,
            report.max_rel_error,
            report.dtype,
            report.passed,
            changed,
            sum(map(len, inputs)),
        )


class _LearningRate(Callback):
    """Start a fit from another learning rate than the task's own; its schedule keeps its shape."""

    def __init__(self, lr: float) -> None:
        self.lr = lr

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] = self.lr
        for config in trainer.lr_scheduler_configs:
            config.scheduler.base_lrs = [self.lr] * len(config.scheduler.base_lrs)


def _stages(
    models: dict[str, LightningModule],
    measured: dict[str, tuple[float, float | None, float | None]],
    repeats: int,
    metric: str,
) -> tuple[StageResult, ...]:
    inputs = {name: model.example_input_array[:1] for name, model in models.items()}  # type: ignore[index]
    latency: dict[str, Latency] = compare_latency(
        {name: (model, inputs[name]) for name, model in models.items()}, warmup=5, repeats=repeats
    )
    stages = []
    for name, model in models.items():
        accuracy, epoch_seconds, eval_seconds = measured[name]
        stages.append(
            StageResult(
                name,
                accuracy,
                "accuracy" if metric == "acc" else metric,
                count_params(model),
                dict(flops_by_convention(model, inputs[name])),
                latency[name].median,
                latency[name].iqr,
                epoch_seconds,
                eval_seconds,
                state_size(model),
            )
        )
    return tuple(stages)


def _layers(graph: ChannelGraph, plan: Plan) -> tuple[LayerChannels, ...]:
    place = {tensor: number for number, tensor in enumerate(graph.shapes)}
    found = []
    for group in graph.groups:
        kept = plan.groups.get(group.name)
        for layer in group.layers:
            count = layer.filters if kept is None else len(kept.keep) * layer.index.shape[1]
            name = layer.name.removeprefix("model.")
            found.append((place[layer.weight], LayerChannels(name, layer.filters, count, group.name)))
    return tuple(channels for _, channels in sorted(found, key=itemgetter(0)))


def _settings(
    criterion: Criterion, selection: Selection, plan: Plan, seed: int, dense_epochs: int, finetune_epochs: int
) -> dict[str, Any]:
    return {
        "criterion": repr(criterion),
        "selection": repr(selection),
        "coupling": plan.coupling,
        "channels removed": f"{plan.ratio:.1%} of those in prunable groups",
        "seed": seed,
        "epochs": f"{dense_epochs} dense, {finetune_epochs} fine-tuning",
        "torch": torch.__version__,
        "lightning": version("pytorch-lightning"),
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()} {platform.system()}, Python {platform.python_version()}",
    }


def _notes(coupling: Coupling) -> tuple[str, ...]:
    notes = [
        "Both orders start from the same dense weights, seed and batches; training time excludes evaluation.",
        "FLOPs by the convention of Lee et al. (Sensors 23(4):2102): 2 x (multiply-accumulates + bias, batch-norm, "
        "activation and pooling elements). Latency: one image, models timed in turns.",
        "The masked model sets its zeros anew before every layer runs, which a single image feels and a training step "
        "does not.",
    ]
    if coupling == "joint":
        notes.append(
            "With joint coupling both orders compute the same in exact arithmetic; what differs is rounding, which "
            "training amplifies."
        )
    return tuple(notes)


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out what Lightning says about devices and loaders at every start."""
    logger = logging.getLogger("pytorch_lightning")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message="The number of training batches")
            warnings.filterwarnings("ignore", message="You defined a `validation_step` but have no")
            yield
    finally:
        logger.setLevel(level)
