"""Recipes of published tables and figures: plain data in YAML, read and checked before anything is built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from lightning_prune.errors import ConfigurationError, UnknownRecipeError, check_choice, did_you_mean
from lightning_prune.experiments.reproduce.plain_data import filled, merged
from lightning_prune.experiments.runner import Precision
from lightning_prune.files import read_yaml
from lightning_prune.plan import Coupling

Spec = Mapping[str, Any]  # class_path and init_args
ScaleName = Literal["smoke", "hour", "paper"]
KindName = Literal["pruned", "masked", "timed", "feature_maps", "rounds"]
Choose = Literal["last", "best"]
SCALES: tuple[ScaleName, ...] = ("smoke", "hour", "paper")
FOLDER = Path(str(resources.files("lightning_prune") / "conf" / "reproduce"))


@dataclass(frozen=True)
class Pruning:
    """How the model of a row is pruned.

    Attributes:
        criterion: a name, or class_path and init_args; None: the dense model.
        ratio: what the selection is asked for.
        selection, schedule: class_path and init_args; the ratio is added to the selection's.
        order: A: prune, fine-tune, reconstruct; B: prune, reconstruct, fine-tune.
        coupling, batch_norm, score_batches, score_epochs: see `PruneCallback`.
    """

    criterion: str | Spec | None = None
    ratio: float = 0.5
    selection: Spec = field(default_factory=lambda: {"class_path": "lightning_prune.LayerRatio"})
    schedule: Spec | None = None
    order: Literal["A", "B"] = "A"
    coupling: Coupling = "union"
    batch_norm: bool = True
    score_batches: int | None = None
    score_epochs: int = 1

    @property
    def random(self) -> bool:
        """Whether chance decides, so that what is left can be counted without training."""
        return self.criterion == "random"


@dataclass(frozen=True)
class Row:
    """One row of a table, or one curve of a figure.

    Attributes:
        label: its name.
        model: a name in the recipe's ``models``.
        published: numbers by column, in the units that the columns show.
        prune: what differs from the recipe's `Pruning`.
    """

    label: str
    model: str
    published: Mapping[str, float] = field(default_factory=dict)
    prune: Mapping[str, Any] = field(default_factory=dict)

    @property
    def dense(self) -> bool:
        """Whether nothing is pruned."""
        return self.prune.get("criterion") is None


@dataclass(frozen=True)
class Training:
    """How long, by what optimizer and schedule (class_path and init_args, or a name of the task's), how precisely."""

    epochs: int
    optimizer: Spec
    lr_scheduler: str | Spec = "cosine"
    precision: Precision = "32-true"

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, Precision, ConfigurationError)


@dataclass(frozen=True)
class Scale:
    """How much of the published experiment is run.

    Attributes:
        about: what is trained on what, for the page.
        cost: of time, in words.
        data, task: class_path and init_args; the task without model and optimizer. None: nothing is trained.
        models: those that stand in for the recipe's; where none does, that of the recipe is trained.
        dense, tune: training of the dense model, and of pruned ones.
        seeds: of everything random, the dense training included.
        rows: patterns of labels; the others are left out.
        choose: ``last``: the last epoch counts; ``best``: the one with the best validation.
        prune: what differs from the recipe's `Pruning`.
        options: of the recipe's kind.
    """

    about: str
    cost: str
    data: Spec | None = None
    task: Spec | None = None
    models: Mapping[str, Spec] = field(default_factory=dict)
    dense: Training | None = None
    tune: Training | None = None
    seeds: Sequence[int] = (0,)
    rows: Sequence[str] = ("*",)
    choose: Choose = "last"
    prune: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("choose", self.choose, Choose, ConfigurationError)


