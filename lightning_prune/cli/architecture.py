"""Which model a command is about: an architecture from a name or a recipe, and the weights of a checkpoint."""

from __future__ import annotations

import argparse
import math
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_prune.cli.build_model import build_model
from lightning_prune.cli.parser import UsageError
from lightning_prune.errors import CheckpointError, ExportError, ModelError, PlanError, TraceError
from lightning_prune.measure import samples_in, with_samples
from lightning_prune.model_state.copying import copied
from lightning_prune.plan import Plan
from lightning_prune.reconstruction.checkpoint import FORMAT, KEY, load, load_dense, read_file

if TYPE_CHECKING:
    from pytorch_lightning import LightningDataModule

IMAGE = (1, 3, 224, 224)
MOST_DIMENSIONS = 16  # of an input


@dataclass(frozen=True)
class Checkpoint:
    """What a file of weights says about itself, perhaps also how its dense model was named and its input's shape."""

    path: str
    pruned: bool
    origin: str | None
    input: Sequence[int] | None
    plan: Plan | None
    metrics: Mapping[str, float]  # that were noted with the weights

    @classmethod
    def read(cls, path: str) -> Checkpoint:
        """Look into a file."""
        content = read_file(path)
        pruned = content.get("format") == FORMAT
        # what callbacks note in Lightning's checkpoints
        noted = content if pruned else _part(content, KEY, path) if isinstance(content.get(KEY), Mapping) else {}
        plan, extra = (_part(noted, "plan", path), _part(content, "extra", path)) if noted else ({}, {})
        try:
            known = Plan.from_dict(dict(plan)) if plan.get("groups") else None
        except PlanError as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error
        origin, shape = extra.get("origin"), extra.get("input")
        if origin is not None and not isinstance(origin, str):
            raise CheckpointError(f"{path} is damaged: 'origin' is a {type(origin).__name__} in it")
        if shape is not None and not _is_shape(shape):
            raise CheckpointError(f"{path} is damaged: the shape of its input, {str(shape)[:40]}, is none")
        return cls(path, pruned or bool(known), origin, shape, known, _metrics(content))


def _part(content: Mapping[str, Any], name: str, path: str) -> Mapping[str, Any]:
    found = content.get(name, {})
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{path} is damaged: {name!r} is a {type(found).__name__} in it")
    return found


def _is_shape(value: Any) -> bool:
    whole = isinstance(value, (list, tuple)) and all(type(size) is int and size > 0 for size in value)
    return whole and 0 < len(value) <= MOST_DIMENSIONS and math.prod(value) < 2**40


def _metrics(content: Mapping[str, Any]) -> dict[str, float]:
    """Numbers that were saved with pruned weights, and the score that Lightning kept its checkpoint for."""
    extra, callbacks = (content.get(name) for name in ("extra", "callbacks"))
    found = {n: v for n, v in extra.items() if isinstance(v, float)} if isinstance(extra, Mapping) else {}
    for state in callbacks.values() if isinstance(callbacks, Mapping) else ():
        name, score = (state.get(key) for key in ("monitor", "current_score")) if isinstance(state, Mapping) else (0, 0)
        if isinstance(name, str) and isinstance(score, Tensor) and score.numel() == 1 and bool(score.isfinite()):
            found[name] = float(score)
    return found


@dataclass(frozen=True)
class Architecture:
    """A freshly built dense model, the words on the command line that build it again, and what is known beside it."""

    dense: nn.Module
    data: LightningDataModule | None
    origin: str
    name: str
    shape: Sequence[int] | None  # that the command line asks for
    prunes: bool = False  # whether its configuration holds a callback that does, in training

    @property
    def task_inputs(self) -> Any:
        """None if nobody said."""
        return getattr(self.dense, "example_input_array", None)

    def load(self, checkpoint: Checkpoint) -> nn.Module:
        """A copy in eval mode with the weights of a checkpoint."""
        model = copied(self.dense).eval()
        (load if checkpoint.pruned else load_dense)(checkpoint.path, model)
        return model

    def example_inputs(self, *checkpoints: Checkpoint) -> Any:
        """Random numbers of the shape that was asked for, else the task's inputs, else as a file was pruned with."""
        if self.shape is None and self.task_inputs is not None:
            return self.task_inputs
        shape = self.shape or next((file.input for file in checkpoints if file.input), IMAGE)
        check_memory(shape)
        return torch.rand(tuple(shape), generator=torch.Generator().manual_seed(0))

    def deployed_inputs(self, *checkpoints: Checkpoint) -> Any:
        """The same with one sample, unless a shape was asked for; a task has two samples to be traced with."""
        inputs = self.example_inputs(*checkpoints)
        return with_samples(inputs, 1) if self.shape is None and samples_in(inputs) else inputs


@contextmanager
def naming_input(inputs: Any) -> Iterator[None]:
    """Say of an input that a model does not run on how the command line names another, not how Python does."""
    try:
        yield
    except (TraceError, ExportError) as error:
        cause, told, _ = str(error).partition(" Pass inputs as the model's forward takes them")
        if not isinstance(inputs, Tensor) or "does not run on the example inputs" not in cause:
            raise
        shape = " ".join(map(str, inputs.shape))
        stop = "" if told or cause.endswith(".") else "."
        raise type(error)(f"{cause}{stop} The input was {shape}; --input names another shape.") from error


def check_memory(shape: Sequence[int]) -> None:
    """Refuse an input that this machine could not hold: it would be killed, and say nothing."""
    needed, there = 4 * math.prod(shape), 1 << 40
    if hasattr(os, "sysconf"):
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if len(shape) > MOST_DIMENSIONS or needed > there / 2:
        words = " ".join(map(str, shape))
        raise ModelError(
            f"an input of {words[:60]} takes {needed / 1e9:,.1f} GB, and this machine has "
            f"{there / 1e9:,.1f} GB; fewer samples or smaller images need less"
        )


def architecture(options: argparse.Namespace, *checkpoints: Checkpoint) -> Architecture:
    """Build what ``--model`` or ``--config`` names; without either, the refusal names a checkpoint's origin."""
    if bool(options.config) == (options.model is not None):
        cause = "--config and --model exclude each other" if options.config else "a checkpoint holds weights, not code"
        origin = next((file.origin for file in checkpoints if file.origin), None)
        hint = f" It was pruned with: {origin}" if origin and not options.config else ""
        raise UsageError(f"{cause}: pass --config TASK.yaml or --model NAME.{hint}")
    if options.config:
        if options.arg:
            raise UsageError(f"--arg {options.arg[0]} is for --model: with --config, say --model.KEY=VALUE")
        from lightning_prune.cli.training import build_task

        argv = [*(word for name in options.config for word in ("--config", name)), *options.fit_options]
        built = build_task(argv, options.prog)
        callbacks = built.config["trainer"].get("callbacks") or []
        listed = callbacks if isinstance(callbacks, list) else [callbacks]
        prunes = any(one["class_path"].endswith("PruneCallback") for one in listed)
        return Architecture(built.task, built.data, shlex.join(argv), built.name, options.input, prunes)
    if options.fit_options:
        raise UsageError(f"{options.fit_options[0]} is for --config: with --model there is no configuration")
    argv = ["--model", options.model, *(word for argument in options.arg for word in ("--arg", argument))]
    model = build_model(options.model, options.arg)
    return Architecture(model, None, shlex.join(argv), options.model, options.input)
