"""A configuration parser whose errors name the path, the closest key or class, and the valid choices."""

from __future__ import annotations

import gc
import re
import sys
from argparse import _SubParsersAction
from collections.abc import Iterable, Iterator, Mapping
from inspect import isclass, isfunction
from typing import NoReturn

from jsonargparse import ArgumentParser
from pytorch_lightning.cli import LightningArgumentParser

from lightning_prune.errors import did_you_mean

_CHOICES = "Valid here: "
_UNKNOWN = re.compile(r"[Oo]ption '([\w.+-]+)'|unrecognized arguments: --([\w.]+)")
_NO_TASK = re.compile(r"arguments are required: (\w+\.)?model$", re.MULTILINE)
_NESTED = re.compile(r'Parser key "([\w.+]+)"')
_CLASS = re.compile(r"Problem with given class_path '([\w.]+)\.(\w+)'")
_BARE_NAME = re.compile(r"Expected a dot import path string: (\w+)$", re.MULTILINE)


def title_groups(parser: ArgumentParser, titles: Mapping[str, str]) -> None:
    """Name groups of options, by key or function, for the help: by itself it has the first lines of docstrings."""
    for name, title in titles.items():
        if (group := (parser.groups or {}).get(name)) is not None:
            group.title = title


class ExplainingParser(LightningArgumentParser):
    """Says what is wrong with a key before what jsonargparse says, and leaves out the usage.

    jsonargparse parses every class of a configuration by a parser of this kind, which knows that class's keys.
    """

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the cause and exit with status 2; within a class hand it to the parser around it."""
        unknown = _UNKNOWN.search(message)
        if unknown and _CHOICES not in message:  # else a parser within this one has said it
            message += f"\n{explain_key(unknown[1] or unknown[2], getattr(ex, 'subcommand_parser', self))}\n"
        if not self.exit_on_error:  # the value may still fit another type
            super().error(message, ex)
        if _NO_TASK.search(message):
            message = "no task is given: --config TASK.yaml, or a recipe's name (`lightning-prune recipes` lists them)"
        self.exit(2, f"error: {explain_error(message)}\n")


def explain_key(wrong: str, parser: ArgumentParser) -> str:
    """What to write instead of a key that a parser does not know."""
    keys = set(_keys(parser))
    prefix, _, last = wrong.rpartition(".")
    while prefix and not any(key.startswith(f"{prefix}.") for key in keys):
        prefix, _, last = prefix.rpartition(".")
    inside = f"{prefix}." if prefix else ""
    names = sorted({key.removeprefix(inside).partition(".")[0] for key in keys if key.startswith(inside)})
    return f"'{inside}{last}' is not accepted.{_choices(last, names)}"


def explain_error(message: str) -> str:
    """The cause in two lines, if it is a key or a class that does not exist, then jsonargparse's own message."""
    lines = message.splitlines()
    at = next((number for number, line in enumerate(lines) if _CHOICES in line), None)
    if at is not None:
        key, choices = (line.lstrip(" -") for line in lines[at - 1 : at + 1])
        cause = f"'{'.'.join([*_path(lines[:at]), key[1:]])}\n  {choices}"
        rest = [line for line in lines if line.lstrip(" -") not in (key, choices)]
        return "\n".join([cause, *(rest if len(rest) > 1 else [])])
    for path, name in _CLASS.findall(message):
        module = sys.modules.get(path)
        if module is not None and not hasattr(module, name):
            public = (other for other in dir(module) if not other.startswith("_"))  # what it imports on demand too
            names = [other for other in public if isfunction(value := getattr(module, other)) or isclass(value)]
            return f"there is no '{name}' in {path}.{_choices(name, names)}\n{message}"
    if bare := _BARE_NAME.search(message):
        imported = {found.__name__ for found in gc.get_objects() if issubclass(type(found), type)}
        hint = did_you_mean(bare[1], (name for name in imported if not name.startswith("_")))
        return f"there is no class '{bare[1]}'.{hint}\n{message}"
    return message


def _path(lines: list[str]) -> list[str]:
    """The keys that enclose the last of jsonargparse's lines, which it indents."""
    path: list[str] = []
    inside = len(lines[-1])
    for line in reversed(lines):
        indent = len(line) - len(line.lstrip(" -"))
        if indent < inside and (found := _NESTED.search(line)):
            path.insert(0, found[1])
            inside = indent
    return path


def _choices(wrong: str, names: Iterable[str]) -> str:
    return f"{did_you_mean(wrong, names, cutoff=0.5)}\n{_CHOICES}{', '.join(names)}"


def _keys(parser: ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        if isinstance(action, _SubParsersAction):
            for sub in action.choices.values():
                yield from _keys(sub)
        elif action.dest not in ("help", "config", "print_config", "print_shtab"):
            yield action.dest
