"""Train, prune and fine-tune in both orders, and report them side by side."""

from __future__ import annotations

import copy
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from pytorch_lightning import LightningDataModule, LightningModule, seed_everything
from rich.console import Console
from torch import Tensor

from lightning_prune.callbacks import EpochTimerCallback, PruneCallback
from lightning_prune.criteria import Criterion
from lightning_prune.errors import PruningError
from lightning_prune.experiments.predictions import count_changed
from lightning_prune.experiments.runner import Precision, Runner, metric_name, quiet
from lightning_prune.files import atomic, check_writable
from lightning_prune.measure import (
    Latency,
    compare_latency,
    count_params,
    flops_by_convention,
    state_size,
)
from lightning_prune.plan import Coupling, Plan
from lightning_prune.reconstruction.checkpoint import load_dense, save
from lightning_prune.reconstruction.lossless import check_lossless
from lightning_prune.reconstruction.masks import mask_
from lightning_prune.reconstruction.small_model import reconstruct
from lightning_prune.report import (
    DENSE,
    FINE_TUNED,
    MASKED,
    RECONSTRUCTED,
    Losslessness,
    OrderTiming,
    Predictions,
    PruneReport,
    StageResult,
)
from lightning_prune.report.tracking import layer_channels
from lightning_prune.selection import GlobalRatio, Selection
from lightning_prune.tasks.drawing import jpeg

