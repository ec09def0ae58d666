"""Which model a command is about: an architecture from a name or a recipe, and the weights of a checkpoint."""

from __future__ import annotations

import argparse
import copy
import difflib
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_prune.cli.graph import build_model
from lightning_prune.errors import ModelError
from lightning_prune.measure import samples_in, with_samples
from lightning_prune.plan import Plan
from lightning_prune.reconstruction.checkpoint import FORMAT, KEY, load, load_dense, read_file

if TYPE_CHECKING:
    from pytorch_lightning import LightningDataModule

IMAGE = (1, 3, 224, 224)
_FIT = re.compile(r"--(model\.|data\b|trainer\b|seed_everything\b)")  # its options, which configurations take


@dataclass(frozen=True)
class Architecture:
    """A freshly built dense model, and what is known beside it.

    Attributes:
        dense: its weights are those it was built with.
        inputs: the task's example inputs; None if nobody said.
        data: of the recipe, if there is one.
        origin: the words on the command line that build it again.
        name: short.
    """

    dense: nn.Module
    inputs: Any
    data: LightningDataModule | None
    origin: str
    name: str

    def load(self, path: str) -> tuple[nn.Module, Plan | None]:
        """A copy in eval mode with the weights of a checkpoint, and the plan if that is of a pruned model.

        Raises:
            CheckpointError: the file cannot be read, or belongs to another model.
        """
        model, content = copy.deepcopy(self.dense).eval(), read_file(path)
        plan = None
        if is_pruned(content):
            plan = load(path, model)
        else:
            load_dense(path, model)
        return model, plan or None


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options that say which architecture a checkpoint belongs to, and what it takes."""
    group = parser.add_argument_group("the dense model")
    group.add_argument("--model", metavar="NAME", help="of torchvision such as resnet18, or an import path")
    group.add_argument("--arg", action="append", default=[], metavar="KEY=VALUE", help="argument of the model; repeat")
    group.add_argument(
        "--config", action="append", default=[], metavar="TASK", help="YAML file or recipe, with the options of fit"
    )
    group.add_argument("--input", nargs="+", type=int, metavar="N", help="shape of the input, samples first")


def architecture(options: argparse.Namespace, rest: Sequence[str], prog: str, hint: str = "") -> Architecture:
    """Build what ``--model`` or ``--config`` names.

    Args:
        options: with those of `add_options`.
        rest: options that belong to the configuration.
        prog: the command, for its errors.
        hint: said where neither is given.

    Raises:
        ModelError: an unknown option, neither, both, or a model that cannot be built.
    """
    if options.input is not None and min(options.input) < 1:
        raise ModelError(f"--input takes positive numbers, got {' '.join(map(str, options.input))}")
    unknown = [word for word in rest if not options.config or (word.startswith("--") and not _FIT.match(word))]
    if unknown:
        own = [f"--{name.replace('_', '-')}" for name in vars(options)]
        close = difflib.get_close_matches(unknown[0].partition("=")[0], own, n=1)
        hint = f". Did you mean '{close[0]}'?" if close else ""
        raise ModelError(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    if bool(options.config) == (options.model is not None):
        said = "--config and --model exclude each other" if options.config else "a checkpoint holds weights, not code"
        raise ModelError(f"{said}: pass --config TASK.yaml or --model NAME.{hint}")
    if options.config:
        from lightning_prune.cli.training import build_task

        argv = [*(word for name in options.config for word in ("--config", name)), *rest]
        built = build_task(argv, prog)
        return Architecture(built.task, built.task.example_input_array, built.data, shlex.join(argv), built.name)
    origin = shlex.join(["--model", options.model, *(word for arg in options.arg for word in ("--arg", arg))])
    model = build_model(options.model, options.arg)
    return Architecture(model, getattr(model, "example_input_array", None), None, origin, options.model)


def example_inputs(shape: Sequence[int] | None, known: Architecture, *paths: str) -> Any:
    """Random numbers of the shape that was asked for, else the task's inputs, else as a pruned file was made with."""
    if shape is None and known.inputs is not None:
        return known.inputs
    noted = (read_file(path).get("extra", {}).get("input") for path in paths if Path(path).is_file())
    shape = shape or next(filter(None, noted), IMAGE)
    return torch.rand(tuple(shape), generator=torch.Generator().manual_seed(0))


def one_sample(shape: Sequence[int] | None, inputs: Any) -> Any:
    """What a deployed model gets, unless a shape was asked for; a task has two samples to be traced with."""
    return with_samples(inputs, 1) if shape is None and samples_in(inputs) else inputs


def is_pruned(content: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is of a model that has lost channels."""
    if content.get("format") == FORMAT:
        return True
    return KEY in content and bool(content[KEY].get("plan", {}).get("groups"))


def origin_of(path: str) -> str:
    """A hint on how the dense model of a pruned file was built, where it says so."""
    origin = read_file(path).get("extra", {}).get("origin") if Path(path).is_file() else None
    return f" It was pruned with: {origin}" if origin else ""
