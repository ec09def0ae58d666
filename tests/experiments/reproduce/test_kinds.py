"""Cells of the tables that are not plain pruning: masks and couplings, latency, feature maps, rounds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lightning_prune as lp
from lightning_prune.experiments.reproduce import Cell, reproduce
from lightning_prune.experiments.reproduce.cells import Study
from lightning_prune.experiments.reproduce.history import BestEpoch
from lightning_prune.experiments.reproduce.timed import pruned_to
from tests.experiments.reproduce.tiny import CONTENT, TinyNet, recipe, smoke

DENSE = CONTENT["rows"][0]


def cells(folder: Path, changes: dict) -> dict[str, Cell]:
    found = reproduce(recipe(changes), "smoke", folder)
    assert not found.refused, found.refused
    return {cell.row: cell for cell in found.cells}


# --- masked: Tables 7 and 8


def test_union_keeps_what_the_masked_network_reaches_and_intersection_cuts_more(tmp_path: Path) -> None:
    rows = [{"label": "GM", "model": "net", "criterion": "random", "ratio": 0.5}]
    columns = {"finetuned": "masked", "and": "AND", "or": "OR"}
    values = cells(tmp_path, {"kind": "masked", "rows": rows, "columns": columns})["GM"].values
    assert values["or"] == values["finetuned"]
    assert values["and_left"] < values["or_left"] < 100
    assert values["and"] != values["or"]


def test_masks_without_batch_norm_lose_their_constants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a row of the published table has it; the loss of outputs is large enough to show in so few images."""
    rows = [
        {"label": "whole", "model": "net", "criterion": "random", "ratio": 0.75},
        {"label": "alone", "model": "net", "criterion": "random", "ratio": 0.75, "batch_norm": False},
    ]
    changes = {"kind": "masked", "rows": rows, "columns": {"finetuned": "masked", "or": "OR"}}
    plans = []

    def noted(task, graph, plan):
        plans.append(plan)
        return lp.reconstruct(task, graph, plan)

    monkeypatch.setattr("lightning_prune.experiments.reproduce.pruned.reconstruct", noted)
    found = cells(tmp_path, {**changes, **smoke(tune={"epochs": 4}, dense={"epochs": 4})})
    assert found["whole"].values["or"] == found["whole"].values["finetuned"]
    assert found["alone"].values["or"] != found["alone"].values["finetuned"]
    assert "and" not in found["whole"].values
    assert [plan.batch_norm for plan in plans] == [True, False]  # channels that the union keeps hold their constants


# --- timed: Table 5


def test_a_network_is_pruned_to_the_published_flops_and_timed(tmp_path: Path) -> None:
    rows = [
        {"label": "net", "model": "net", "published": {"flops": 1.0}},
        {"label": ".5", "model": "net", "criterion": "l1", "ratio": 0.5, "published": {"flops": 0.4}},
        {"label": "small", "model": "small"},
    ]
    models = {"small": {"class_path": "tests.experiments.reproduce.tiny.TinyNet", "init_args": {"width": 4}}}
    wide = {"net": {"init_args": {"width": 64}}}
    scale = {"data": None, "task": None, "models": wide, "options": {"repeats": 2}}
    changes = {"kind": "timed", "rows": rows, "columns": {"eager": "here, s"}, "models": models}
    found = cells(tmp_path, {**changes, "scales": {"smoke": scale}})
    assert found[".5"].values["left"] == pytest.approx(40, abs=3)  # 64 channels: steps of 1/64
    assert found["net"].values["left"] == 100
    assert found["small"].values["left"] < 40
    for cell in found.values():
        assert cell.values["eager"] > 0
        assert cell.values["eager_faster"] > 0
    assert found["net"].values["eager_faster"] == 1


def test_the_share_that_is_removed_is_the_one_that_leaves_these_flops() -> None:
    dense, images = TinyNet(64), torch.zeros(1, 3, 64, 64)
    how = recipe().pruning(recipe().rows[1])
    for share in (0.7, 0.2):
        small, _ = pruned_to(dense, images, share, how, 0)
        left = lp.measure.count_flops(small, images, "paper") / lp.measure.count_flops(dense, images, "paper")
        assert share - 0.03 < left <= share


# --- feature_maps: Figure 2


def test_the_maps_shown_are_the_weakest_removed_and_the_strongest_kept(tmp_path: Path) -> None:
    changes = {
        "kind": "feature_maps",
        "rows": [{"label": "maps", "model": "net", "criterion": "jre", "coupling": "joint", "score_batches": 2}],
        "prune": {"selection": {"class_path": "lightning_prune.GlobalRatio"}},
        "columns": {"removed": "removed, %"},
        **smoke(options={"layer": "model.inner"}),
    }
    cell = cells(tmp_path, changes)["maps"]
    maps = cell.more["maps"]
    removed = [one for one in maps if one["fate"] == "removed"]
    kept = [one for one in maps if one["fate"] == "kept"]
    assert 1 <= len(removed) <= 3
    assert 1 <= len(kept) <= 3
    assert max(one["score"] for one in removed) <= min(one["score"] for one in kept)
    assert len(maps[0]["map"]) == len(maps[0]["map"][0]) == 8
    assert len(cell.more["image"]) == 3
    study = Study(recipe(changes), recipe(changes).scale("smoke"), tmp_path, None)
    task = study.task("net", "dense", study.dense("net", 0).weights).eval()
    image = next(iter(study.data.test_dataloader()))[0][:1]
    x = torch.relu(task.model.norm(task.model.stem(image)))
    expected = task.model.inner(x)[0, maps[0]["channel"]]
    torch.testing.assert_close(torch.tensor(maps[0]["map"]), expected.detach(), atol=1e-3, rtol=1e-3)


