"""The map from old to new channels, against numbers that are looked up in the weights themselves."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

import lightning_prune as lp
from lightning_prune.errors import CheckpointError, PlanError
from lightning_prune.graph import trace
from lightning_prune.plan import GroupPlan, Plan
from lightning_prune.reconstruction import ChannelMap, OldChannels, load, mask_, reconstruct, reconstruct_, save
from tests.helpers import random_plan
from tests.zoo import ZOO, build, images


def numbered_(model: nn.Module) -> nn.Module:
    """Every weight says which filter and which input it belongs to: 1000 * (input + 1) + filter + 1."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            weight = module.weight.data
            groups = getattr(module, "groups", 1)
            filters = torch.arange(weight.shape[0])
            first = filters // (weight.shape[0] // groups) * weight.shape[1]  # input of its group
            inputs = first[:, None] + torch.arange(weight.shape[1])
            values = 1000.0 * (inputs + 1) + filters[:, None] + 1
            weight.copy_(values.view(*values.shape, *(1,) * (weight.dim() - 2)).expand_as(weight))
    return model


@pytest.mark.parametrize("coupling", ["joint", "union"])
@pytest.mark.parametrize("name", ZOO)
def test_the_map_says_where_every_weight_comes_from(name: str, coupling) -> None:
    model = numbered_(build(name))
    graph = trace(model, images())
    plan = random_plan(graph, coupling=coupling)
    channels = ChannelMap.planned(model, graph, plan)
    small = reconstruct(model, graph, plan)
    assert ChannelMap.of(small) == channels
    seen = 0
    for path, module in small.named_modules():
        if not isinstance(module, (nn.Conv2d, nn.Linear)):
            continue
        layer, groups = channels.layers[path], getattr(module, "groups", 1)
        weight = module.weight.detach().flatten(2)[..., 0] if module.weight.dim() > 2 else module.weight.detach()
        outputs, inputs = len(weight), weight.shape[1] * groups
        assert (len(layer.outputs.keep), len(layer.inputs.keep)) == (outputs, inputs)
        for new, old in enumerate(layer.outputs.keep):
            first = new // (outputs // groups) * weight.shape[1]
            olds = layer.inputs.keep[first : first + weight.shape[1]]
            expected = torch.tensor([1000.0 * (entry + 1) + old + 1 for entry in olds])
            stays = weight[new] != 0  # filters that only fill an addition are zero
            assert torch.equal(weight[new][stays], expected[stays].to(weight))
            seen += int(stays.sum())
    assert seen > 20


@pytest.mark.parametrize("name", ["Vgg", "Grouped", "Residual"])
def test_other_tensors_are_cut_as_the_weights_were(name: str) -> None:
    model = build(name)
    graph = trace(model, images())
    plan = random_plan(graph)
    mask_(model, graph, plan).remove()
    small = reconstruct(model, graph, plan)
    found = ChannelMap.of(small).cut(model.state_dict())
    assert found.keys() == small.state_dict().keys()
    assert all(torch.equal(found[key], value) for key, value in small.state_dict().items())
    with pytest.raises(PlanError, match=r"has shape .* and the dense one has"):
        ChannelMap.of(small).cut(small.state_dict())


def test_transposed_convolutions() -> None:
    model = nn.Sequential(
        nn.ConvTranspose2d(3, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 2, 1)
    )
    x = torch.zeros(1, 3, 8, 8)
    graph = trace(model, x)
    plan = random_plan(graph)
    assert plan
    small = reconstruct(model, graph, plan)
    layers = ChannelMap.of(small).layers
    for path, module in small.named_modules():
        if path:
            if isinstance(module, nn.ReLU):
                continue
            assert len(layers[path].outputs.keep) == module.out_channels
            assert len(layers[path].inputs.keep) == module.in_channels
    assert layers["0"].outputs.keep == layers["2"].inputs.keep
    assert layers["2"].outputs.keep == layers["4"].inputs.keep
    assert layers["2"].outputs.size == 8


def test_a_model_that_is_cut_twice_knows_its_dense_channels() -> None:
    model, x = build("Residual"), images()
    graph = trace(model, x)
    both = random_plan(graph, 0.5)
    first = Plan({name: GroupPlan(g.size, tuple(sorted({*g.keep, 0, 1}))) for name, g in both.groups.items()})
    channels = ChannelMap.planned(model, graph, both)
    reconstruct_(model, graph, first)
    graph = trace(model, x)
    assert ChannelMap.planned(model, graph, both.within(first)) == channels
    reconstruct_(model, graph, both.within(first))
    assert ChannelMap.of(model) == channels
    assert ChannelMap.of(pickle.loads(pickle.dumps(model))) == channels