Order = Literal["A", "B"]
ORDERS: dict[Order, str] = {"A": "mask, fine-tune, reconstruct", "B": "mask, reconstruct, fine-tune"}
DRAWN_IMAGES = 4


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
    dense: str | None = None,
    dense_epochs: int = 10,
    finetune_epochs: int = 5,
    finetune_lr: float | None = None,
    orders: Sequence[Order] = ("A", "B"),
    metric: str = "acc",
    precision: Precision = "32-true",
    seed: int = 0,
    latency_repeats: int = 30,
    output: str = "runs/experiment",
    progress: bool = True,
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
        output: folder for the checkpoint.
        progress: show progress bars.

    Raises:
        PruningError: one of its kinds, naming the cause.
    """
    if not orders or len(set(orders)) < len(orders) or not set(orders) <= set(ORDERS):
        raise PruningError(f"orders must be A, B or both, each once, got {list(orders)}")
    check_writable(Path(output) / "pruned.pt")
    run = _Run(data, metric, seed, progress, precision)
    choice = selection if selection is not None else GlobalRatio(ratio)
    with quiet():
        seed_everything(seed, verbose=False)
        dense_timer = EpochTimerCallback(f"val_{metric}")
        if dense is not None:
            run.say(f"Dense model: {dense}")
            load_dense(dense, task)
        else:
            run.say("Training the dense model", dense_epochs)
            run.fit(task, dense_epochs, [dense_timer])
            with atomic(Path(output) / "dense.pt") as stream:
                torch.save(task.state_dict(), stream)
        dense_validation = run.validate(task)
        dense_accuracy, dense_eval = run.test(task)

        tuned = {}
        for order in orders:
            run.say(f"Order {order}: {ORDERS[order]}", finetune_epochs)
            tuned[order] = run.fine_tune(order, task, criterion, choice, coupling, finetune_epochs, finetune_lr)
        last = tuned[orders[-1]]
        run.say("Measuring")
        graph, plan = last.callback.scoring.dense_graph, last.callback.masking.plan
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
        stages = _stages(models, measured, latency_repeats, metric_name(metric))
        shown = (DENSE, RECONSTRUCTED, FINE_TUNED[orders[-1]])
        predictions = run.draw({name: models[name] for name in shown})
    save(Path(output) / "pruned.pt", last.task, plan, accuracy=last.accuracy)
    return PruneReport(
        title,
        _settings(criterion, choice, plan, seed, None if dense else dense_epochs, finetune_epochs, precision),
        stages,
        tuple(tuned[order].timing for order in tuned),
        layer_channels(graph, plan, prefix="model."),
        lossless,
        _notes(coupling, orders),
        convention="paper",
        predictions=predictions,
        dense_validation=dense_validation,
    )


class _Run(Runner):
    """What every phase of an experiment shares."""

    def __init__(self, data: LightningDataModule, metric: str, seed: int, progress: bool, precision: Precision) -> None:
        super().__init__(data, metric, progress, precision)
        self.seed = seed
        self.console = Console()

    def say(self, what: str, epochs: int | None = None) -> None:
        """Announce a phase."""
        self.console.rule(f"[bold]{what}[/bold]" + (f"  {epochs} epochs" if epochs else ""), align="left")

    def fine_tune(
        self,
        order: Order,
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
        self.fit(task, epochs, [prune], lr)
        accuracy, seconds = self.test(task)
        assert prune.reconstruction is not None
        reached = f"{metric_name(self.metric)} {accuracy:.2%}"
        self.console.print(f"order {order}: test {reached}, {count_params(task):,} parameters", highlight=False)
        timing = OrderTiming(order, tuple(prune.reconstruction.records))
        return FineTuned(task, prune, timing, seconds, accuracy)

    def compare(self, masked: LightningModule, small: LightningModule) -> Losslessness:
        """Masked against reconstructed: outputs of one batch and predictions on the whole test part, in float64."""
        images = next(iter(self.data.test_dataloader()))[0]
        example = small.example_input_array
        # A detector may take its images in another form than the data have.
        inputs = images if isinstance(images, Tensor) and _alike(images, example) else example
        report = check_lossless(masked, small, inputs)
        pairs = zip(self.predict(masked), self.predict(small), strict=True)
        counts = [count_changed(before, after) for before, after in pairs]
        return Losslessness(
            report.max_abs_error,
            report.max_rel_error,
            report.dtype,
            report.passed,
            sum(changed for changed, _ in counts),
            sum(total for _, total in counts),
        )

    def draw(self, models: dict[str, LightningModule]) -> tuple[Predictions, ...]:
        """A few test images with what is true and what each model finds; none if the task does not draw."""
        draw: dict[str, Any] = {name: getattr(model, "draw_predictions", None) for name, model in models.items()}
        if None in draw.values():
            return ()
        batch = next(iter(self.data.test_dataloader()))
        drawn = {"truth": next(iter(draw.values()))(batch)}
        for name, model in models.items():
            drawn[name] = draw[name](batch, self.predict(model, 1)[0])
        return tuple(Predictions(name, tuple(map(jpeg, images[:DRAWN_IMAGES]))) for name, images in drawn.items())


def _alike(images: Tensor, example: object) -> bool:
    return isinstance(example, Tensor) and images.shape[1:] == example.shape[1:]


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
                metric,
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


def _settings(
    criterion: Criterion,
    selection: Selection,
    plan: Plan,
    seed: int,
    dense_epochs: int | None,
    finetune_epochs: int,
    precision: Precision,
) -> dict[str, Any]:
    return {
        "criterion": repr(criterion),
        "selection": repr(selection),
        "coupling": plan.coupling,
        "channels removed": f"{plan.ratio:.1%} of those in prunable groups",
        "seed": seed,
        "epochs": ("" if dense_epochs is None else f"{dense_epochs} dense, ") + f"{finetune_epochs} fine-tuning",
        "precision": precision,
        "torch": torch.__version__,
        "lightning": version("pytorch-lightning"),
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()} {platform.system()}, Python {platform.python_version()}",
    }


def _notes(coupling: Coupling, orders: Sequence[Order]) -> tuple[str, ...]:
    notes = [
        *(["Both orders start from the same dense weights, seed and batches."] if len(orders) > 1 else []),
        "Training time excludes evaluation.",
        "FLOPs by the convention of Lee et al. (Sensors 23(4):2102): 2 x (multiply-accumulates + bias, batch-norm, "
        "activation and pooling elements). Latency: one image, models timed in turns.",
        "The masked model sets its zeros anew before every layer runs, which a single image feels and a training step "
        "does not.",
    ]
    if coupling == "joint" and len(orders) > 1:
        notes.append(
            "With joint coupling both orders compute the same in exact arithmetic; what differs is rounding, which "
            "training amplifies."
        )
    return tuple(notes)
