"""The plan: plain integers, checked, frozen, the same after a trip through JSON."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle

import pytest
import torch

from lightning_prune.errors import PlanError
from lightning_prune.graph import trace
from lightning_prune.plan import GroupPlan, Plan
from lightning_prune.reconstruction.masks import mask_
from lightning_prune.reconstruction.small_model import reconstruct
from tests.helpers import random_plan
from tests.zoo import build, images

SMALL = Plan({"a": GroupPlan(4, (0, 2), {"a": (0, 2), "b": (2,)})}, "union", batch_norm=False)


@pytest.mark.parametrize("coupling", ["joint", "union", "intersection"])
@pytest.mark.parametrize("name", ["Residual", "InvertedResidual"])
def test_a_plan_survives_json_pickle_and_copy(name: str, coupling) -> None:
    plan = random_plan(trace(build(name), images()), coupling=coupling)
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert pickle.loads(pickle.dumps(plan)) == copy.deepcopy(plan) == plan


def test_json_keeps_every_field() -> None:
    again = Plan.from_dict(json.loads(json.dumps(SMALL.to_dict())))
    assert (again.coupling, again.batch_norm) == ("union", False)
    assert again.groups == {"a": GroupPlan(4, (0, 2), {"a": (0, 2), "b": (2,)})}


def test_what_a_plan_says_of_itself() -> None:
    assert SMALL.groups["a"].removed == (1, 3)
    assert SMALL.ratio == 0.5
    assert not SMALL.lossless  # batch_norm=False
    assert Plan({}, "union").lossless
    assert not Plan({}, "intersection").lossless
    assert Plan({}).ratio == 0.0


def test_a_plan_is_true_if_any_layer_loses_a_channel() -> None:
    assert not Plan({"a": GroupPlan(2, (0, 1), {"a": (0, 1)})})
    assert Plan({"a": GroupPlan(2, (1,))})
    assert Plan({"a": GroupPlan(2, (0, 1), {"a": (0, 1), "b": (0,)})}, "union")  # only masked


@pytest.mark.parametrize(
    "keep", [(0, 4), (-1, 0), (2, 0), (1, 1), (0.0, 1.0), (True,), ("0",), [0, 1], (None,)], ids=repr
)
def test_invalid_channels_are_refused(keep) -> None:
    with pytest.raises(PlanError, match="keep: kept channels must be"):
        GroupPlan(4, keep)
    with pytest.raises(PlanError, match="conv: kept channels must be"):
        GroupPlan(4, (0,), {"conv": keep})


@pytest.mark.parametrize("size", [-1, 2.0, "4", True, None])
def test_an_invalid_size_is_refused(size) -> None:
    with pytest.raises(PlanError, match="size must be a number of channels"):
        GroupPlan(size, ())


@pytest.mark.parametrize("coupling", ["joint", "union"])
def test_a_layer_cannot_keep_what_its_group_removes(coupling) -> None:
    groups = {"a": GroupPlan(4, (0, 2), {"a": (0, 2), "b": (0, 3)})}
    with pytest.raises(PlanError, match=r"b keeps channels \[3\] that its group 'a' removes"):
        Plan(groups, coupling)
    assert Plan(groups, "intersection").groups == groups


def test_an_unknown_coupling_is_refused() -> None:
    with pytest.raises(PlanError, match="coupling must be one of joint, union, intersection, got 'or'"):
        Plan({}, "or")


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("coupling"),
        lambda d: d.pop("batch_norm"),
        lambda d: d.update(batch_norm="no"),
        lambda d: d.update(groups=[1]),
        lambda d: d["groups"]["a"].pop("keep"),
        lambda d: d["groups"]["a"].update(keep=3),
        lambda d: d["groups"]["a"].update(keep=["0", "x"]),
        lambda d: d["groups"]["a"].update(keep=[0.5]),
        lambda d: d["groups"]["a"].update(size="four"),
        lambda d: d["groups"]["a"].update(layers=[0]),
        lambda d: d.update(coupling=["joint"]),
    ],
)
def test_data_that_are_no_plan_are_refused(change) -> None:
    data = SMALL.to_dict()
    change(data)
    with pytest.raises(PlanError):
        Plan.from_dict(data)


@pytest.mark.parametrize("data", [None, [], "plan", 3])
def test_something_else_is_no_plan(data) -> None:
    with pytest.raises(PlanError, match="not a pruning plan"):
        Plan.from_dict(data)


def test_plans_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SMALL.coupling = "joint"
    with pytest.raises(dataclasses.FrozenInstanceError):
        SMALL.groups["a"].keep = (0,)


def test_to_dict_does_not_hand_out_the_plan_itself() -> None:
    data = SMALL.to_dict()
    data["groups"]["a"]["keep"].append(3)
    data["groups"]["a"]["layers"]["b"].append(3)
    assert SMALL.groups["a"] == GroupPlan(4, (0, 2), {"a": (0, 2), "b": (2,)})


def test_within_counts_channels_anew_and_keeps_the_settings() -> None:
    done = Plan({"a": GroupPlan(5, (0, 2, 3, 4))}, "intersection", batch_norm=False)
    groups = {"a": GroupPlan(5, (0, 3), {"a": (0, 3), "b": (1, 3)}), "new": GroupPlan(2, (1,))}
    left = {"a": GroupPlan(4, (0, 2), {"a": (0, 2), "b": (2,)}), "new": GroupPlan(2, (1,))}
    assert Plan(groups, "intersection", batch_norm=False).within(done) == Plan(left, "intersection", batch_norm=False)
    with pytest.raises(PlanError, match=r"channels \[1\] of group 'a' are kept, but an earlier plan removed them"):
        Plan({"a": GroupPlan(5, (0, 1))}).within(done)


def test_a_group_that_cannot_be_pruned_may_be_kept_whole() -> None:
    graph = trace(build("Residual"), images())
    Plan({"head.fc": GroupPlan(5, (0, 1, 2, 3, 4))}).check(graph)
    with pytest.raises(PlanError, match="cannot be pruned"):
        Plan({"head.fc": GroupPlan(5, (0, 1, 2, 3))}).check(graph)


# Files


def test_a_saved_plan_can_be_applied_and_undone(tmp_path) -> None:
    model, x = build("Residual"), images()
    graph = trace(model, x)
    plan = random_plan(graph, coupling="union")
    plan.save(tmp_path / "new" / "plan.json")
    again = Plan.load(str(tmp_path / "new" / "plan.json"))
    assert again == plan
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    handle = mask_(model, graph, again)
    masked = model(x)
    small = reconstruct(model, graph, again, example_inputs=x)
    assert torch.allclose(small(x), masked, rtol=1e-10)
    handle.undo()
    assert all(torch.equal(tensor, dense[name]) for name, tensor in model.state_dict().items())


def test_a_plan_is_readable_without_this_library(tmp_path) -> None:
    SMALL.save(tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    assert data["format"] == "lightning-prune-plan/1"
    assert data["groups"]["a"]["keep"] == [0, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no file"),
        (b"", r"plan\.json is empty"),
        (b"{", r"plan\.json is no pruning plan, or a damaged one: JSONDecodeError"),
        (b"[" * 200_000, "is no pruning plan, or a damaged one: RecursionError"),
        (b"\xff\xfe\x00", "is no pruning plan: it holds no text, byte 0"),
        (b"[1]", "is no pruning plan: it holds a list"),
        (b'{"format": "lightning-prune/1"}', "is not a pruning plan of format lightning-prune-plan/1"),
        (b'{"format": "lightning-prune-plan/1"}', "not a pruning plan: KeyError"),
        (
            b'{"format": "lightning-prune-plan/1", "coupling": "joint", "batch_norm": true, '
            b'"groups": {"a": {"size": 1000000000000, "keep": [0], "layers": {}}}}',
            "size must be a number of channels",
        ),
    ],
    ids=["missing", "empty", "cut short", "nested", "no text", "list", "other", "parts", "vast"],
)
def test_a_file_that_holds_no_plan_is_refused(tmp_path, content, message: str) -> None:
    if content is not None:
        (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(PlanError, match=message):
        Plan.load(tmp_path / "plan.json")
