"""Objects of a recipe's plain data: class_path and init_args, as in the configurations of the command line."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, Namespace
from pytorch_lightning import LightningModule

from lightning_prune.callbacks import PruneCallback
from lightning_prune.callbacks.prune import Reconstruct
from lightning_prune.criteria import Criterion, criterion_from
from lightning_prune.errors import ConfigurationError, PruningError, first_line
from lightning_prune.experiments.reproduce.recipe import Pruning, Training
from lightning_prune.schedule import Schedule
from lightning_prune.selection import Selection


def parsed(kind: type, spec: Any, where: str) -> tuple[ArgumentParser, Namespace]:
    """What can build an object of this kind, once class and arguments are seen to exist; nothing is built yet."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=kind)
    try:
        return parser, parser.parse_object({"value": copy.deepcopy(spec)})
    except ArgumentError as error:
        raise ConfigurationError(f"{where}: {error}") from error


def built(kind: type, spec: Any, where: str) -> Any:
    """An object of this kind.

    Raises:
        ConfigurationError: class or arguments do not exist, or the class refuses them.
    """
    parser, settings = parsed(kind, spec, where)
    try:
        return parser.instantiate(settings).value
    except PruningError:
        raise
    except (ValueError, TypeError, OSError) as error:
        raise ConfigurationError(f"{where}: {first_line(error)}") from error


def task_spec(task: Mapping[str, Any], model: Mapping[str, Any], training: Training) -> dict[str, Any]:
    """A task with a network, and with the optimizer and schedule of one training."""
    own = {"model": model, "optimizer": training.optimizer, "lr_scheduler": training.lr_scheduler}
    return {**task, "init_args": {**task.get("init_args", {}), **own}}


def built_task(task: Mapping[str, Any], model: Mapping[str, Any], training: Training, where: str) -> LightningModule:
    """The task of a scale, as it is trained once."""
    return built(LightningModule, task_spec(task, model, training), where)


def criterion(how: Pruning, seed: int, where: str) -> Criterion:
    """The criterion of a row; one that draws at random draws by this seed."""
    given = how.criterion
    found = criterion_from(given) if isinstance(given, str) else built(Criterion, given, where)
    return replace(found, seed=seed) if hasattr(found, "seed") else found  # type: ignore[type-var]


def selection(how: Pruning, where: str) -> Selection:
    """The selection of a row."""
    spec = {**how.selection, "init_args": {**how.selection.get("init_args", {}), "ratio": how.ratio}}
    return built(Selection, spec, where)


def schedule(how: Pruning, where: str) -> Schedule | None:
    """The schedule of a row, None: all at once."""
    return None if how.schedule is None else built(Schedule, how.schedule, where)


def prune_callback(how: Pruning, seed: int, reconstruct: Reconstruct, where: str) -> PruneCallback:
    """What prunes the model of a row inside a fit."""
    return PruneCallback(
        criterion(how, seed, where),
        selection=selection(how, where),
        coupling=how.coupling,
        batch_norm=how.batch_norm,
        schedule=schedule(how, where),
        reconstruct=reconstruct,
        track=False,
        score_batches=how.score_batches,
        score_epochs=how.score_epochs,
    )