def test_a_layer_that_is_not_there_is_named(tmp_path: Path) -> None:
    changes = {
        "kind": "feature_maps",
        "rows": [{"label": "maps", "model": "net", "criterion": "l1", "coupling": "joint"}],
        **smoke(options={"layer": "model.nothing"}),
    }
    (refused,) = reproduce(recipe(changes), "smoke", tmp_path).refused
    assert "no group has a layer 'model.nothing'; layers: model.stem" in refused.reason


# --- rounds: Guo's curve


def test_channels_go_round_by_round_and_accuracy_is_read_before_and_after(tmp_path: Path) -> None:
    rows = [DENSE, {"label": "Taylor", "model": "net", "criterion": "taylor", "coupling": "joint", "score_batches": 1}]
    prune = {
        "ratio": 0.75,
        "selection": {"class_path": "lightning_prune.GlobalRatio", "init_args": {"ignore": ["*linear*"]}},
        "schedule": {
            "class_path": "lightning_prune.schedule.Rounds",
            "init_args": {"channels": 6, "batches": 2, "intensive_every": 2, "intensive_epochs": 1},
        },
    }
    changes = {
        "kind": "rounds",
        "rows": rows,
        "prune": prune,
        "columns": {"drop": "lost"},
        **smoke(dense={"epochs": 4}),
    }
    found = cells(tmp_path / "whole", changes)
    rounds = found["Taylor"].more["rounds"]
    assert [one["epochs"] for one in rounds] == [0, 1, 0]
    left = [one["left"] for one in rounds]
    assert left == sorted(left, reverse=True)
    assert left[-1] >= 24 * 0.25
    assert all(0 < one["rate"] < 1 and 0 <= one["before"] <= 100 and 0 <= one["after"] <= 100 for one in rounds)
    assert rounds[1]["before"] != rounds[1]["after"]
    assert rounds[1]["drop"] == pytest.approx(rounds[0]["after"] - rounds[1]["before"])
    assert found["net"].values["acc"] - rounds[0]["before"] == pytest.approx(rounds[0]["drop"])

    def kill(name: str, values: dict) -> None:
        if values == rounds[1]:
            raise KeyboardInterrupt

    killed = reproduce(recipe(changes), "smoke", tmp_path / "killed", on_progress=kill)
    assert [cell.row for cell in killed.cells] == ["net"]
    said: list[dict] = []
    resumed = reproduce(
        recipe(changes), "smoke", tmp_path / "killed", on_progress=lambda name, values: said.append(values)
    )
    assert said == rounds[2:]
    assert resumed.cells[1].more["rounds"] == rounds


# --- latency and ROC of a plain row


def test_latency_and_roc_are_measured_where_they_are_asked_for(tmp_path: Path) -> None:
    columns = {"latency": "latency, ms", "faster": "faster, times", "auc": "area, %", "error": "error, %"}
    changes = {"columns": columns, "pictures": ["roc", "losses"], "metrics": ["acc", "auc"]}
    found = cells(tmp_path, {**changes, **smoke(options={"repeats": 2})})
    dense, pruned = found["net"], found["net L1 .5"]
    assert dense.values["latency"] > 0
    assert pruned.values["latency"] > 0
    assert pruned.values["faster"] > 0
    assert pruned.values["error"] == pytest.approx(100 - pruned.values["acc"])
    for cell in (dense, pruned):
        assert len(cell.more["roc"]["fpr"]) == 10
        assert cell.more["classes"] == [str(digit) for digit in range(10)]
        assert 100 * sum(cell.more["roc"]["auc"]) / 10 == pytest.approx(cell.values["auc"], abs=0.01)
        for fpr in cell.more["roc"]["fpr"]:
            assert (fpr[0], fpr[-1]) == (0, 1)
            assert fpr == sorted(fpr)


# --- the best epoch


class Fake:
    def __init__(self, metric: float) -> None:
        self.callback_metrics = {"val_acc": torch.tensor(metric)}


def test_the_best_epoch_comes_back_but_none_of_another_shape() -> None:
    net, best = torch.nn.Linear(2, 2), BestEpoch("val_acc")
    for value, metric in ((1.0, 0.5), (2.0, 0.9), (3.0, 0.7)):
        torch.nn.init.constant_(net.weight, value)
        best.on_train_epoch_end(Fake(metric), net)
    best.on_train_end(Fake(0.7), net)
    assert net.weight.unique().tolist() == [2.0]
    smaller = torch.nn.Linear(2, 1)
    torch.nn.init.constant_(smaller.weight, 4.0)
    best.on_train_epoch_end(Fake(0.1), smaller)
    best.on_train_end(Fake(0.1), smaller)
    assert smaller.weight.unique().tolist() == [4.0]


def test_the_epoch_that_counts_is_what_the_scale_says(tmp_path: Path) -> None:
    changes = smoke(choose="best", dense={"epochs": 3}, tune={"epochs": 3})
    found = reproduce(recipe(changes), "smoke", tmp_path, only=["L1"])
    study = Study(recipe(changes), found.scale, tmp_path, None)
    dense = study.dense("net", 0)
    best = max(one["accuracy"] for one in dense.cell.curve)
    task = study.task("net", "dense", dense.weights)
    assert study.runner.validate(task) == pytest.approx(best, abs=1e-6)


def test_the_published_network_is_timed_too_where_latency_is_a_column(tmp_path: Path) -> None:
    changes = {"columns": {"latency": "latency, ms"}, **smoke(options={"repeats": 2})}
    dense, drawn = reproduce(recipe(changes), "smoke", tmp_path, only=["L1"]).costs
    assert dense.values["latency"] > 0
    assert drawn.values["latency"] > 0
    assert "latency" not in reproduce(recipe(), "smoke", tmp_path / "plain", only=["L1"]).costs[0].values
