"""Curves are what masking by hand gives, leave the model alone, survive a kill, and become ratios of layers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import lightning_prune as lp
from lightning_prune.errors import PlanError, SensitivityError
from lightning_prune.report.figures import save_figure
from lightning_prune.report.sensitivity import sensitivity_csv, sensitivity_figure, sensitivity_table
from lightning_prune.sensitivity import Point, Sensitivity, measure_sensitivity, within_budget
from tests.zoo import build, images

X = images(batch=3)
RATIOS = (0.25, 0.5, 0.75)


class Study:
    """A residual network, its scores, and a metric that counts how often it is asked."""

    def __init__(self, name: str = "Residual") -> None:
        self.model = build(name)
        self.graph = lp.trace(self.model, X)
        self.scores = lp.score(self.model, self.graph, "l1")
        self.target = self.model.eval()(X).detach()
        self.model.train()
        self.asked = 0

    def error(self, model: nn.Module) -> float:
        assert not model.training
        assert not torch.is_grad_enabled()
        self.asked += 1
        return float((model(X) - self.target).square().mean())

    def measure(self, evaluate=None, **options) -> Sensitivity:
        given = {"ratios": RATIOS, "mode": "min", **options}
        return measure_sensitivity(self.model, self.graph, self.scores, evaluate or self.error, **given)


def test_a_point_is_the_metric_with_that_group_alone_masked() -> None:
    study = Study()
    before = {name: value.clone() for name, value in study.model.state_dict().items()}
    found = study.measure()
    assert study.model.training
    assert all(torch.equal(value, before[name]) for name, value in study.model.state_dict().items())
    assert found.dense == 0
    assert [*found.curves] == [group.name for group in study.graph.prunable_groups]
    for point in found.points:
        others = [group.name for group in study.graph.prunable_groups if group.name != point.group]
        names = [layer.name for group in others for layer in study.graph.group(group).layers]
        plan = lp.LayerRatio(point.ratio, ignore=names).select(study.graph, study.scores)
        assert sum(len(group.removed) for group in plan.groups.values()) == point.removed
        small = lp.reconstruct(study.model, study.graph, plan).eval()
        assert point.value == pytest.approx(float((small(X) - study.target).square().mean().detach()), rel=1e-9)


def test_channels_that_several_ratios_share_are_evaluated_once() -> None:
    study = Study()
    found = study.measure(ratios=(0.01, 0.5, 0.51))
    assert study.asked == 1 + len(found.sizes)
    assert {point.value for point in found.points if not point.removed} == {found.dense}


class KilledError(Exception):
    """In place of a kill."""


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    whole, path = Study().measure(), tmp_path / "runs" / "points.jsonl"
    killed = Study()

    def dies(model: nn.Module) -> float:
        if killed.asked == 4:
            raise KilledError
        return killed.error(model)

    with pytest.raises(KilledError):
        killed.measure(dies, path=path)
    path.write_bytes(path.read_bytes()[:-5])  # in the middle of writing the fourth value
    again, seen = Study(), []
    assert again.measure(path=path, progress=lambda done, total: seen.append((done, total))) == whole
    assert again.asked == len(whole.points) + 1 - 3
    assert seen == [(done, len(whole.points) + 1) for done in range(3, len(whole.points) + 2)]
    assert Study().measure(path=path, ratios=(0.5,)).points == tuple(p for p in whole.points if p.ratio == 0.5)


def test_a_file_of_other_settings_or_a_damaged_one_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "points.jsonl"
    Study().measure(path=path, settings={"batches": 2}, ratios=(0.5,))
    kept = path.read_bytes()
    with pytest.raises(
        SensitivityError, match=r"points.jsonl was measured with other settings \(batches\); name another"
    ):
        Study().measure(path=path, settings={"batches": 3})
    other = Study()
    other.model.head.fc.weight.data[0, 0] += 1
    with pytest.raises(SensitivityError, match=r"other settings \(weights\)"):
        other.measure(path=path, settings={"batches": 2})
    assert path.read_bytes() == kept
    header, first, *_ = kept.splitlines()
    for content in (
        b"\x80\n",
        b"[]\n",
        header + b'\n{"group": "a"}\n',
        header + b"\n" + first.replace(b"0.0", b"NaN") + b"\n",
    ):
        path.write_bytes(content)
        with pytest.raises(SensitivityError, match="holds no sensitivities, or is damaged"):
            Study().measure(path=path, settings={"batches": 2})
        assert path.read_bytes() == content


def test_a_metric_that_is_no_number_loses_everything(tmp_path: Path) -> None:
    study, path = Study(), tmp_path / "points.jsonl"
    values = iter([0.9, math.nan, math.inf])
    found = study.measure(lambda _: next(values, 0.8), mode="max", path=path)
    assert [found.drop(point) for point in found.points[:2]] == [math.inf, math.inf]
    assert found.within(1e9)["stem.0"] == 0
    assert [json.loads(line)["value"] for line in path.read_text().splitlines()[2:4]] == [None, None]
    assert str(study.measure(mode="max", path=path)) == str(found)
    with pytest.raises(SensitivityError, match="the accuracy of the dense model is nan"):
        Study().measure(lambda _: math.nan, metric="accuracy")
    with pytest.raises(SensitivityError, match="evaluate has to return a number, it returned a tuple"):
        Study().measure(lambda _: (0.9, 10))


@pytest.mark.parametrize("ratios", [(), (0.5, 0.5), (0.0, 0.5), (1.0,), (math.nan,)], ids=str)
def test_ratios_without_meaning_are_refused(ratios) -> None:
    with pytest.raises(PlanError, match="ratio"):
        Study().measure(ratios=ratios)
    with pytest.raises(PlanError, match="no ratio removes a channel"):
        Study().measure(ratios=(0.01,))


def test_masks_in_force_are_refused() -> None:
    study = Study()
    handle = lp.mask_(study.model, study.graph, lp.LayerRatio(0.5).select(study.graph, study.scores))
    with pytest.raises(SensitivityError, match="masks are held on the model already"):
        study.measure()
    handle.undo()
    assert study.measure().dense == 0


def curves(mode: str = "max") -> Sensitivity:
    sign = 1 if mode == "max" else -1
    lost = {"a1.0": (0.0, 0.02, 0.2), "b1.0": (0.05, 0.01, 0.3), "stem.0": (-0.01, 0.02, 0.02)}
    points = [
        Point(g, r, round(8 * r), 0.91 - sign * d) for g, of in lost.items() for r, d in zip(RATIOS, of, strict=True)
    ]
    return Sensitivity(0.91, tuple(points), {"a1.0": 8, "b1.0": 12, "stem.0": 8}, mode)


@pytest.mark.parametrize("mode", ["max", "min"])
def test_a_tolerated_drop_becomes_ratios(mode: str) -> None:
    found = curves(mode)
    assert found.within(0.02) == {"a1.0": 0.5, "b1.0": 0.0, "stem.0": 0.75}  # b1.0 at 0.5 is an accident
    assert found.within(0) == {"a1.0": 0.25, "b1.0": 0.0, "stem.0": 0.25}
    study = Study()
    plan = found.layer_ratio(0.02, ignore="stem").select(study.graph, study.scores)
    assert {name: len(group.removed) for name, group in plan.groups.items() if group.removed} == {"a1.0": 4}
    for wrong in (-0.1, math.nan, "0.1", True):
        with pytest.raises(PlanError, match="a tolerated drop is a number >= 0"):
            found.within(wrong)


@pytest.mark.parametrize("name", ["flops", "params"])
def test_a_budget_tolerates_the_smallest_drop_that_is_enough(name: str) -> None:
    study, found = Study(), curves()
    about = study.model, study.graph, study.scores, X
    chosen = within_budget(found, *about, **{name: 0.6})
    plan = chosen.selection.select(study.graph, study.scores)
    counted = lp.measure(lp.reconstruct(study.model, study.graph, plan), X), lp.measure(study.model, X)
    after, before = (m.macs if name == "flops" else m.params for m in counted)
    assert chosen.remains[name] == pytest.approx(after / before)
    assert chosen.remains[name] <= 0.6
    smaller = max(found.drop(p) for p in found.points if found.drop(p) < chosen.drop - 1e-9)
    less = found.layer_ratio(max(0, smaller)).select(study.graph, study.scores)
    assert lp.measure.CostModel(study.model, study.graph, X).of(less)[name == "flops"] > 0.6 * before
    with pytest.raises(PlanError, match=rf"the largest measured ratios leave {name}=0.\d+: measure larger"):
        within_budget(found, *about, **{name: 0.01})
    with pytest.raises(PlanError, match="a share in"):
        within_budget(found, *about)


def test_ratios_of_groups_that_share_a_layer_hold_for_each() -> None:
    torch.manual_seed(0)
    model = lp.models.cifar_thin.resnet20().eval()
    graph = lp.trace(model, x := torch.zeros(1, 3, 32, 32))
    parts = [group.name for group in graph.prunable_groups if "[" in group.name]
    scores = lp.score(model, graph, "l1")
    ratios = {name: 0.5 if k % 2 else 0.25 for k, name in enumerate(parts)}
    plan = lp.LayerRatio(0.0, overrides=ratios).select(graph, scores)
    removed = {name: len(group.removed) / group.size for name, group in plan.groups.items() if group.removed}
    assert removed == ratios
    assert len(ratios) > 1
    lp.reconstruct(model, graph, plan, example_inputs=x)


def test_ratios_in_a_file_are_those_that_were_written(tmp_path: Path) -> None:
    path, selection = tmp_path / "ratios.json", lp.LayerRatio(0.1, overrides={"a1.0": 0.5}, rounding="floor")
    selection.save(path)
    assert repr(lp.LayerRatio.load(path)) == repr(selection)
    assert lp.LayerRatio.load(path, round_to=8).round_to == 8
    model = build("Residual")
    with pytest.raises(PlanError, match="overrides by module cannot be written"):
        lp.LayerRatio(0.5, overrides={model.a1: 0.5}).save(tmp_path / "other.json")
    good = path.read_text()
    for content in ("", "[]", '{"format": "x"}', good.replace('"overrides"', '"other"'), good.replace("0.5", "1.5")):
        path.write_text(content)
        with pytest.raises(PlanError, match=r"ratios.json"):
            lp.LayerRatio.load(path)
    with pytest.raises(PlanError, match="there is no file"):
        lp.LayerRatio.load(tmp_path / "none.json")


def test_table_csv_and_picture_show_the_same_numbers(tmp_path: Path) -> None:
    found = curves()
    rows = sensitivity_table(found, found.within(0.02)).rows
    assert rows[0] == ("a1.0", 8, "0.0", "2.0", "20.0", "50 %")
    assert rows[2][2] == "-1.0"
    lines = sensitivity_csv(found).splitlines()
    assert lines[:2] == ["group,channels,ratio,removed,metric,drop", ",28,0.0,0,0.91,0.0"]
    assert len(lines) == 2 + len(found.points)
    figure = sensitivity_figure(found, found.within(0.02))
    written = [text.get_text() for text in figure.axes[0].texts]
    assert written == [entry for row in rows for entry in row[2:5]]
    assert len(figure.axes[0].lines) == 2  # frames; nothing was chosen of the third
    many = Sensitivity(
        0.9, tuple(Point(f"layer{k}", 0.5, 4, 0.8) for k in range(60)), {f"layer{k}": 8 for k in range(60)}
    )
    save_figure(sensitivity_figure(many, theme="dark"), tmp_path / "many.png")
    with pytest.raises(lp.PruningError, match="nothing to draw"):
        sensitivity_figure(Sensitivity(0.9, (), {}))
