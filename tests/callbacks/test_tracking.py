"""What loggers are told: right numbers under the documented names, once, and nothing lost or disturbed."""

from __future__ import annotations

import copy
import csv
from itertools import combinations
from pathlib import Path
from statistics import median

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

import lightning_prune as lp
from lightning_prune.callbacks import PruneCallback, ScoringCallback, TrackingCallback
from lightning_prune.callbacks.loggers import FolderSink, Sink, sinks_of
from lightning_prune.criteria import JRE
from lightning_prune.criteria.scores import Scores
from lightning_prune.errors import CallbackError, PruningError
from lightning_prune.measure import count_flops
from lightning_prune.plan import GroupPlan, Plan
from lightning_prune.report.tracking import channels_table, layer_channels, scores_figure, share_removed
from lightning_prune.schedule import Gradual, Rounds
from tests.callbacks.helpers import Task, fit, loader, params, trainer
from tests.zoo import images

# The tests' epochs are short.
pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval")

LAYERS = ["net.stem.0", "net.a1.0", "net.a2.0", "net.b1.0", "net.b2.0", "net.down.0"]


class Memory(Logger):
    """A logger of which nothing is known but that it takes numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    name, version = "memory", 0

    def log_metrics(self, metrics, step=None):
        self.rows.append({**metrics, "step": step})

    def log_hyperparams(self, *_, **__): ...

    def of(self, name: str) -> list[float]:
        return [row[name] for row in self.rows if name in row]


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open() as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize("when", ["before", "after", "never"])
def test_any_logger_gets_the_numbers(when: str) -> None:
    task, memory = Task(), Memory()
    dense = params(task), count_flops(task, images(2))
    prune = PruneCallback(JRE(), 0.5, reconstruct=when)
    fit(task, prune, logger=memory)
    first, *_, last = [row for row in memory.rows if "prune/params" in row]
    assert (first["prune/params"], first["prune/macs"], first["prune/flops"]) == (*dense, 2 * dense[1])
    assert (first["prune/share"], first["prune/round"], first["step"]) == (0, 0, 0)
    assert (last["prune/params"], last["prune/macs"]) == (params(task), count_flops(task, images(2)))
    assert (params(task) == dense[0]) == (when == "never")
    assert last["prune/share"] == pytest.approx(0.5)
    assert last["prune/round"] == 1
    timer = prune.tracking if when == "never" else prune.reconstruction
    assert memory.of("prune/epoch_seconds") == [record.train_seconds for record in timer.records]
    epochs = [row for row in memory.rows if "prune/epoch_seconds" in row]
    assert [(row["epoch"], row["step"]) for row in epochs] == [(0, 4), (1, 8)]
    assert all(row["prune/params"] == (params(task) if when == "before" else dense[0]) for row in epochs)
    if when != "never":
        assert last["prune/lossless_error"] == prune.reconstruction.lossless.max_rel_error
        assert last["prune/reconstruction_seconds"] == prune.reconstruction.seconds


def test_a_csv_run_has_everything_beside_its_numbers(tmp_path: Path) -> None:
    task, logger = Task(), CSVLogger(tmp_path, name="run", version="")
    prune = PruneCallback(JRE(), 0.5)
    fit(task, prune, logger=logger)
    rows = read_csv(tmp_path / "run" / "metrics.csv")
    assert {row["prune/params"] for row in rows if row["prune/params"]} == {"3809", str(params(task))}
    folder = tmp_path / "run" / "prune"
    assert {path.name for path in folder.iterdir()} == {
        *("channels.png", "channels_table.csv", "scores.png", "scores.pt", "plan.json", "pruned.pt", "summary.csv")
    }
    table = {row["layer"]: row for row in read_csv(folder / "channels_table.csv")}
    assert [*table] == [*LAYERS, "net.head.fc"]
    for name in LAYERS:
        assert int(table[name]["kept"]) == task.get_submodule(name).out_channels
    assert lp.Plan.load(folder / "plan.json") == prune.masking.plan
    scores = lp.criteria.Scores.load(folder / "scores.pt", prune.scoring.dense_graph)
    assert all(torch.equal(values, prune.scoring.scores[name]) for name, values in scores.items())
    fresh = Task()
    lp.load(folder / "pruned.pt", fresh)
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in task.state_dict().items())
    dense, small = read_csv(folder / "summary.csv")
    assert (dense["model"], dense["Parameters (k)"]) == ("dense", "3.81")
    assert small["Parameters (k)"].startswith(f"{params(task) / 1000:.2f} (")
    assert float(small["Error against masked (relative)"]) <= 1e-10
    assert float(small["Epoch (s)"]) > 0


def test_tensorboard_has_histograms_pictures_and_text(tmp_path: Path) -> None:
    prune = PruneCallback(JRE(), 0.5, schedule=Gradual(2), reconstruct="during")
    fit(Task(), prune, logger=TensorBoardLogger(tmp_path, name="run", version=""), epochs=3)
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"histograms": 0, "images": 0})
    events.Reload()
    tags = events.Tags()
    assert {f"prune/scores/{layer}" for layer in LAYERS} == set(tags["histograms"])
    first, second = events.Histograms("prune/scores/net.b1.0")
    assert (first.histogram_value.num, first.step) == (12, 0)
    values = prune.scoring.history[1][1].layers["net.b1.0"]["net.b1.0"]
    assert second.histogram_value.num == len(values) < 12
    assert second.histogram_value.sum == pytest.approx(float(values.sum()))
    assert set(tags["images"]) == {"prune/scores", "prune/channels"}
    assert [image.step for image in events.Images("prune/channels")] == [0, 8]
    (text,) = events.Tensors("prune/summary/text_summary")
    assert b"| reconstructed |" in text.tensor_proto.string_val[0]
    assert [event.value for event in events.Scalars("prune/round")][-1] == 2
    assert (tmp_path / "run" / "prune" / "pruned.pt").is_file()


def test_wandb_gets_its_own_kinds_and_artifacts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=str(tmp_path), offline=True)
    logged, artifacts, rows = logger.experiment.log, {}, []
    monkeypatch.setattr(
        logger.experiment, "log", lambda values, *a, **k: (rows.append(values), logged(values, *a, **k))
    )

    log_artifact = logger.experiment.log_artifact

    def keep(artifact, *args, **kwargs):
        if artifact.type != "run_table":  # what W&B itself makes of every table
            artifacts[artifact.name] = (artifact.type, sorted(artifact.manifest.entries))
        return log_artifact(artifact, *args, **kwargs)

    monkeypatch.setattr(logger.experiment, "log_artifact", keep)
    task = Task()
    fit(task, PruneCallback(JRE(), 0.5), logger=logger)
    run, summary = logger.experiment.id, dict(logger.experiment.summary)
    wandb.finish()
    assert artifacts == {
        f"scores-{run}": ("scores", ["scores.pt"]),
        f"plan-{run}": ("plan", ["plan.json"]),
        f"pruned-{run}": ("model", ["pruned.pt"]),
    }
    kinds = {name: type(value[0] if isinstance(value, list) else value) for row in rows for name, value in row.items()}
    assert all(kinds[f"prune/scores/{layer}"] is wandb.Histogram for layer in LAYERS)
    assert kinds["prune/scores"] is kinds["prune/channels"] is wandb.Image
    assert kinds["prune/channels_table"] is kinds["prune/summary"] is wandb.Table
    assert summary["prune/params"] == params(task)
    assert list(tmp_path.glob("wandb/offline-*/files/media/images/prune/channels_*.png"))


class Counting(Task):
    """Counts what its network computes."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0
        self.net.register_forward_hook(self.count)

    def count(self, *_):
        self.passes += 1


