"""What a comparison consists of: cells, kept one file each, and their means and spreads over seeds."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import statistics
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lightning_prune.errors import PruningError
from lightning_prune.files import read_json, write_text

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from lightning_prune.criteria import Criterion

T = TypeVar("T")


@dataclass(frozen=True)
class Dense:
    """The model that every cell starts from.

    Attributes:
        accuracy: on the test part, in [0, 1].
        macs: multiply-accumulates per sample.
        params: trainable parameters.
    """

    accuracy: float
    macs: int
    params: int


@dataclass(frozen=True)
class Cell:
    """One criterion at one ratio from one seed.

    Attributes:
        criterion: its name in this comparison.
        ratio: what the selection was asked for.
        seed: of scoring batches and fine-tuning.
        before: accuracy of the pruned model on the test part, in [0, 1].
        after: the same after fine-tuning.
        macs: multiply-accumulates per sample of the reconstructed model.
        params: its trainable parameters.
        removed: share of the prunable groups' channels that are gone.
    """

    criterion: str
    ratio: float
    seed: int
    before: float
    after: float
    macs: int
    params: int
    removed: float


@dataclass(frozen=True)
class Refusal:
    """A criterion that cannot be used on this model, or at this ratio, and why."""

    criterion: str
    ratio: float
    reason: str


@dataclass(frozen=True)
class Spread:
    """Mean over seeds and sample standard deviation, None for a single seed.

    Example:
        >>> Spread.of([1.0, 3.0])
        Spread(mean=2.0, deviation=1.4142135623730951)
    """

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of these values."""
        found = [float(value) for value in values]
        return cls(statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None)


@dataclass(frozen=True)
class Row:
    """A criterion at a ratio, over all seeds."""

    criterion: str
    ratio: float
    seeds: int
    before: Spread
    after: Spread
    macs: Spread
    params: Spread


@dataclass(frozen=True)
class Comparison:
    """All that was measured.

    Attributes:
        dense: the common start.
        cells: in the order of criteria, ratios, seeds.
        refusals: what could not be done.
        settings: what all cells share, in words.
        metric: name of the accuracy.
    """

    dense: Dense
    cells: tuple[Cell, ...]
    refusals: tuple[Refusal, ...]
    settings: dict[str, Any]
    metric: str = "accuracy"

    @property
    def rows(self) -> tuple[Row, ...]:
        """One per criterion and ratio, by ratio, the most accurate after fine-tuning first."""
        found: dict[tuple[str, float], list[Cell]] = {}
        for cell in self.cells:
            found.setdefault((cell.criterion, cell.ratio), []).append(cell)
        measures = ("before", "after", "macs", "params")
        rows = [
            Row(*key, len(cells), *(Spread.of(getattr(cell, measure) for cell in cells) for measure in measures))
            for key, cells in found.items()
        ]
        return tuple(sorted(rows, key=lambda row: (row.ratio, -row.after.mean)))


def digest(settings: Any) -> str:
    """A name for plain data that changes with it."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def described(criterion: Criterion) -> str:
    """What tells a criterion from others: its settings, and of a user's own the code, which changes between runs."""
    modules = dict.fromkeys(cls.__module__ for cls in type(criterion).__mro__)
    own = [name for name in modules if name.partition(".")[0] not in ("lightning_prune", "abc", "builtins")]
    code = []
    for name in own:
        with suppress(OSError, TypeError):  # typed into a notebook: there is no file
            code.append(inspect.getsource(sys.modules[name]))
    return f"{criterion!r} {digest(code)[:12]}" if own else repr(criterion)


def cell_path(folder: Path, criterion: str, depends: Mapping[str, Any]) -> Path:
    """Where the cell of a criterion, ratio and seed is kept; see `named_path`."""
    return named_path(folder, f"{criterion}-{depends['ratio']:g}-seed{depends['seed']}", depends)


def named_path(folder: Path, name: str, depends: Mapping[str, Any]) -> Path:
    """Named after all that a cell's numbers depend on: cells of other settings are neither found nor overwritten."""
    stem = re.sub(r"[^\w.-]+", "-", name)
    return folder / "cells" / f"{stem}-{digest(depends)[:12]}.json"


def read_cell(path: Path) -> Cell | None:
    """The cell in a file, None if there is no file."""
    return read_kept(path, Cell)


def read_kept(path: Path, kind: type[T]) -> T | None:
    """The dataclass of plain data that `write_kept` wrote, None if there is no file."""
    if not path.is_file():
        return None
    data = read_json(path, PruningError, "cell of a comparison, which can be deleted to compute it anew")
    try:
        return kind(**{field.name: data[field.name] for field in fields(kind)})  # type: ignore[arg-type]
    except (ValueError, KeyError, TypeError) as error:
        message = f"{path} is no cell of a comparison ({error!r}); delete it to compute it anew"
        raise PruningError(message) from error


def write_kept(path: Path, cell: DataclassInstance, settings: Mapping[str, Any]) -> None:
    """Write a cell, with the settings it belongs to."""
    write_text(path, json.dumps({**asdict(cell), "settings": settings}, indent=1))
