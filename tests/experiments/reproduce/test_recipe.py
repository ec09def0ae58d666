"""Recipes: all that ship are whole and name what exists; wrong ones are refused with what is wrong in them."""

from __future__ import annotations

from pathlib import Path

import pytest
from pytorch_lightning import LightningDataModule, LightningModule
from torch import nn

from lightning_prune.errors import ConfigurationError, UnknownRecipeError
from lightning_prune.experiments.reproduce.building import (
    built_task,
    criterion,
    parsed,
    prune_callback,
    schedule,
    selection,
    task_spec,
)
from lightning_prune.experiments.reproduce.pictures import PICTURES
from lightning_prune.experiments.reproduce.plain_data import in_folder, merged
from lightning_prune.experiments.reproduce.recipe import FOLDER, read_recipe, recipe_names
from lightning_prune.experiments.reproduce.run import KINDS
from tests.experiments.reproduce.tiny import CONTENT, recipe, smoke

NAMES = recipe_names()
LR = ["lr-table2", "lr-table3", "lr-table4", "lr-table5", "lr-table6", "lr-table7", "lr-table8"]
JRE = ["jre-table1", "jre-table2", "jre-table3", "jre-table4", "jre-figure2"]
OTHERS = ["guo-lenet", "lr-figure5", "lr-figure6"]
SCALES = [(name, scale) for name in NAMES for scale in read_recipe(name).scales]


def test_there_is_a_recipe_for_every_published_table_and_figure() -> None:
    assert sorted(NAMES) == sorted(LR + JRE + OTHERS)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_starts_with_what_it_is_of(name: str) -> None:
    first = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ")
    assert 40 <= len(first) <= 122


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_whole(name: str) -> None:
    found = read_recipe(name)
    assert found.kind in KINDS
    assert set(found.pictures) <= set(PICTURES)
    assert {"smoke", "paper"} <= set(found.scales)
    assert found.known
    for scale in found.scales.values():
        assert found.chosen(scale)
    if name == "jre-figure2":
        return  # pictures without numbers
    printed = {key for row in found.rows for key in found.published(row)}
    assert printed & set(found.columns)


@pytest.mark.parametrize(("name", "scale"), SCALES)
def test_all_that_a_scale_names_exists_and_takes_what_it_is_given(name: str, scale: str) -> None:
    found = read_recipe(name)
    settings = found.scale(scale)
    models = {**found.models, **settings.models}
    for key, spec in models.items():
        parsed(nn.Module, spec, key)
    if settings.data is not None:
        parsed(LightningDataModule, in_folder(settings.data, "somewhere"), "data")
        for training in (settings.dense, settings.tune):
            assert training is not None
            for spec in models.values():
                parsed(LightningModule, task_spec(settings.task, spec, training), "task")
    for row in found.chosen(settings):
        if not row.dense:
            how = found.pruning(row, settings)
            assert repr(criterion(how, 3, row.label))
            assert selection(how, row.label).ratio == how.ratio
            schedule(how, row.label)
            prune_callback(how, 0, "after", row.label)


@pytest.mark.parametrize(("name", "scale"), [pair for pair in SCALES if pair[1] != "paper" and pair[0] != "lr-table5"])
def test_the_tasks_of_the_small_scales_are_built_and_run(name: str, scale: str) -> None:
    found = read_recipe(name)
    settings = found.scale(scale)
    for model in dict.fromkeys(row.model for row in found.chosen(settings)):
        task = built_task(settings.task, settings.models[model], settings.dense, name)
        task(task.example_input_array)


def test_data_stand_where_the_command_line_says() -> None:
    assert in_folder({"a": ["{data}/x", 3]}, "here") == {"a": ["here/x", 3]}


# --- published numbers


def test_what_follows_from_published_numbers() -> None:
    table = read_recipe("lr-table2")
    row = next(row for row in table.rows if row.label == "ResNet-50 L2 .5")
    values = table.published(row)
    assert values["change"] == pytest.approx(0.03)
    assert values["left"] == pytest.approx(100 * 269.02 / 661.00)
    assert "change" not in table.published(next(row for row in table.rows if row.label == "ResNet-50"))
    jre = read_recipe("jre-table1")
    assert jre.published(jre.rows[1])["left"] == pytest.approx(100 / 2.1)


