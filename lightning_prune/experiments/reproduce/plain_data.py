"""Plain data of recipes: merged, placed in a folder, turned into dataclasses that refuse what they do not know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from lightning_prune.errors import ConfigurationError

T = TypeVar("T")
DATA = "{data}"  # in a recipe: the folder that --data names


def merged(base: Any, over: Any) -> Any:
    """Plain data with other data on top: mappings are merged, but for those of another class_path; the rest replaced.

    Example:
        >>> merged({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}})
        {'a': {'b': 3, 'c': 2}}
    """
    if not isinstance(base, Mapping) or not isinstance(over, Mapping):
        return over
    if "class_path" in over and over["class_path"] != base.get("class_path"):
        return over
    return {**base, **{key: merged(base.get(key), value) for key, value in over.items()}}


def in_folder(spec: Any, folder: str) -> Any:
    """The same plain data with the folder of --data in its place."""
    if isinstance(spec, Mapping):
        return {key: in_folder(value, folder) for key, value in spec.items()}
    if isinstance(spec, (list, tuple)):
        return [in_folder(value, folder) for value in spec]
    return spec.replace(DATA, folder) if isinstance(spec, str) else spec


def filled(kind: type[T], data: Mapping[str, Any], where: str) -> T:
    """A dataclass from a mapping that may only have its fields."""
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    if unknown := [key for key in data if key not in known]:
        raise ConfigurationError(f"{where}: '{unknown[0]}' is not accepted. Valid here: {', '.join(known)}")
    needed = [n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in needed if name not in data]:
        raise ConfigurationError(f"{where}: '{missing[0]}' is missing; add it")
    return kind(**data)
