"""What the command line names in Python: `package.module.name`, `package.module:name` or `path/to/file.py:name`."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from lightning_prune.errors import ModelError, did_you_mean, first_line

_FORMS = "package.module:name, package.module.name or path/to/file.py:name"


def is_path(word: str) -> bool:
    """Whether a word names an object, and not something of the package by its short name."""
    return "." in word or ":" in word


def find_object(path: str, what: Literal["model", "criterion"] = "model") -> Any:
    """The object that a path names, to build ``what`` is asked for.

    Raises:
        ModelError: the part of it that is wrong; of a module alone, what it holds.
    """
    place, _, name = path.partition(":") if ":" in path else _split(path)
    module = _of_file(Path(place)) if place.endswith(".py") else _module(place, path)
    if not name:
        raise ModelError(f"'{path}' is a module; name what builds the {what} in it:{_candidates(place, module, what)}")
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            public = [other for other in vars(found) if not other.startswith("_")] if hasattr(found, "__dict__") else []
            raise ModelError(f"there is no '{name}' in {place}.{did_you_mean(part, public)}")
        found = getattr(found, part)
    if isinstance(found, ModuleType):
        raise ModelError(f"'{path}' is a module; name what builds the {what} in it:{_candidates(path, found, what)}")
    return found


def is_object_path(word: str) -> bool:
    """Whether a word names something in Python rather than a file of weights."""
    place, colon, name = word.partition(":")
    return place.endswith(".py") or (bool(colon) and all(map(str.isidentifier, f"{place}.{name}".split("."))))


def _split(path: str) -> tuple[str, str, str]:
    """The module and the rest of a path of dots: the longest part that is a module."""
    if path.endswith(".py"):
        return path, "", ""
    parts = path.split(".")
    for length in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:length])
        if module in sys.modules or is_module(module):
            return module, ".", ".".join(parts[length:])
    return (path, "", "") if len(parts) == 1 else (".".join(parts[:-1]), ".", parts[-1])


def is_module(name: str) -> bool:
    """Whether such a module can be found; what it holds is not run, what holds it is."""
    try:
        return importlib.util.find_spec(name) is not None
    except Exception:  # noqa: BLE001  # a package around it may fail in any way; importing it will tell
        return False


def _module(name: str, path: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise ModelError(f"'{path}': {error}. Name it as {_FORMS}.") from error
        raise ModelError(f"'{path}': importing {name} fails: {first_line(error)}.") from error
    except (Exception, SystemExit) as error:
        raise ModelError(f"'{path}': importing {name} fails: {first_line(error)}.") from error


def _of_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ModelError(f"there is no file {path}")
    name = path.stem
    known = sys.modules.get(name)
    origin = getattr(known, "__file__", None)
    if known is not None and origin is not None and Path(origin).absolute() == path.absolute():
        return known
    if known is not None or not name.isidentifier():
        name = f"_file_{abs(hash(path.absolute())):x}"
    if (folder := str(path.absolute().parent)) not in sys.path:
        sys.path.append(folder)  # what the file imports from beside it; last, to shadow nothing
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ModelError(f"{path} fails: {first_line(error)}") from error
    return module


def _candidates(place: str, module: ModuleType, what: str) -> str:
    """What a module itself defines that can be called, first what is sure to be a model; or its criteria."""
    from torch import nn

    from lightning_prune.criteria import Criterion

    own = {name: value for name, value in vars(module).items() if not name.startswith("_") and callable(value)}
    own = {name: value for name, value in own.items() if getattr(value, "__module__", None) == module.__name__}
    kind = nn.Module if what == "model" else Criterion
    classes = [name for name, value in own.items() if inspect.isclass(value) and issubclass(value, kind)]
    functions = [name for name, value in own.items() if inspect.isfunction(value) and what == "model"]
    names = [*classes, *functions][:8]
    return f" {', '.join(f'{place}:{name}' for name in names)}" if names else f" nothing in it can be called ({_FORMS})"