def test_without_a_logger_nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    alone, unlogged, logged = Counting(), Counting(), Counting()
    fit(alone, PruneCallback("l1", 0.5, track=False))
    fit(unlogged, prune := PruneCallback("l1", 0.5))
    fit(logged, PruneCallback("l1", 0.5), logger=Memory())
    assert alone.passes == unlogged.passes < logged.passes  # nothing is measured
    assert prune.tracking.state_dict() == {}
    assert not list(tmp_path.iterdir())


def test_training_goes_on_as_if_nobody_looked(tmp_path: Path) -> None:
    task = Task("adamw")
    alone = copy.deepcopy(task)
    fit(
        task, PruneCallback(JRE(), 0.5, reconstruct="during", schedule=Gradual(2)), logger=CSVLogger(tmp_path), epochs=3
    )
    fit(alone, PruneCallback(JRE(), 0.5, reconstruct="during", schedule=Gradual(2), track=False), epochs=3)
    assert all(torch.equal(value, alone.state_dict()[name]) for name, value in task.state_dict().items())


class Stop(Exception):
    """Stands for whatever ends a run."""


class Interrupt(Callback):
    """Ends the run in the middle of an epoch."""

    def __init__(self, epoch: int | None) -> None:
        self.epoch = epoch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (self.epoch, 1):
            raise Stop


