"""`lightning-prune channels`, and plans on the command line of `prune`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import lightning_prune as lp
from lightning_prune.cli import main
from lightning_prune.graph.describe import renumbered
from lightning_prune.reconstruction import ChannelMap
from tests.cli.tiny import MODEL, refused, tiny_net

pytestmark = pytest.mark.usefixtures("workplace")


@pytest.fixture
def pruned(capsys) -> ChannelMap:
    assert main(["prune", "dense.pt", *MODEL, "--out", "small.pt"]) == 0
    assert "old and new channels: lightning-prune channels small.pt" in capsys.readouterr().out
    return ChannelMap.load("small.pt")


def test_the_table_is_that_of_the_map(pruned: ChannelMap, capsys) -> None:
    assert main(["channels", "small.pt", "--out", "map.json"]) == 0
    assert capsys.readouterr().out == f"{pruned}\n\nMap: map.json\n"
    assert ChannelMap.from_dict(json.loads(Path("map.json").read_text("utf-8"))) == pruned


def test_a_layer_is_shown_channel_by_channel(pruned: ChannelMap, capsys) -> None:
    name, layer = next((name, layer) for name, layer in pruned.layers.items() if layer.outputs.removed)
    assert main(["channels", "small.pt", "--layer", name]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"{name} outputs: {layer.outputs.size} → {len(layer.outputs.keep)} removed: " in out
    assert f"old→new: {renumbered(layer.outputs.keep)}" in out
    assert f"inputs: {layer.inputs.size}, as they were" in out


def test_what_has_no_map_is_refused(pruned: ChannelMap, capsys) -> None:
    assert "is not a pruned checkpoint" in refused(capsys, "channels", "dense.pt")
    assert "there is no file nowhere.pt" in refused(capsys, "channels", "nowhere.pt")
    first = next(iter(pruned.layers))
    assert f"Did you mean '{first}'?" in refused(capsys, "channels", "small.pt", "--layer", f"{first}x")


def test_a_plan_that_was_changed_is_carried_out(capsys) -> None:
    model = tiny_net()
    model.load_state_dict(torch.load("dense.pt"))
    graph = lp.trace(model, torch.zeros(1, 3, 8, 8))
    layer = graph.prunable_groups[0].layers[0].name
    plan = lp.GlobalRatio(0.5).select(graph, lp.score(model, graph, "l1"), coupling="union")
    plan = plan.whole(layer).remove(layer, [1])
    plan.save("plan.json")
    assert main(["prune", "dense.pt", *MODEL, "--plan", "plan.json", "--out", "small.pt"]) == 0
    assert "channels removed by --plan plan.json, coupling union" in capsys.readouterr().out
    assert lp.load("small.pt", tiny_net()) == plan
    assert main(["prune", "dense.pt", *MODEL, "--plan", "plan.json", "--explain"]) == 0
    assert "Nothing was done." in capsys.readouterr().out
    argv = ["prune", "dense.pt", *MODEL, "--plan", "plan.json"]
    assert "--plan says all" in refused(capsys, *argv, "--round-to", "8")
    assert "there is no file none.json" in refused(capsys, *argv[:-1], "none.json")