@dataclass(frozen=True)
class Recipe:
    """One published table or figure.

    Attributes:
        name: of its file.
        title: what it is about.
        paper: where it was published.
        item: which table or figure of it.
        rows: what it shows.
        columns: titles by key; a key is a name in a cell's values.
        models: the published ones, class_path and init_args.
        scales: by name.
        kind: what a cell is: ``pruned``, ``masked``, ``timed``, ``feature_maps`` or ``rounds``.
        metrics: names of logged metrics from 0 to 1; the first is compared with the dense model's.
        units: of published FLOPs and parameters: M or G.
        input_size: of one image, for counting the published models.
        stacked: a line of the table for the paper and one for ours, where there are too many columns.
        known: what is known of the published protocol, and to differ from it here.
        pictures: names of `lightning_prune.experiments.reproduce.pictures.PICTURES`.
        prune: common to all rows.
    """

    name: str
    title: str
    paper: str
    item: str
    rows: tuple[Row, ...]
    columns: Mapping[str, str]
    models: Mapping[str, Spec]
    scales: Mapping[str, Scale]
    kind: KindName = "pruned"
    metrics: Sequence[str] = ("acc",)
    units: Mapping[str, str] = field(default_factory=lambda: {"flops": "M", "params": "M"})
    input_size: Sequence[int] = (3, 32, 32)
    stacked: bool = False
    known: Sequence[str] = ()
    pictures: Sequence[str] = ()
    prune: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        where = f"recipe {self.name}"
        check_choice(f"{where}: kind", self.kind, KindName, ConfigurationError)
        labels = [row.label for row in self.rows]
        if len(set(labels)) < len(labels):
            raise ConfigurationError(f"{where}: two rows of one label")
        for row in self.rows:
            if row.model not in self.models:
                raise ConfigurationError(f"{where}: {row.label!r} is of a model {row.model!r}, which models lacks")
        for name, scale in self.scales.items():
            check_choice(f"{where}: scale", name, ScaleName, ConfigurationError)
            if (scale.task is None) != (scale.data is None):
                raise ConfigurationError(f"{where}, {name}: task and data belong together")
            for row in self.rows:
                self.pruning(row, scale)

    def scale(self, name: str) -> Scale:
        """The scale of that name.

        Raises:
            ConfigurationError: the recipe has none.
        """
        if name not in self.scales:
            raise ConfigurationError(f"{self.name} has no scale {name!r}, only {', '.join(self.scales)}")
        return self.scales[name]

    def pruning(self, row: Row, scale: Scale | None = None) -> Pruning:
        """How a row is pruned at a scale, or as published."""
        settings = {**self.prune, **({} if scale is None else scale.prune), **row.prune}
        return filled(Pruning, settings, f"recipe {self.name}, {row.label!r}")

    def chosen(self, scale: Scale, only: Sequence[str] = ()) -> list[Row]:
        """The rows that a scale runs; of these, those that a pattern, or a part of the label, names.

        Raises:
            ConfigurationError: nothing fits.
        """
        rows = [row for row in self.rows if any(fnmatchcase(row.label, pattern) for pattern in scale.rows)]
        if only:
            rows = [row for row in rows if any(_named(row.label, pattern) for pattern in only)]
        if not rows:
            labels = "\n  ".join(row.label for row in self.rows)
            raise ConfigurationError(f"no row of {self.name} fits {', '.join(only or scale.rows)}. Rows:\n  {labels}")
        return rows

    def published(self, row: Row) -> dict[str, float]:
        """What the paper prints of a row, and what follows from it and the dense model's row."""
        values = dict(row.published)
        dense: Mapping[str, float] = {}
        if not row.dense:
            dense = next((of.published for of in self.rows if of.model == row.model and of.dense), {})
        if "times" in values:
            values.setdefault("left", 100 / values["times"])
        for key, cost in (("left", "flops"), ("params_left", "params")):
            if cost in values and cost in dense:
                values.setdefault(key, 100 * values[cost] / dense[cost])
        metric = self.metrics[0]
        if metric in values and metric in dense:
            values.setdefault("change", values[metric] - dense[metric])
        return values


def recipe_names() -> list[str]:
    """The recipes that ship with the package, in alphabetical order."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read_recipe(name: str) -> Recipe:
    """A shipped recipe by its name, or one of your own by the path of its file.

    Raises:
        UnknownRecipeError: neither.
        ConfigurationError: unknown, missing or contradictory settings, named.

    Example:
        >>> recipe = read_recipe("lr-table2")
        >>> recipe.item, recipe.rows[0].published["flops"]
        ('Table 2', 1269.58)
    """
    path = Path(name) if name.endswith(".yaml") else FOLDER / f"{name}.yaml"
    if not path.is_file():
        cause = f"there is no recipe '{name}'.{did_you_mean(name, recipe_names())}"
        raise UnknownRecipeError("\n  ".join([f"{cause}\nRecipes:", *recipe_names()]))
    try:
        return recipe_from(_content(path), path.stem)
    except ConfigurationError as error:
        if path.name in str(error):
            raise
        raise ConfigurationError(f"{path}: {error}") from error


def recipe_from(content: Mapping[str, Any], name: str) -> Recipe:
    """A recipe of plain data; ``settings`` names a file of the shipped ones that it goes on from."""
    where, data = f"recipe {name}", dict(content)
    if shared := data.pop("settings", None):
        base = _content(FOLDER / "settings" / f"{shared}.yaml")
        data = {**merged(base, data), "known": [*data.get("known", ()), *base.get("known", ())]}
    own = {field.name for field in fields(Row)} - {"prune"}
    rows = [
        {**{key: row[key] for key in own & set(row)}, "prune": {k: v for k, v in row.items() if k not in own}}
        for row in data.get("rows", ())
    ]
    data["rows"] = tuple(filled(Row, row, f"{where}, a row") for row in rows)
    data["scales"] = {key: _scale(scale, f"{where}, {key}") for key, scale in data.get("scales", {}).items()}
    return filled(Recipe, {"name": name, **data}, where)


def _scale(data: Mapping[str, Any], where: str) -> Scale:
    trainings = {
        key: filled(Training, data[key], f"{where}, {key}") for key in ("dense", "tune") if data.get(key) is not None
    }
    return filled(Scale, {**data, **trainings}, where)


def changed(scale: Scale, seeds: Sequence[int] | None = None, precision: Precision | None = None) -> Scale:
    """The same scale with other seeds, or trained in another precision.

    Raises:
        ConfigurationError: no such precision, or nothing is trained.
    """
    if precision is not None:
        if scale.dense is None:
            raise ConfigurationError(f"precision={precision!r}: nothing is trained at this scale")
        scale = replace(scale, dense=replace(scale.dense, precision=precision))
        scale = scale if scale.tune is None else replace(scale, tune=replace(scale.tune, precision=precision))
    return scale if not seeds else replace(scale, seeds=tuple(seeds))


def _content(path: Path) -> dict[str, Any]:
    return read_yaml(path, ConfigurationError, "recipe")


def _named(label: str, pattern: str) -> bool:
    return fnmatchcase(label.lower(), pattern.lower()) or pattern.lower() in label.lower()