def run(memory: Memory, folder: Path, stop: int | None = None, ckpt: Path | None = None) -> None:
    torch.manual_seed(0)
    prune = PruneCallback(JRE(), 0.5, reconstruct="during", schedule=Gradual(2, epochs=2))
    saving = ModelCheckpoint(folder, save_last=True)
    loggers = [memory, CSVLogger(folder, "logs", version="whole" if ckpt is None else "resumed")]
    runner = trainer(prune, saving, Interrupt(stop), epochs=4, enable_checkpointing=True, logger=loggers)
    runner.fit(Task(), loader(), loader(8, shuffle=False), ckpt_path=ckpt)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_resumed_run_logs_what_is_missing_and_nothing_twice(tmp_path: Path) -> None:
    run(whole := Memory(), tmp_path / "whole")
    for epoch in (1, 2, 3):
        broken, resumed, folder = Memory(), Memory(), tmp_path / str(epoch)
        with pytest.raises(Stop):
            run(broken, folder, epoch)
        run(resumed, folder, ckpt=folder / "last.ckpt")
        # What happened since the checkpoint was written happens again, and is told again.
        saved = [row for row in broken.rows if row["step"] < 4 * epoch]
        for name in ("prune/params", "prune/share", "prune/round", "epoch"):
            told = [row[name] for row in (*saved, *resumed.rows) if name in row and "prune/round" in row]
            assert told == [row[name] for row in whole.rows if name in row and "prune/round" in row], name
        dense, small = read_csv(folder / "logs" / "resumed" / "prune" / "summary.csv")
        assert (dense["model"], dense["Parameters (k)"], small["model"]) == ("dense", "3.81", "reconstructed")
        seconds = [row["prune/epoch_seconds"] for row in (*saved, *resumed.rows) if "prune/epoch_seconds" in row]
        assert len(seconds) == 4
        assert float(small["Epoch (s)"]) == pytest.approx(median(seconds), abs=0.01)


@pytest.mark.parametrize("when", ["before", "never"])
def test_fit_called_twice_goes_on(when: str) -> None:
    task, memory, prune = Task(), Memory(), PruneCallback("l1", 0.5, reconstruct=when)
    runner = fit(task, prune, logger=memory, epochs=1)
    before = len(memory.rows)
    runner.fit_loop.max_epochs = 3
    runner.fit(task, loader(), loader(8, shuffle=False))
    again = [row for row in memory.rows[before:] if "prune/params" in row]
    assert [row["epoch"] for row in again] == [1, 2]
    assert all(row["prune/share"] == pytest.approx(0.5) for row in again)
    assert {row["prune/params"] for row in again} == {params(task)}
    assert memory.of("prune/params")[0] == 3809


