"""Steps with reconstruction between them: the smaller model's channels stay in the groups of the dense one."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from torch import nn

import lightning_prune as lp
from lightning_prune.schedule import Gradual
from tests.graph.architecture_blocks import Conv, Shuffle, Split
from tests.graph.architectures import Net, nets
from tests.graph.test_properties import profile

# Groups of few channels, small shares.
pytestmark = pytest.mark.filterwarnings("ignore::lightning_prune.errors.NoEffectWarning")


def prune_in_steps(net: Net, steps: int = 3, ratio: float = 0.5) -> lp.PruningSession:
    """Random scores, a reconstruction after every step, which compares itself; at the end the same at another batch."""
    model, rng = net.module().eval(), torch.Generator().manual_seed(net.seed)
    session = lp.PruningSession(model, net.images(), criterion="l1", schedule=Gradual(steps), ratio=ratio)
    if not session.graph.prunable_groups:
        return session
    while not session.done:
        scores = session.score()
        for name, values in scores.items():
            scores[name] = torch.rand(len(values), dtype=torch.float64, generator=rng)
        session.mask_()
        masked, images = copy.deepcopy(model), net.images(3)
        session.reconstruct_()
        assert lp.check_lossless(masked, model, images).passed
    for group in session.graph.groups:
        planned = session.plan.groups.get(group.name)
        assert planned is None or group.size == len(planned.keep)
    return session


@settings(profile, max_examples=12, derandomize=True)
@given(net=nets())
def test_random_architectures_are_pruned_in_steps(net: Net) -> None:
    prune_in_steps(net)


@pytest.mark.slow
@pytest.mark.timeout(900)
@settings(profile, max_examples=200)
@given(net=nets())
def test_many_random_architectures_are_pruned_in_steps(net: Net) -> None:
    prune_in_steps(net)


def test_channels_of_several_filters_that_fall_apart() -> None:
    """Three channels of two filters each; of one of them the filters are no longer tied."""
    net = Net(blocks=(Split(blocks=(Shuffle(groups=3),), how="split"), Conv(width=6)))
    session = prune_in_steps(net, steps=4, ratio=0.7)
    name = next(group.name for group in session.dense_graph.groups if group.layers[0].index.shape[1] == 2)
    assert len(session.plan.groups[name].keep) == session.graph.group(name).size


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