def test_a_dense_model_keeps_all_its_numbers() -> None:
    channels = ChannelMap.of(build("Grouped"))
    assert not any(layer.changed for layer in channels.layers.values())
    assert channels.tensors == {}
    assert str(channels) == "all channels have their old numbers"


def test_masks_of_torch_and_shared_weights() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.a, self.b, self.c = (nn.Linear(4, n) for n in (4, 4, 4, 2))
            self.b.weight = self.a.weight
            torch_prune.identity(self.c, "weight")

        def forward(self, x):
            return self.c(self.b(self.a(self.first(x)).relu()).relu())

    model = Net()
    graph = trace(model, torch.ones(1, 4))
    plan = random_plan(graph)
    layers = ChannelMap.planned(model, graph, plan).layers
    assert layers.keys() == {"first", "a", "b", "c"}
    assert layers["a"].changed
    assert layers["a"] == layers["b"]
    assert layers["c"].inputs.keep == layers["b"].outputs.keep


# Files


def test_a_file_holds_the_map_and_a_loaded_model_knows_it(tmp_path: Path) -> None:
    model, x = build("Grouped"), images()
    graph = trace(model, x)
    plan = random_plan(graph)
    small = reconstruct(model, graph, plan)
    save(tmp_path / "small.pt", small, plan)
    channels = ChannelMap.of(small)
    assert ChannelMap.load(tmp_path / "small.pt") == channels
    fresh = build("Grouped", seed=3)
    load(tmp_path / "small.pt", fresh)
    assert ChannelMap.of(fresh) == channels
    save(tmp_path / "again.pt", fresh, plan)
    assert ChannelMap.load(tmp_path / "again.pt") == channels
    assert ChannelMap.from_dict(json.loads(json.dumps(channels.to_dict()))) == channels


def test_a_file_without_a_map_leaves_it_unknown(tmp_path: Path) -> None:
    result = lp.prune(build("Plain"), images())
    save(tmp_path / "small.pt", result.model, result.plan)
    content = torch.load(tmp_path / "small.pt", weights_only=True)
    del content["channels"]
    content.pop("digest", None)
    torch.save(content, tmp_path / "old.pt")
    fresh = build("Plain")
    load(tmp_path / "old.pt", fresh)
    with pytest.raises(PlanError, match="nobody noted how this model was cut"):
        ChannelMap.of(fresh)
    reconstruct_(fresh, trace(fresh, images()), Plan({}))
    with pytest.raises(PlanError, match="nobody noted"):
        ChannelMap.of(fresh)
    with pytest.raises(CheckpointError, match="holds no map of channels: its model is dense or masked"):
        ChannelMap.load(tmp_path / "old.pt")


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: c["tensors"].update({"nowhere": {"0": {"size": 4, "keep": (0,)}}}),
        lambda c: next(iter(c["tensors"].values()))["0"].update(keep=(0,)),
        lambda c: next(iter(c["tensors"].values()))["0"].update(keep=(3, 1)),
        lambda c: next(iter(c["tensors"].values()))["0"].update(size=1),
        lambda c: c.update(layers=3),
        lambda c: c.update(groups={"a": 0}),
    ],
    ids=["unknown", "too-few", "not-ascending", "too-small", "no-layers", "no-groups"],
)
def test_a_damaged_map_is_refused_and_the_model_is_as_it_was(damage, tmp_path: Path) -> None:
    result = lp.prune(build("Plain"), images())
    save(tmp_path / "small.pt", result.model, result.plan)
    content = torch.load(tmp_path / "small.pt", weights_only=True)
    content.pop("digest", None)
    damage(content["channels"])
    torch.save(content, tmp_path / "small.pt")
    fresh = build("Plain")
    with pytest.raises(CheckpointError, match=r"small\.pt (is damaged|holds no map)"):
        load(tmp_path / "small.pt", fresh)
    assert {k: v.shape for k, v in fresh.state_dict().items()} == {
        k: v.shape for k, v in build("Plain").state_dict().items()
    }


def test_the_table_fits_a_terminal() -> None:
    model = nn.Sequential(nn.Conv2d(3, 512, 3), nn.ReLU(), nn.Conv2d(512, 4, 1))
    graph = trace(model, torch.zeros(1, 3, 8, 8))
    lines = str(ChannelMap.planned(model, graph, random_plan(graph))).splitlines()
    assert 70 < max(map(len, lines)) <= 80
    assert lines[2].endswith(", …")
    assert OldChannels(4, (1,)).new == {1: 0}
