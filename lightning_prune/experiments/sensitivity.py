"""Sensitivity of a task: scored on its training data, evaluated on its validation data, kept in a folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from pytorch_lightning import LightningDataModule, LightningModule
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import nn

from lightning_prune.criteria import Criterion, Scores, criterion_from
from lightning_prune.errors import SensitivityError
from lightning_prune.experiments.comparison.cells import described, digest
from lightning_prune.experiments.comparison.run import data_summary, weights_digest
from lightning_prune.experiments.runner import METRICS, Runner, logged_metric, metric_name, quiet
from lightning_prune.files import check_writable, write_text
from lightning_prune.graph import ChannelGraph, trace
from lightning_prune.model_state.copying import copied
from lightning_prune.report.figures import save_figure
from lightning_prune.report.sensitivity import sensitivity_csv, sensitivity_figure
from lightning_prune.selection import LayerRatio
from lightning_prune.sensitivity import RATIOS, Sensitivity, measure_sensitivity
from lightning_prune.sensitivity.curves import Mode
from lightning_prune.sensitivity.measuring import check_ratios


@dataclass(frozen=True)
class SensitivityStudy:
    """What was measured of a task, and what it was measured with.

    Attributes:
        sensitivity: the curves.
        graph: of the task.
        scores: by which channels were masked.
        criterion: that they are of.
        about: how it was evaluated, in words.
        percent: whether the metric lies in [0, 1] and is shown times 100.
        statistics: whether channels under layer norms and the like were masked, too.
    """

    sensitivity: Sensitivity
    graph: ChannelGraph
    scores: Scores
    criterion: Criterion
    about: str
    percent: bool
    statistics: bool = False


def measure_task_sensitivity(
    task: LightningModule,
    data: LightningDataModule,
    criterion: Criterion | str = "l1",
    *,
    output: str | Path = "runs/sensitivity",
    ratios: Sequence[float] = RATIOS,
    batches: int | None = None,
    score_batches: int | None = None,
    metric: str | None = None,
    mode: Mode | None = None,
    statistics: bool = False,
    task_settings: Any = None,
    progress: Callable[[int, int], object] | None = None,
    **constraints: Any,
) -> SensitivityStudy:
    """`lightning_prune.sensitivity.measure_sensitivity` of a task by its own validation step.

    Values are added to ``output/sensitivity.jsonl`` as soon as they are known; a later call with the same task, data
    and settings goes on from there, with the scores that the first has kept.

    Args:
        task: already trained; left as it is.
        data: training batches score, validation batches evaluate.
        criterion: an instance, or a name such as "l1".
        output: folder.
        ratios: shares in (0, 1).
        batches: of the validation data, the first so many; None: all.
        score_batches: of the training data; None: all.
        metric: name of a logged metric without its stage, such as "acc" or "loss"; None: mIoU, mAP or accuracy.
        mode: ``max`` if a high metric is good, ``min`` if a low one is; None: ``min`` for a loss.
        statistics: mask channels under layer norms and the like, too, see `lightning_prune.graph.trace`.
        task_settings: plain data that the values depend on besides.
        progress: called with the evaluations that are done, and their number.
        constraints: of `lightning_prune.selection.Selection`.

    Raises:
        SensitivityError: no validation data or step, or see `measure_sensitivity`.
        PruningError: one of its kinds, naming the cause.
    """
    criterion, folder = criterion_from(criterion), Path(output)
    check_ratios(ratios)
    loaded = is_overridden("val_dataloader", data, LightningDataModule)
    if not loaded or not is_overridden("validation_step", task, LightningModule):
        raise SensitivityError(
            f"{type(task).__name__} and {type(data).__name__} validate nothing together: neither validation_step with "
            "val_dataloader"
        )
    journal = folder / "sensitivity.jsonl"
    check_writable(journal)
    task = copied(task)  # what a validation leaves on it is nobody's
    runner = Runner(data)
    with quiet():
        metric = logged_metric(task, metric, runner.validated(task, batches), "val")
        scoring = {"criterion": described(criterion), "score_batches": score_batches}
        scoring |= {"statistics": True} if statistics else {}
        graph, scores = _scored(runner, task, criterion, folder, scoring)
        found = measure_sensitivity(
            task,
            graph,
            scores,
            lambda model: runner.validated(model, batches)[metric],  # type: ignore[arg-type]
            ratios=ratios,
            mode=mode or ("min" if metric.endswith("loss") else "max"),
            metric=metric_name(metric),
            path=journal,
            settings={
                **scoring,
                "metric": metric,
                "batches": batches,
                "data": data_summary(data, ("val",)),
                "note": task_settings,
            },
            progress=progress,
            **constraints,
        )
    first = "the" if batches is None else "the first" if batches == 1 else f"the first {batches}"
    about = f"{first} validation batch{'' if batches == 1 else 'es'}, channels by {type(criterion).__name__}"
    return SensitivityStudy(found, graph, scores, criterion, about, metric in METRICS, statistics)


def _scored(
    runner: Runner,
    task: LightningModule,
    criterion: Criterion,
    folder: Path,
    settings: dict[str, Any],
) -> tuple[ChannelGraph, Scores]:
    """Scores of an earlier call, or new ones, which are kept: a sum over batches may round otherwise the next time."""
    statistics = settings.get("statistics", False)
    depends: dict[str, Any] = {"weights": weights_digest(task), **settings}
    if criterion.needs_forward:
        depends["data"] = data_summary(runner.data, ("train",))
    path = folder / f"scores-{digest(depends)[:12]}.pt"
    if path.is_file():
        graph = trace(task, task.example_input_array, statistics=statistics)
        return graph, Scores.load(path, graph)
    graph, scores = runner.score(task, criterion, batches=settings["score_batches"], statistics=statistics)
    scores.save(path)
    return graph, scores


def write_sensitivity(
    study: SensitivityStudy, folder: str | Path, selection: LayerRatio | None = None
) -> dict[str, Path]:
    """Write ``sensitivity.csv`` and ``.png``, and of chosen ratios ``layer_ratios.json`` and ``prune.yaml``.

    The former is for ``lightning-prune prune --layer-ratios``, the latter a configuration for ``lightning-prune fit``.
    Each file appears whole or not at all.

    Raises:
        PruningError: a file cannot be written.
    """
    found, names = study.sensitivity, ("sensitivity.csv", "sensitivity.png", "layer_ratios.json", "prune.yaml")
    files = {name: Path(folder) / name for name in names[: 2 if selection is None else 4]}
    ratios = None if selection is None else {group: float(selection.overrides.get(group, 0.0)) for group in found.sizes}
    unit = f"points lost of {100 * found.dense:.1f} %" if study.percent else f"lost of {found.dense:.4g}"
    framed = "" if ratios is None else "; framed: chosen"
    write_text(files["sensitivity.csv"], sensitivity_csv(found))
    subtitle = f"{unit} at the share of its channels that is masked{framed}"
    figure = sensitivity_figure(found, ratios, percent=study.percent, subtitle=subtitle)
    save_figure(figure, files["sensitivity.png"])
    if selection is not None:
        selection.save(files["layer_ratios.json"])
        write_text(files["prune.yaml"], _configuration(study, selection))
    return files


def _configuration(study: SensitivityStudy, selection: LayerRatio) -> str:
    """A prune recipe that says what the selection does."""
    callback = {
        "criterion": _spelled(study.criterion),
        "selection": _spelled(selection),
        "reconstruct": "before",
        **({"statistics": True} if study.statistics else {}),
    }
    content = {"trainer": {"callbacks+": [{"class_path": "lightning_prune.PruneCallback", "init_args": callback}]}}
    about = "# Ratios of layers from lightning-prune sensitivity; reconstructed before fine-tuning\n"
    return about + yaml.safe_dump(content, sort_keys=False)


def _spelled(value: Any) -> dict[str, Any]:
    """A dataclass as configurations have it, with what differs from its defaults."""
    cls = type(value)
    arguments = {}
    for one in fields(value):
        default = one.default_factory() if one.default_factory is not MISSING else one.default
        given = getattr(value, one.name)
        if one.init and given != default:
            arguments[one.name] = dict(given) if isinstance(given, dict) else _plain(given)
    module = cls.__module__
    path = ".".join(module.split(".")[:2]) if module.startswith("lightning_prune.") else module
    return {"class_path": f"{path}.{cls.__qualname__}", **({"init_args": arguments} if arguments else {})}


def _plain(value: Any) -> Any:
    if isinstance(value, nn.Module):
        raise SensitivityError("a module in a setting cannot be written to a configuration: give its name")
    return list(value) if isinstance(value, tuple) else value