def test_scores_of_a_smaller_model_are_shown_with_what_goes_next(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    draw = lambda scores, plan: (drawn.append((scores, plan)), scores_figure(scores, plan))[1]  # noqa: E731
    monkeypatch.setattr("lightning_prune.callbacks.tracking.scores_figure", draw)
    prune = PruneCallback("l1", 0.5, schedule=Gradual(2), reconstruct="during")
    fit(Task(), prune, logger=Memory())
    (first, one), (second, two) = drawn
    dense = {group.name: group.size for group in prune.scoring.dense_graph.prunable_groups}
    assert {name: len(values) for name, values in first.items()} == dense
    assert {name: group.size for name, group in two.groups.items()} == {k: len(v) for k, v in second.items()} != dense
    assert {k: g.keep for k, g in one.groups.items()} != {k: g.keep for k, g in prune.masking.plan.groups.items()}
    assert any(group.removed for group in two.groups.values())


def test_rounds_inside_an_epoch_are_told_at_its_end() -> None:
    prune = PruneCallback("l1", 0.5, schedule=Rounds(6, batches=1), reconstruct="during")
    fit(Task(), prune, logger=(memory := Memory()), epochs=2)
    rounds = memory.of("prune/round")
    assert rounds == sorted(rounds)
    assert rounds[-1] == prune.masking.round == 5


def test_one_is_enough_and_scores_alone_are_told_too(tmp_path: Path) -> None:
    memory, own = Memory(), TrackingCallback(model=False)
    runner = fit(Task(), own, PruneCallback("l1", 0.5), logger=[memory, CSVLogger(tmp_path)], epochs=1)
    assert sum(isinstance(callback, TrackingCallback) for callback in runner.callbacks) == 1
    assert not list(tmp_path.rglob("pruned.pt"))
    assert list(tmp_path.rglob("plan.json"))
    fit(Task(), TrackingCallback(), ScoringCallback("l1"), logger=CSVLogger(tmp_path / "scores"), epochs=1)
    assert {path.name for path in tmp_path.glob("scores/*/*/prune/*")} == {"scores.png", "scores.pt", "summary.csv"}


@pytest.mark.parametrize(
    ("callbacks", "match"),
    [
        ([PruneCallback("l1"), TrackingCallback()], "TrackingCallback must see the dense model: put it before"),
        ([TrackingCallback()], "nothing scores channels here"),
    ],
)
def test_callbacks_that_cannot_be_tracked_are_refused(callbacks, match: str) -> None:
    with pytest.raises(CallbackError, match=match):
        fit(Task(), *callbacks, logger=Memory())


class Runner:
    """A Trainer, as far as `sinks_of` looks at it."""

    def __init__(self, first: bool, *loggers) -> None:
        self.is_global_zero, self.loggers = first, loggers


def test_only_the_first_process_logs_and_remote_folders_are_left_alone(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert [type(sink) for sink in sinks_of(Runner(True, Memory(), CSVLogger(tmp_path)))] == [Sink, FolderSink]
    assert sinks_of(Runner(False, Memory(), CSVLogger(tmp_path))) == []
    remote = type("Remote", (), {"log_dir": "s3://bucket/run"})()
    sink = FolderSink(remote)
    sink.table("prune/summary", channels_table(()), 0)
    sink.file("plan.json", "plan", Plan({}).save)
    assert not list(tmp_path.iterdir())


def scores_of(**values: list[float]) -> Scores:
    tensors = {name: torch.tensor(found, dtype=torch.float64) for name, found in values.items()}
    return Scores(tensors, {name: {name: found} for name, found in tensors.items()})


def strokes(figure) -> list[list[tuple[float, float, float]]]:
    return [sorted((x, y0, y1) for (x, y0), (_, y1) in lines.get_segments()) for lines in figure.axes[0].collections]


def test_a_stroke_per_channel_at_its_score_below_the_line_where_removed() -> None:
    scores = scores_of(a=[3.0, 1.0, 2.0], b=[0.0, 5.0])
    figure = scores_figure(scores, Plan({"a": GroupPlan(3, (0, 2), {"a": (0, 2)})}))
    kept, gone, both, none = strokes(figure)
    assert [(x, y1) for x, _, y1 in kept] == [(2.0, 0.0), (3.0, 0.0)]
    assert all(y0 < y1 for _, y0, y1 in kept)  # the axis points down
    assert [(x, y0) for x, y0, _ in gone] == [(1.0, 0.0)]
    assert [x for x, *_ in both] == [0.0, 5.0]
    assert none == []
    assert "5 in all; above the line: kept, below it: 1 removed" in figure.texts[1].get_text()
    assert figure.axes[0].get_xscale() == "linear"
    assert scores_figure(scores_of(a=[0.1, 1.0, 1000.0])).axes[0].get_xscale() == "log"
    assert scores_figure(scores_of(a=[-0.1, 1.0, 1000.0])).axes[0].get_xscale() == "linear"


def test_labels_of_many_layers_do_not_collide() -> None:
    figure = scores_figure(scores_of(**{f"features.denseblock{i}.conv": [float(i), 2.0] for i in range(60)}))
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    axes = figure.axes[0]
    texts = [*figure.texts, *axes.get_yticklabels(), axes.xaxis.label, *axes.get_xticklabels()]
    boxes = [text.get_window_extent(renderer) for text in texts if text.get_text()]
    assert not [1 for one, two in combinations(boxes, 2) if one.overlaps(two)]
    assert all(box.x0 >= 0 and box.y0 >= 0 for box in boxes)


def test_scores_that_cannot_be_drawn_are_refused() -> None:
    with pytest.raises(PruningError, match="nothing to draw"):
        scores_figure(Scores())
    with pytest.raises(PruningError, match="group 'a' has 1 scores, and the plan is for 2 channels"):
        scores_figure(scores_of(a=[1.0]), Plan({"a": GroupPlan(2, (0,))}))


def test_channels_are_those_of_the_reconstructed_model() -> None:
    task = Task()
    prune = PruneCallback("l1", 0.5, coupling="union", reconstruct="before")
    fit(task, prune, epochs=1)
    graph, plan = prune.scoring.dense_graph, prune.masking.plan
    for layer in layer_channels(graph, plan):
        weight: Tensor = task.get_submodule(layer.layer).weight
        assert layer.kept == len(weight), layer.layer
    masked = sum(group.size - len(kept) for group in plan.groups.values() for kept in group.layers.values())
    assert share_removed(graph, plan) == pytest.approx(masked / 60)
    assert share_removed(graph, Plan({})) == 0
    assert all(layer.kept == layer.dense for layer in layer_channels(graph, Plan({})))
