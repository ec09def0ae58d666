"""Build a model from its name: an import path, or a short name of torchvision."""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from torch import nn

from lightning_prune.cli.named_objects import find_object, is_module
from lightning_prune.errors import ModelError, did_you_mean


def build_model(path: str, arguments: Sequence[str] = ()) -> nn.Module:
    """Call what a path names with arguments as ``key=value``; weights are downloaded only if asked for."""
    keywords = dict(key_value("--arg", argument) for argument in arguments)
    if "." in path or ":" in path:
        factory = find_object(path)
    else:
        factory = _of_torchvision(path)
        if "weights_backbone" in inspect.signature(factory).parameters:
            keywords.setdefault("weights_backbone", None)
    if not callable(factory):
        raise ModelError(f"'{path}' is no class or function, but a {type(factory).__name__}.")
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
        raise ModelError(f"'{path}' returns a {type(model).__name__}, which is no torch.nn.Module.")
    return model


def _of_torchvision(name: str) -> Callable[..., nn.Module]:
    from torchvision import models

    try:
        return models.get_model_builder(name)
    except ValueError as error:
        if is_module(name):
            find_object(name)  # which names what is in it
        raise ModelError(
            f"torchvision has no model '{name}'.{did_you_mean(name, models.list_models())} Others go by "
            "package.module:name, or path/to/file.py:name"
        ) from error


def key_value(option: str, argument: str) -> tuple[str, Any]:
    """What stands after an option: a name, and a value as JSON or Python, or else as text."""
    key, equals, value = argument.partition("=")
    if not equals or not key.isidentifier():
        raise ModelError(f"{option} takes KEY=VALUE, got '{argument}'.")
    for read in (json.loads, ast.literal_eval):  # null and true, None and (1, 2)
        with suppress(ValueError, SyntaxError):
            return key, read(value)
    return key, value
