"""`graph`: which channels of a model go together and which cannot go, as a table and as a picture."""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib
import inspect
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console
from torch import nn

from lightning_prune.errors import ModelError, PruningError, TraceError
from lightning_prune.files import atomic
from lightning_prune.graph import ChannelGraph, trace
from lightning_prune.report.graph_picture import graph_html, graph_svg

_INPUT = (1, 3, 224, 224)
_USAGE = """lightning-prune graph MODEL [--arg KEY=VALUE ...] [--input 1 3 224 224] [--out graph.html]
       lightning-prune graph --config task/resnet18_digits.yaml [--model.KEY VALUE ...] [--input ...] [--out ...]"""
_PICTURES = {".html": graph_html, ".svg": graph_svg}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Print the cause alone: the usage is what --help is for."""
        self.exit(2, f"error: {message}. See {self.prog} --help.\n")


def run(argv: Sequence[str]) -> int:
    """`lightning-prune graph MODEL` or `lightning-prune graph --config TASK`."""
    from_config = any(word.partition("=")[0] in ("--config", "-c") for word in argv)
    parser = _parser()
    if not from_config:
        parser.add_argument("model", metavar="MODEL", help="of torchvision such as resnet18, or an import path")
        parser.add_argument("--arg", action="append", default=[], metavar="KEY=VALUE", help="argument of MODEL; repeat")
    options, rest = parser.parse_known_args(argv)
    if rest and not from_config:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    out = None if options.out is None else Path(options.out)
    if out is not None and out.suffix not in _PICTURES:
        parser.error(f"--out must end in .html or .svg, got '{out}'")

    if min(options.input or _INPUT) < 1:
        parser.error(f"--input takes positive numbers, got {' '.join(map(str, options.input))}")

    if from_config:
        model, given, title = _task(rest)
    else:
        model, title = build_model(options.model, options.arg), options.model
        given = getattr(model, "example_input_array", None)
    graph = _traced(model, given, options.input)
    console = Console()
    console.print(graph.describe(), highlight=False, markup=False, soft_wrap=True)
    if out is not None:
        _write(out, _PICTURES[out.suffix](graph, title=title))
        console.print(f"\nPicture: {out}", highlight=False, markup=False, soft_wrap=True)
    return 0


def build_model(path: str, arguments: Sequence[str] = ()) -> nn.Module:
    """Call the class or function at an import path; models of torchvision go by short names too.

    Args:
        path: such as ``resnet18`` or ``package.module.Net``; weights are downloaded only if asked for.
        arguments: keyword arguments as ``key=value``; a value that is neither JSON nor a Python literal is text.

    Raises:
        ModelError: there is nothing at the path, it refuses the arguments, or what it returns is no module.

    Example:
        >>> build_model("torch.nn.Linear", ["in_features=3", "out_features=2"])
        Linear(in_features=3, out_features=2, bias=True)
    """
    keywords = dict(_parsed(argument) for argument in arguments)
    if "." in path:
        factory = _import(path)
    else:
        factory = _of_torchvision(path)
        if "weights_backbone" in inspect.signature(factory).parameters:
            keywords.setdefault("weights_backbone", None)
    if not callable(factory):
        raise ModelError(f"'{path}' is no class or function, but {_kind(factory)}.")
    try:
        inspect.signature(factory).bind(**keywords)
    except TypeError as error:
        names = [name for name in inspect.signature(factory).parameters if name not in ("args", "kwargs")]
        raise ModelError(f"'{path}': {error}. It takes: {', '.join(names)}.") from error
    except ValueError:  # no signature to be had: the call itself will tell
        pass
    try:
        model = factory(**keywords)
    except Exception as error:
        raise ModelError(f"'{path}' could not be built: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"'{path}' returns {_kind(model)}, which is no torch.nn.Module.")
    return model


def _traced(model: nn.Module, given: Any, shape: Sequence[int] | None) -> ChannelGraph:
    """Trace on an input of that shape; without one on the task's own, or else on an ordinary image."""
    if shape is None and given is not None:
        return trace(model, given)
    shape = tuple(shape or _INPUT)
    try:
        return trace(model, torch.zeros(shape))
    except TraceError as error:
        cause = str(error).partition(" Pass inputs as")[0]  # this command can pass nothing but one tensor
        raise TraceError(f"{cause} The input was a tensor of shape {shape}; --input sets another.") from error


def _parser() -> Parser:
    parser = Parser(
        prog="lightning-prune graph",
        usage=_USAGE,
        description="Show which channels of a model go together, and which cannot be pruned and why.",
        epilog="With --config, the other options are those of lightning-prune fit.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--input", nargs="+", type=int, metavar="N", help="shape of the input; default: the task's, or 1 3 224 224"
    )
    parser.add_argument("--out", metavar="FILE", help="also write a picture: .html (with a table) or .svg")
    return parser


def _import(path: str) -> Any:
    """The object at an import path, or an error that says which part of the path is wrong."""
    module_name, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ModelError(f"'{path}': {error}.") from error
    if not hasattr(module, name):
        public = [other for other in vars(module) if not other.startswith("_")]
        close = difflib.get_close_matches(name, public, n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        raise ModelError(f"there is no '{name}' in {module_name}.{hint}")
    return getattr(module, name)


def _of_torchvision(name: str) -> Any:
    from torchvision import models

    try:
        return models.get_model_builder(name)
    except ValueError as error:
        close = difflib.get_close_matches(name, models.list_models(), n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        raise ModelError(
            f"torchvision has no model '{name}'.{hint} Others go by import path, such as package.module.Net"
        ) from error


def _parsed(argument: str) -> tuple[str, Any]:
    key, equals, value = argument.partition("=")
    if not equals or not key.isidentifier():
        raise ModelError(f"--arg takes KEY=VALUE, got '{argument}'.")
    for read in (json.loads, ast.literal_eval):  # null and true, None and (1, 2)
        with suppress(ValueError, SyntaxError):
            return key, read(value)
    return key, value


def _task(argv: Sequence[str]) -> tuple[nn.Module, Any, str]:
    """The task of a configuration, its example input, and a title."""
    from lightning_prune.cli.training import build_task

    built = build_task(argv, "lightning-prune graph")
    return built.task, built.task.example_input_array, built.name


def _kind(thing: object) -> str:
    return f"a {type(thing).__name__}"


def _write(path: Path, text: str) -> None:
    try:
        with atomic(path) as stream:
            stream.write(text.encode())
    except OSError as error:
        raise PruningError(f"cannot write {path}: {error.strerror or error}") from error
