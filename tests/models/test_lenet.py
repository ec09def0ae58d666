"""LeNet: Guo et al.'s shapes, and the pruning of both convolutions through to the linear layers."""

from __future__ import annotations

import torch
from torch import nn

import lightning_prune as lp
from lightning_prune.models import LeNet
from tests.helpers import random_plan


def test_the_layers_are_those_of_guo_et_al():
    shapes = [tuple(layer.weight.shape) for layer in LeNet().children()]
    assert shapes == [(32, 1, 5, 5), (64, 32, 5, 5), (120, 1600), (84, 120), (10, 84)]
    assert LeNet(26, in_channels=3)(torch.zeros(2, 3, 32, 32)).shape == (2, 26)


def test_it_is_what_its_layers_make_in_a_row():
    net = LeNet().double()
    conv1, conv2, fc1, fc2, fc3 = net.children()
    relu, pool = nn.ReLU(), nn.MaxPool2d(2)
    row = nn.Sequential(conv1, relu, pool, conv2, relu, pool, nn.Flatten(), fc1, relu, fc2, relu, fc3)
    x = torch.randn(2, 1, 32, 32, dtype=torch.float64)
    assert torch.equal(net(x), row(x))


def test_everything_but_the_logits_is_pruned_without_loss():
    net = LeNet().double().eval()
    x = torch.randn(2, 1, 32, 32, dtype=torch.float64)
    graph = lp.trace(net, x)
    assert sorted(group.size for group in graph.groups if group.prunable) == [32, 64, 84, 120]
    plan = random_plan(graph, 0.5)
    small = lp.reconstruct(net, graph, plan)
    lp.mask_(net, graph, plan)
    assert lp.check_lossless(net, small, x).passed