# --- rows


def test_rows_are_named_by_patterns_and_by_parts() -> None:
    table = read_recipe("lr-table2")
    smoke_scale = table.scale("smoke")
    assert len(table.chosen(smoke_scale)) == len(table.rows)
    assert [row.label for row in table.chosen(smoke_scale, ["gm .45"])] == ["ResNet-101 GM .45"]
    assert {row.model for row in table.chosen(smoke_scale, ["ResNet-50*"])} == {"resnet50"}
    with pytest.raises(ConfigurationError, match="no row of lr-table2 fits nonsense"):
        table.chosen(smoke_scale, ["nonsense"])


def test_what_a_row_says_goes_before_the_scale_and_the_recipe() -> None:
    changes = {"prune": {"order": "B", "coupling": "joint"}, **smoke(prune={"order": "A", "score_batches": 3})}
    rows = [*CONTENT["rows"], {"label": "own", "model": "net", "criterion": "l2", "score_batches": 7}]
    found = recipe({**changes, "rows": rows})
    how = found.pruning(found.rows[-1], found.scale("smoke"))
    assert (how.order, how.coupling, how.score_batches, how.criterion) == ("A", "joint", 7, "l2")


# --- refusals


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"colour": "red"}, "recipe tiny: 'colour' is not accepted. Valid here: name, title"),
        (smoke(epochs=3), "recipe tiny, smoke: 'epochs' is not accepted"),
        (smoke(dense={"epoch": 3}), "recipe tiny, smoke, dense: 'epoch' is not accepted"),
        ({"rows": [{"label": "a", "model": "net", "criterium": "l1"}]}, "'criterium' is not accepted"),
        ({"rows": [{"label": "a", "model": "other"}]}, "is of a model 'other', which models lacks"),
        ({"rows": [{"label": "a", "model": "net"}] * 2}, "two rows of one label"),
        ({"rows": [{"model": "net"}]}, "'label' is missing"),
        ({"kind": "magic"}, "kind must be one of pruned, masked"),
        ({"scales": {"huge": CONTENT["scales"]["smoke"]}}, "scale must be one of smoke, hour, paper"),
        (smoke(choose="worst"), "choose must be one of last, best"),
        (smoke(task=None), "task and data belong together"),
    ],
)
def test_a_wrong_recipe_is_refused(changes: dict, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        recipe(changes)


def test_a_class_that_does_not_exist_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"(?s)here: .*NoModule"):
        parsed(LightningDataModule, {"class_path": "lightning_prune.data.NoModule"}, "here")
    spec = {"class_path": "lightning_prune.data.DigitsDataModule", "init_args": {"sizes": 8}}
    with pytest.raises(ConfigurationError, match=r"(?s)here: .*sizes"):
        parsed(LightningDataModule, spec, "here")


def test_an_unknown_recipe_or_scale_is_told_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UnknownRecipeError, match="Did you mean 'lr-table2'"):
        read_recipe("lr-tabel2")
    with pytest.raises(ConfigurationError, match="tiny has no scale 'hour', only smoke"):
        recipe().scale("hour")
    (tmp_path / "odd.yaml").write_text("- 1")
    with pytest.raises(ConfigurationError, match=r"odd\.yaml is no recipe: it holds a list"):
        read_recipe(str(tmp_path / "odd.yaml"))


def test_settings_of_another_class_replace_those_of_the_first() -> None:
    base = {"data": {"class_path": "A", "init_args": {"x": 1, "y": 2}}}
    assert merged(base, {"data": {"init_args": {"x": 3}}}) == {
        "data": {"class_path": "A", "init_args": {"x": 3, "y": 2}}
    }
    assert merged(base, {"data": {"class_path": "B", "init_args": {"z": 3}}})["data"]["init_args"] == {"z": 3}
