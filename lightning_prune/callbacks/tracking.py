"""What the Trainer's loggers are told about pruning."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from statistics import median
from typing import Any

from pytorch_lightning import LightningModule, Trainer

from lightning_prune.callbacks.loggers import Sink, sinks_of
from lightning_prune.callbacks.processes import failing_together
from lightning_prune.callbacks.run import RUNS, PruningRun, check_before_pruning
from lightning_prune.callbacks.timing import EpochTimerCallback
from lightning_prune.criteria.scores import Scores
from lightning_prune.errors import CallbackError
from lightning_prune.graph import ChannelGraph
from lightning_prune.measure import count_params, flops_by_convention, state_size
from lightning_prune.plan import Plan
from lightning_prune.reconstruction.checkpoint import save
from lightning_prune.report import DENSE, MASKED, RECONSTRUCTED, PruneReport, StageResult
from lightning_prune.report.figures import channels_figure
from lightning_prune.report.tracking import channels_table, layer_channels, scores_figure, share_removed, summary_table


class TrackingCallback(EpochTimerCallback):
    """Logs pruning to all of the Trainer's loggers.

    Scalars go to every logger after every epoch, and when the model has been masked or reconstructed: ``prune/params``,
    ``prune/macs`` and ``prune/flops`` (of the model as it is then; per sample, FLOPs are 2 x macs), ``prune/share`` (of
    prunable channels masked or gone), ``prune/round``, ``prune/lossless_error``, ``prune/reconstruction_seconds``,
    ``prune/epoch_seconds`` (training alone).

    `WandbLogger`, `TensorBoardLogger` and `CSVLogger` get the rest too, in their own kinds or as files in
    ``{log_dir}/prune``: ``prune/scores/{layer}`` (histograms; not CSV), ``prune/scores`` and ``prune/channels``
    (pictures), ``prune/channels_table``, ``prune/summary`` (tables), and the artifacts or files ``scores.pt``
    (`Scores.load`), ``plan.json`` (`Plan.load`) and ``pruned.pt`` (`lightning_prune.load`). docs/tracking.md has more.

    `PruneCallback` adds one. Without a logger, and in all processes but the first, it does nothing.

    Args:
        model: keep the reconstructed model with the run when fitting ends.

    Raises:
        CallbackError: after `PruneCallback` in the list, where the dense model cannot be measured any more; nothing
            scores; no example inputs.

    Example:
        >>> from lightning_prune import PruneCallback
        >>> callbacks = [TrackingCallback(model=False), PruneCallback("l1", ratio=0.5)]
    """

    def __init__(self, model: bool = True) -> None:
        super().__init__()
        self.model = model
        self._sinks: list[Sink] = []
        self._now: dict[str, float] = {}  # the scalars in force
        self._stages: dict[str, StageResult] = {}
        self._phases: dict[int, str] = {}  # of the model, by epoch
        self._scored = self._timed = 0  # how many scores and epochs are logged
        self._built: Plan | None = None
        self._inputs: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            check_before_pruning(trainer, self)
            self._sinks = sinks_of(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with failing_together():  # here and below: one process alone writes, and its disk may be full
            self._begin(trainer)

    def _begin(self, trainer: Trainer) -> None:
        if not trainer.loggers:
            return
        run = RUNS.get(trainer)
        if run is None:
            raise CallbackError("TrackingCallback: nothing scores channels here; add PruneCallback after it")
        self._inputs = run.session.example_inputs  # in every process: the user's step, which may find them, may gather
        if not self._sinks or self._now or run.session.built is not None:
            return  # it goes on with a model that is not dense any more
        self._stages[DENSE] = self._measure(run, DENSE)
        self._now |= {"prune/share": 0.0, "prune/round": 0}
        self._log(trainer, self._now)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with failing_together():
            self._track(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with failing_together():
            self._track(trainer)  # here, and not when it happens, so that no epoch's time holds the logging
            self._track_epochs(trainer)
        super().on_train_epoch_start(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with failing_together():
            self._track(trainer)
            self._track_epochs(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        run, phase = RUNS.get(trainer), DENSE
        if run is not None and run.session.plan is not None:
            phase = MASKED if run.session.built is None else RECONSTRUCTED
        self._phases[trainer.current_epoch] = phase

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with failing_together():
            self._finish(trainer, pl_module)

    def _finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        run = RUNS.get(trainer)
        if not self._sinks or run is None:
            return
        self._track(trainer)
        if run.session.built is not None:
            self._stages[RECONSTRUCTED] = self._measure(run, RECONSTRUCTED)
            if self.model:
                self._file("pruned.pt", "model", partial(save, small=pl_module, plan=run.session.built))
        summary = summary_table(self._report(run))
        for sink in self._sinks:
            sink.table("prune/summary", summary, trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """What is logged already: plain data; nothing without a logger."""
        if not self._sinks:
            return {}
        return {
            **super().state_dict(),
            "now": self._now,
            "stages": [asdict(stage) for stage in self._stages.values()],
            "phases": self._phases,
            "logged": [self._scored, self._timed],
            "built": None if self._built is None else self._built.to_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there, logging nothing twice."""
        super().load_state_dict(state_dict)
        self._now = dict(state_dict["now"])
        self._stages = {stage["name"]: StageResult(**stage) for stage in state_dict["stages"]}
        self._phases = dict(state_dict["phases"])
        self._scored, self._timed = state_dict["logged"]
        built = state_dict["built"]
        self._built = None if built is None else Plan.from_dict(built)

    def _track(self, trainer: Trainer) -> None:
        """Log what happened since the last time."""
        run = RUNS.get(trainer)
        if not self._sinks or run is None:
            return
        session = run.session
        plan, before = session.plan, (self._now.get("prune/round", 0), self._built)
        if len(session.history) > self._scored:
            self._log_scores(trainer, session.history[-1], plan)
        self._scored = len(session.history)
        if session.taken != before[0] and plan is not None:
            self._file("plan.json", "plan", plan.save)
            self._now["prune/share"] = share_removed(session.dense_graph, plan)
            self._log_channels(trainer, session.dense_graph, plan)
        self._now["prune/round"] = session.taken
        if session.built != self._built:
            self._built = session.built
            self._measure(run, RECONSTRUCTED)
            if run.lossless is not None and run.seconds is not None:
                self._now["prune/lossless_error"] = run.lossless.max_rel_error
                self._now["prune/reconstruction_seconds"] = run.seconds
        if (session.taken, session.built) != before:
            self._log(trainer, self._now)

    def _track_epochs(self, trainer: Trainer) -> None:
        """Log epochs that are over; the timer that starts after reconstruction knows them best."""
        run = RUNS.get(trainer)
        if not self._sinks or run is None:
            return
        timer = run.timer or self
        for record in timer.records[self._timed :]:
            self._log(trainer, {**self._now, "prune/epoch_seconds": record.train_seconds, "epoch": record.epoch})
        self._timed = len(timer.records)

    def _log(self, trainer: Trainer, values: dict[str, float]) -> None:
        for sink in self._sinks:
            sink.scalars(values, trainer.global_step)

    def _log_scores(self, trainer: Trainer, scores: Scores, plan: Plan | None) -> None:
        values = {f"prune/scores/{layer}": found for of in scores.layers.values() for layer, found in of.items()}
        left = plan if plan is None or self._built is None else plan.within(self._built)
        # Several rounds since the last time: what was left when these scores were made is not known any more.
        fits = left is not None and all(group.size == len(scores[name]) for name, group in left.groups.items())
        figure = scores_figure(scores, left if fits else None)
        self._file("scores.pt", "scores", scores.save)
        for sink in self._sinks:
            sink.histograms(values, trainer.global_step)
            sink.picture("prune/scores", figure, trainer.global_step)

    def _log_channels(self, trainer: Trainer, graph: ChannelGraph, plan: Plan) -> None:
        layers = layer_channels(graph, plan)
        figure, table = channels_figure(layers), channels_table(layers)
        for sink in self._sinks:
            sink.picture("prune/channels", figure, trainer.global_step)
            sink.table("prune/channels_table", table, trainer.global_step)

    def _file(self, name: str, kind: str, write: Any) -> None:
        for sink in self._sinks:
            sink.file(name, kind, write)

    def _measure(self, run: PruningRun, name: str) -> StageResult:
        """Measure the model as it is, for the scalars and for the summary."""
        model = run.session.model
        flops = flops_by_convention(model, self._inputs)
        params = count_params(model)
        self._now |= {"prune/params": params, "prune/macs": flops["macs"], "prune/flops": flops["flops2"]}
        return StageResult(name, params=params, flops=dict(flops), size_bytes=state_size(model))

    def _report(self, run: PruningRun) -> PruneReport:
        seconds: dict[str, list[float]] = {}
        for record in (run.timer or self).records:
            seconds.setdefault(self._phases.get(record.epoch, DENSE), []).append(record.train_seconds)
        stages = dict(self._stages)
        if MASKED in seconds and DENSE in stages:
            stages[MASKED] = StageResult(MASKED, params=stages[DENSE].params, flops=stages[DENSE].flops)
        timed = [
            replace(stages[name], epoch_seconds=median(seconds[name]) if name in seconds else None)
            for name in (DENSE, MASKED, RECONSTRUCTED)
            if name in stages
        ]
        return PruneReport("Pruning", stages=tuple(timed), losslessness=run.lossless)
