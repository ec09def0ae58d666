"""Turn jsonargparse's report of a wrong key into its path, the closest match and the valid choices."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from argparse import _SubParsersAction
from collections.abc import Iterable

from jsonargparse import ArgumentParser

_CLASS = re.compile(r"Problem with given class_path '([\w.]+)'")
_KEY = re.compile(r'Parser key "([\w.+]+)"')
_OPTION = re.compile(r"(?:Option|does not accept option) '([\w.+-]+)'")
_CALLABLE = re.compile(r"expects a function or a callable class.*class_path='([\w.]+)'")
_ATTRIBUTE = re.compile(r"module '([\w.]+)' has no attribute '(\w+)'")
_BARE_NAME = re.compile(r"Expected a dot import path string: (\w+)$")
_BASE = re.compile(r"Subtypes: .*?<class '[\w.]*?(\w+)'")
_COMMAND = re.compile(r"Subcommand '(\w+)'")
_UNRECOGNIZED = re.compile(r"[Uu]nrecognized arguments: --([\w.]+)")


def explain(message: str, parser: ArgumentParser) -> str:
    """Rewrite an error message of `parser`; one that is not about a wrong key or class is returned as it is.

    Example:
        >>> parser = ArgumentParser()
        >>> _ = parser.add_argument("--epochs", type=int)
        >>> print(explain("Option 'epoch' is not accepted", parser))
        'epoch' is not accepted. Did you mean 'epochs'?
          Valid here: epochs
    """
    path: list[tuple[int, str]] = []  # (indent, key) of the keys that enclose the current line
    classes: list[tuple[int, str]] = []
    base: str | None = None  # the class that a value is expected to be a subclass of
    for line in filter(str.strip, message.splitlines()):
        indent = len(line) - len(line.lstrip(" -"))
        path = [entry for entry in path if entry[0] < indent]
        classes = [entry for entry in classes if entry[0] < indent]
        if found := _KEY.search(line):
            path.append((indent, found[1]))
            base = None
        if found := _CLASS.search(line):
            classes.append((indent, found[1]))
        if found := _BASE.search(line):
            base = found[1]
        where = [key for _, key in path]
        if found := _OPTION.search(line) or _UNRECOGNIZED.search(line):
            as_callable = _CALLABLE.search(line)
            if as_callable:
                return _refuse(where, found[1], as_callable[1], _parameters(as_callable[1], skip=1))
            if classes:
                return _refuse(where, found[1], classes[-1][1], _parameters(classes[-1][1], skip=0))
            return _refuse_top(found[1], _subparser(message, parser))
        if found := _ATTRIBUTE.search(line):
            return _refuse_class(where, found[2], f" in {found[1]}", _public_names(found[1]))
        if (found := _BARE_NAME.search(line)) and base:
            return _refuse_class(where, found[1], f" among the subclasses of {base}", _subclass_names(base))
        if found:
            full = ".".join([*where, "class_path"])
            return f"'{full}': '{found[1]}' is no import path, such as torchvision.models.resnet18 is one."
    return message


def _refuse(where: list[str], wrong: str, owner: str, valid: Iterable[str]) -> str:
    names = sorted(set(valid))
    full = ".".join([*where, wrong])
    return f"'{full}' is not accepted by {owner}.{_closest(wrong, names)}\n  Valid here: {', '.join(names)}"


def _refuse_class(where: list[str], wrong: str, place: str, valid: Iterable[str]) -> str:
    names = sorted(set(valid))
    full = ".".join([*where, "class_path"])
    hint = _closest(wrong, names)
    return f"'{full}': there is no '{wrong}'{place}.{hint}\n  Valid here: {', '.join(names)}"


def _refuse_top(wrong: str, parser: ArgumentParser) -> str:
    keys = _parser_keys(parser)
    prefix, _, last = wrong.rpartition(".")
    while prefix and not any(key.startswith(f"{prefix}.") for key in keys):
        prefix, _, last = prefix.rpartition(".")
    inside = f"{prefix}." if prefix else ""
    names = sorted({key[len(inside) :].partition(".")[0] for key in keys if key.startswith(inside)})
    full = f"{inside}{last}"
    return f"'{full}' is not accepted.{_closest(last, names)}\n  Valid here: {', '.join(names)}"


def _closest(wrong: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(wrong, list(names), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def _subparser(message: str, parser: ArgumentParser) -> ArgumentParser:
    """The parser of the sub-command that the message names, or else `parser` itself."""
    found = _COMMAND.search(message)
    for action in parser._actions:
        if found and isinstance(action, _SubParsersAction) and found[1] in action.choices:
            return action.choices[found[1]]
    return parser


def _parser_keys(parser: ArgumentParser) -> set[str]:
    keys: set[str] = set()
    for action in parser._actions:
        if isinstance(action, _SubParsersAction):
            for sub in action.choices.values():
                keys |= _parser_keys(sub)
        elif action.dest not in ("help", "config", "print_config", "print_shtab"):
            keys.add(action.dest)
    return keys


def _parameters(class_path: str, skip: int) -> list[str]:
    """Keys that jsonargparse accepts for a class or function, leaving out its first `skip` parameters."""
    module, _, name = class_path.rpartition(".")
    target = getattr(importlib.import_module(module), name)
    parser = ArgumentParser()
    skipped: set[str | int] = {skip} if skip else set()
    if inspect.isclass(target):
        return parser.add_class_arguments(target, skip=skipped, fail_untyped=False)
    return parser.add_function_arguments(target, skip=skipped, fail_untyped=False)


def _public_names(module: str) -> list[str]:
    """Classes and functions of a module that belong to its own package."""
    package = module.partition(".")[0]
    members = vars(importlib.import_module(module)).items()
    return [
        name
        for name, value in members
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__.partition(".")[0] == package
    ]


def _subclass_names(base: str) -> list[str]:
    """Public names of the imported classes below the class that is called `base`."""
    roots = [cls for cls in _descendants(object) if cls.__name__ == base]
    return [cls.__name__ for root in roots for cls in _descendants(root) if not cls.__name__.startswith("_")]


def _descendants(root: type) -> set[type]:
    found: set[type] = set()
    pending = [root]
    while pending:
        below: set[type] = set(type.__subclasses__(pending.pop())) - found
        found |= below
        pending.extend(below)
    return found
