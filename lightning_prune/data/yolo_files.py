"""Ultralytics' files for detection: a data.yaml, and a text file of boxes beside the folder of every image."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lightning_prune.data.folder_listing import PARTS, images_below, numbered_lines
from lightning_prune.errors import DataError

SLACK = 0.01  # by which ultralytics lets numbers leave 0 to 1
LabelledBox = tuple[int, list[float]]


class Description(NamedTuple):
    """What a data.yaml says: its path, the names of the classes, and the folders and lists of images of each part."""

    path: Path
    names: tuple[str, ...]
    places: dict[str, tuple[Path, ...]]


def read_description(root: Path) -> Description:
    """A data.yaml, or that of a folder; its ``download`` is never run."""
    path = root.absolute() / "data.yaml" if root.is_dir() else root.absolute()
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): root is a data.yaml or its folder") from error
    except (ValueError, yaml.YAMLError, RecursionError) as error:  # bytes that are no text; brackets without end
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise DataError(f"{path}{where}: no valid YAML ({getattr(error, 'problem', error)}); correct it") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} must hold names, train and val, got {type(content).__name__}")
    if "kpt_shape" in content:
        raise DataError(f"{path} describes key points (kpt_shape), whose label files are not read: only boxes are")
    base = _base(content.get("path"), path)
    places = {part: _places(content[part], part, base, path) for part in PARTS if content.get(part)}
    if missing := [part for part in PARTS[:2] if part not in places]:
        raise DataError(f"{path} has no {' and no '.join(missing)}: give each a folder or a list of images")
    return Description(path, _names(content, path), places)


def images_of(description: Description, part: str) -> list[Path]:
    """The images of a part: those below its folders, and those that its lists name, each with its line."""
    images: list[Path] = []
    for place in description.places[part]:
        before = len(images)
        if place.is_dir():
            images += images_below(place)
        else:
            for number, line in numbered_lines(place):
                images.append(_normal(place.parent / line))
                if not images[-1].is_file():
                    raise DataError(f"{place}, line {number}: {images[-1]} does not exist; correct the line")
        if len(images) == before:
            raise DataError(f"{place}, {part} of {description.path}, holds no image")
    return images


def label_file(image: Path) -> Path:
    """Where an image's boxes are: in ``labels`` in place of the last folder ``images`` of its path, as .txt."""
    parts = list(image.parts)
    folders = [place for place, name in enumerate(parts[:-1]) if name == "images"]
    if folders:
        parts[folders[-1]] = "labels"
    return Path(*parts).with_suffix(".txt")


def read_boxes(path: Path, num_classes: int) -> list[LabelledBox]:
    """Class and box (x1, y1, x2, y2), in shares of the image's sides, of each line of a label file.

    A line is a class, centre x and y, width and height; or a class and an outline of three or more points, of which
    the box around them is taken.
    """
    found = []
    for line, text in numbered_lines(path):
        where = f"{path}, line {line}"
        try:
            number, *shares = map(float, text.split())
        except ValueError as error:
            raise DataError(
                f"{where}: {error}; a line is class, centre x, centre y, width and height: correct it"
            ) from error
        if len(shares) != 4 and (len(shares) < 6 or len(shares) % 2):
            raise DataError(
                f"{where}: {len(shares) + 1} numbers are neither a box (class, centre x, centre y, width, height) nor "
                "an outline (class, then x and y of three or more points)"
            )
        if not number.is_integer() or not 0 <= number < num_classes:
            raise DataError(f"{where}: class {number:g} is none of {num_classes} names, 0 to {num_classes - 1}")
        if not all(-SLACK <= share <= 1 + SLACK for share in shares):
            raise DataError(f"{where}: {text[:80]!r} must be shares of the image's width and height, within 0 and 1")
        found.append((int(number), _around(shares)))
    return found


def _around(shares: list[float]) -> list[float]:
    """(x1, y1, x2, y2) of a box by its centre and size, or of an outline."""
    if len(shares) == 4:
        x, y, width, height = shares
        return [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
    across, down = shares[::2], shares[1::2]
    return [min(across), min(down), max(across), max(down)]


def _base(given: Any, path: Path) -> Path:
    """The folder that ``path`` of a data.yaml names, relative to the file or else to where we are."""
    if given is None:
        return path.parent
    if not isinstance(given, str):
        raise DataError(f"{path}: path is {given!r}, not the name of a folder")
    candidates = [_normal(place / given) for place in (path.parent, Path.cwd())]
    found = next((folder for folder in candidates if folder.is_dir()), None)
    if found is None:
        tried = " nor ".join(map(str, dict.fromkeys(candidates)))
        raise DataError(f"{path}: path is {given}, but there is no {tried}: correct it, or leave it out for the file's")
    return found


def _places(given: Any, part: str, base: Path, path: Path) -> tuple[Path, ...]:
    places = []
    for entry in given if isinstance(given, list) else [given]:
        if not isinstance(entry, str):
            raise DataError(f"{path}: {part} is {given!r}, neither a folder nor a list of images, nor several")
        # Exporters write ../train/images of the folder beside the file, and ultralytics forgives them.
        candidates = [_normal(base / name) for name in (entry, entry.removeprefix("../"))]
        found = next((place for place in candidates if place.exists()), None)
        if found is None:
            raise DataError(f"{path}: {part} is {entry}, but {candidates[0]} does not exist: add it, or correct {part}")
        places.append(found)
    return tuple(places)


def _names(content: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    """The classes' names in the order of their numbers."""
    given, count = content.get("names"), content.get("nc")
    if given is None and isinstance(count, int):
        given = [f"class_{number}" for number in range(count)]  # as ultralytics calls them
    if isinstance(given, dict):
        if sorted(map(str, given)) != sorted(map(str, range(len(given)))):
            raise DataError(f"{path}: names must be numbered from 0 without gaps, got {', '.join(map(str, given))}")
        given = [name for _, name in sorted(given.items(), key=lambda item: int(item[0]))]
    if not isinstance(given, list) or not given:
        raise DataError(f"{path}: names must be a list of names, or numbers from 0 with names, got {given!r}")
    if strange := [name for name in given if isinstance(name, bool) or not isinstance(name, str | int)]:
        raise DataError(f"{path}: names holds {strange[0]!r}, which is no text: put it in quotes")
    if count is not None and count != len(given):
        raise DataError(f"{path}: nc is {count}, but there are {len(given)} names")
    return tuple(map(str, given))


def _normal(path: Path) -> Path:
    """Without `..`, but with links as they are: labels lie beside them."""
    return Path(os.path.normpath(path))
