"""Steps with reconstruction between them: the smaller model's channels stay in the groups of the dense one."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torchvision
from hypothesis import given, settings
from torch import nn

import lightning_prune as lp
from lightning_prune.errors import NoEffectWarning
from lightning_prune.schedule import Gradual
from tests.graph.architecture_blocks import Conv, Shuffle, Split
from tests.graph.architectures import Net, nets
from tests.graph.test_properties import profile

# Groups of few channels, small shares.
pytestmark = pytest.mark.filterwarnings("ignore::lightning_prune.errors.NoEffectWarning")


def prune_in_steps(model: nn.Module, images: torch.Tensor, seed: int = 0, steps: int = 3) -> lp.PruningSession:
    """Random scores, a reconstruction after every step, which compares itself; nothing that could go is stuck later."""
    rng = torch.Generator().manual_seed(seed)
    session = lp.PruningSession(model.eval(), images, criterion="l1", schedule=Gradual(steps), ratio=0.5)
    if not session.graph.prunable_groups:
        return session
    while not session.done:
        scores = session.score()
        for name, values in scores.items():
            scores[name] = torch.rand(len(values), dtype=torch.float64, generator=rng)
        session.mask_()
        session.reconstruct_()
    for group in session.graph.groups:
        planned = session.plan.groups.get(group.name)
        assert planned is None or group.size == len(planned.keep)
    return session


@settings(profile, max_examples=8, derandomize=True)
@given(net=nets())
def test_random_architectures_are_pruned_in_steps(net: Net) -> None:
    prune_in_steps(net.module(), net.images(), net.seed)


@pytest.mark.slow
@pytest.mark.timeout(900)
@settings(profile, max_examples=200)
@given(net=nets())
def test_many_random_architectures_are_pruned_in_steps(net: Net) -> None:
    prune_in_steps(net.module(), net.images(), net.seed)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    """
    densenet121 efficientnet_b0 googlenet mnasnet1_0 mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18
    resnext50_32x4d shufflenet_v2_x0_5 squeezenet1_1 vit_b_32
    """.split(),
)
def test_networks_of_torchvision_are_pruned_in_steps(name: str) -> None:
    aux = {"aux_logits": True, "init_weights": False} if name == "googlenet" else {}
    model = torchvision.models.get_model(name, weights=None, **aux)
    session = prune_in_steps(model, torch.rand(2, 3, *[224 if name == "vit_b_32" else 64] * 2))
    dense = session.dense_graph
    assert {g.name for g in session.graph.groups if g.size > 1 and not g.prunable} <= {
        group.name for group in dense.groups if not group.prunable
    }


def test_channels_of_several_filters_that_fall_apart() -> None:
    """Three channels of two filters each; of one of them the filters are no longer tied."""
    net = Net(blocks=(Split(blocks=(Shuffle(groups=3),), how="split"), Conv(width=6)))
    session = prune_in_steps(net.module(), net.images(), steps=4)
    name = next(group.name for group in session.dense_graph.groups if group.layers[0].index.shape[1] == 2)
    assert len(session.plan.groups[name].keep) == session.graph.group(name).size


@pytest.mark.parametrize("groups", [2, 4])
def test_a_grouped_convolution_goes_on_losing_what_it_lost_before(groups: int) -> None:
    """Of four groups of four one filter each goes, since there are no more groups; of groups of three, one could."""
    layers = nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=groups), nn.ReLU(), nn.Conv2d(16, 4, 1)
    model = nn.Sequential(*layers).double().eval()
    session = lp.PruningSession(model, torch.rand(2, 3, 8, 8).double(), criterion="l1", schedule=Gradual(3), ratio=0.7)
    while not session.done:
        session.step(reconstruct=True)
    assert model[2].groups == groups
    assert model[2].weight.numel() < 0.3 * 16 * 16 // groups * 9
    assert all(group.prunable == (group.name != "4") for group in session.graph.groups if group.size > 1)


class Tied(nn.Module):
    """An autoencoder whose decoder uses the encoder's weight: one layer has channels along both of its dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.last = nn.Conv2d(3, 3, 3, bias=False), nn.Conv2d(3, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(nn.functional.conv_transpose2d(self.encoder(x).relu(), self.encoder.weight))


def test_no_two_groups_have_one_name() -> None:
    names = [group.name for group in lp.trace(Tied(), torch.rand(2, 3, 8, 8)).groups]
    assert names == ["encoder[0:3, dim 0]", "encoder[0:3, dim 1]", "last"]


def test_a_group_that_can_lose_nothing_more_keeps_what_it_has() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1)).eval()
    session = lp.PruningSession(model, torch.rand(2, 3, 8, 8), criterion="l1", schedule=Gradual(2), ratio=0.85)
    session.step(reconstruct=True)
    kept, graph = session.built.groups["0"].keep, session.graph
    stuck = [dataclasses.replace(g, reason="is stuck") if g.name == "0" else g for g in graph.groups]
    session._traced._graph = dataclasses.replace(graph, groups=tuple(stuck))
    with pytest.warns(NoEffectWarning, match=rf"group '0' keeps the {len(kept)} channels it has left: it is stuck"):
        session.step(reconstruct=True)
    assert session.plan.groups["0"].keep == kept
    assert session.done
