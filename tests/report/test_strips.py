"""Strips: every kept channel is a cell in its old place, and the numbers beside it are those of the map."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from lightning_prune.errors import PruningError
from lightning_prune.graph import ChannelGraph, trace
from lightning_prune.graph.describe import renumbered
from lightning_prune.graph.groups import Group, Layer
from lightning_prune.plan import GroupPlan, Plan
from lightning_prune.reconstruction import ChannelMap
from lightning_prune.report import KeptChannels, PruneReport
from lightning_prune.report.html import html_page
from lightning_prune.report.strips import strips
from lightning_prune.report.tracking import layer_channels
from tests.helpers import random_plan
from tests.zoo import build, images


def cells(path: str) -> list[int]:
    """Old numbers of the channels that a path fills."""
    found = re.findall(r"M([\d.]+) 0h([\d.]+)", path)
    return [number for start, wide in found for number in range(int(float(start)), round(float(start) + float(wide)))]


@pytest.mark.parametrize("dense", [6, 64, 65, 200])
def test_a_cell_lies_where_its_channel_was(dense: int) -> None:
    keep = tuple(sorted({0, 1, 2, 5, dense - 1}))
    (strip,) = strips([KeptChannels("conv", dense, len(keep), keep=keep)])
    assert cells(strip.path) == list(keep)
    assert strip.count == f"{len(keep)} of {dense}"
    if dense == 200:
        assert strip.moved == "0-2→0-2, 5→3, 199→4"
        assert strip.removed == "3-4, 6-198"
        assert strip.hint == "kept: 0-2, 5, 199"


def test_a_layer_that_keeps_all_or_whose_numbers_are_unknown_opens_nothing() -> None:
    whole, counted = strips([KeptChannels("a", 4, 4, keep=(0, 1, 2, 3)), KeptChannels("b", 4, 2)])
    assert (whole.count, whole.moved, cells(whole.path)) == ("all 4", "", [0, 1, 2, 3])
    assert (counted.count, counted.moved, cells(counted.path)) == ("2 of 4", "", [0, 1])
    page = html_page(PruneReport("t", layers=(whole.layer, counted.layer)))
    assert page.count("</li>") == 2
    assert "old→new" not in page


def test_the_numbers_are_those_of_the_channel_map() -> None:
    model = build("Residual").eval()
    graph = trace(model, images())
    plan = random_plan(graph)
    known = ChannelMap.planned(model, graph, plan).layers
    layers = layer_channels(graph, plan)
    assert len(layers) > 4
    assert [layer.keep for layer in layers] == [known[layer.layer].outputs.keep for layer in layers]
    page = html_page(dataclasses.replace(PruneReport("t"), layers=layers))
    for layer in layers:
        assert layer.kept == layer.dense or f"<dd>{renumbered(layer.keep)}</dd>" in page


def test_a_layer_of_several_groups_is_one_row() -> None:
    def half(start: int) -> Group:
        index = torch.arange(start, start + 4).unsqueeze(1)
        return Group(f"conv[{start}]", 4, (Layer("conv", "conv.weight", 0, 8, index),), ())

    graph = ChannelGraph((half(0), half(4)), {"conv.weight": (8, 3, 1, 1)})
    plan = Plan({"conv[0]": GroupPlan(4, (0, 1)), "conv[4]": GroupPlan(4, (1, 3))})
    assert layer_channels(graph, plan) == (KeptChannels("conv", 8, 4, "conv[0], conv[4]", (0, 1, 5, 7)),)


@pytest.mark.parametrize("keep", [(0, 0), (1, 0), (0, 4), (0,), (-1, 0)])
def test_impossible_channels_are_refused(keep: tuple[int, ...]) -> None:
    with pytest.raises(PruningError, match="not 2 ascending numbers below 4"):
        KeptChannels("conv", 4, 2, keep=keep)
