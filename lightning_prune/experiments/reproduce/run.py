"""One published table or figure, row by row and seed by seed; what is there already is found again."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_prune.errors import PlanError, PruningError, first_line
from lightning_prune.experiments.comparison.cells import read_kept
from lightning_prune.experiments.reproduce.cells import Cell, Progress, Study, machine
from lightning_prune.experiments.reproduce.costs import count_published
from lightning_prune.experiments.reproduce.feature_maps import feature_maps
from lightning_prune.experiments.reproduce.pruned import masked, pruned
from lightning_prune.experiments.reproduce.recipe import KindName, Recipe, Row, Scale, changed, read_recipe
from lightning_prune.experiments.reproduce.rounds import rounds
from lightning_prune.experiments.reproduce.timed import timed
from lightning_prune.experiments.runner import Precision, quiet
from lightning_prune.files import check_writable, write_text

KINDS: dict[KindName, Callable[[Study, Row, int], Cell]] = {
    "pruned": pruned,
    "masked": masked,
    "timed": timed,
    "feature_maps": feature_maps,
    "rounds": rounds,
}


@dataclass(frozen=True)
class Refused:
    """A row that could not be computed from one seed, and why."""

    row: str
    seed: int
    reason: str


@dataclass
class Reproduction:
    """What was reproduced so far.

    Attributes:
        recipe: of what.
        name: of the scale.
        scale: how much of it.
        rows: those that were asked for.
        costs: counted at the published architectures.
        cells: in the order of rows and seeds.
        refused: what could not be done.
        machine: where and with what.
        complete: whether no row is still to come.
    """

    recipe: Recipe
    name: str
    scale: Scale
    rows: list[Row]
    costs: list[Cell] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=machine)
    complete: bool = False

    def of(self, row: Row) -> list[Cell]:
        """The cells of a row, one per seed."""
        return [cell for cell in self.cells if cell.row == row.label]

    @property
    def seconds(self) -> float:
        """What all cells took when they were computed, and the dense models that they share."""
        return sum(cell.seconds for cell in (*self.costs, *self.cells))


Outcome = Cell | Refused


def reproduce(
    recipe: Recipe | str,
    scale: str = "smoke",
    output: str | Path = "runs/reproduce",
    *,
    data: str | None = None,
    seeds: Sequence[int] | None = None,
    precision: Precision | None = None,
    only: Sequence[str] = (),
    progress: bool = False,
    on_progress: Progress | None = None,
    on_outcome: Callable[[Outcome], None] | None = None,
) -> Reproduction:
    """Compute the rows of a recipe at a scale; nothing is computed twice, in whatever way the run before ended.

    A training that was killed goes on after its last whole epoch, or round.

    A row that is refused, or fails, is noted with its reason, and the others go on. Ctrl-C ends the run with what
    there is.

    Args:
        recipe: name of a shipped recipe, path of one, or a recipe.
        scale: ``smoke``, ``hour`` or ``paper``.
        output: folder for cells and dense weights.
        data: folder that takes the place of ``{data}`` in the recipe.
        seeds: instead of the scale's.
        precision: of all training, such as ``bf16-mixed``, instead of the scale's; tests are in float32.
        only: patterns, or parts, of the labels of rows; the others are left out.
        progress: show progress bars.
        on_progress: called after every epoch, or round, with what is trained and what came out: plain numbers.
        on_outcome: called with every cell and refusal as soon as it is known.

    Raises:
        ConfigurationError: no such recipe, scale or row; or data that have to be named.
        DataError: the data are not there.
        PlanError: a seed twice, or out of range.
    """
    recipe = read_recipe(recipe) if isinstance(recipe, str) else recipe
    settings, output = changed(recipe.scale(scale), seeds, precision), Path(output)
    if len(set(settings.seeds)) < len(settings.seeds) or any(not 0 <= seed < 2**31 for seed in settings.seeds):
        raise PlanError(f"seeds must be integers in [0, 2**31), each once, got {list(settings.seeds)}")
    check_writable(output / "page.md")
    study = Study(recipe, settings, output, data, progress=progress, on_progress=on_progress)
    found = Reproduction(recipe, scale, settings, recipe.chosen(settings, only))
    try:
        with quiet():
            if not _all_kept(study, found.rows) and study.data_spec is not None:
                study.data  # noqa: B018  # refused before the work
            found.costs = count_published(recipe, output)
            for outcome in _outcomes(study, found):
                (found.cells if isinstance(outcome, Cell) else found.refused).append(outcome)  # type: ignore[arg-type]
                if on_outcome is not None:
                    on_outcome(outcome)
        found.complete = True
    except (KeyboardInterrupt, SystemExit):  # the Trainer turns the one into the other
        pass
    return found


def _outcomes(study: Study, found: Reproduction) -> Iterator[Outcome]:
    compute = KINDS[study.recipe.kind]
    for row in found.rows:
        for seed in study.scale.seeds:
            path = study.row_path(row, seed)
            cell = read_kept(path, Cell)
            if cell is None:
                try:
                    cell = compute(study, row, seed)
                except PruningError as error:
                    yield Refused(row.label, seed, str(error))
                    continue
                except Exception as error:  # noqa: BLE001  # a row that breaks leaves the others
                    report = study.output / "errors" / f"{path.stem}.txt"
                    write_text(report, traceback.format_exc())
                    yield Refused(row.label, seed, f"{first_line(error)} (see {report})")
                    continue
                study.write(path, cell)
            yield cell


def _all_kept(study: Study, rows: Sequence[Row]) -> bool:
    return all(study.row_path(row, seed).is_file() for row in rows for seed in study.scale.seeds)
