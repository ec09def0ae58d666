"""Gradient checkpointing runs modules a second time inside the backward pass: scores are the same as without."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import lightning_prune as lp
from lightning_prune.criteria import DCP, GRE, JRE, LRE, APoZ, NextLayerTaylor, Taylor, TaylorFO, ThiNet
from lightning_prune.criteria.scorer import Scorer

CRITERIA = [
    Taylor(site="bn"),
    Taylor(site="activation"),
    Taylor(definition="nvlabs"),
    TaylorFO(form="weight"),
    TaylorFO(),
    NextLayerTaylor(),
    NextLayerTaylor(form="weight"),
    LRE(),
    LRE(reference="baseline"),
    GRE(),
    JRE(),
    ThiNet(),
    APoZ(),
    DCP(heads=0),
    DCP(heads=3),
]


class Net(nn.Module):
    """Parts of different depth inside checkpoints, one nested in another, one outside."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.a = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.b = nn.Sequential(nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Dropout(0.2))
        self.c = nn.Sequential(nn.Conv2d(12, 8, 1), nn.ReLU(), nn.Conv2d(8, 12, 1))
        self.hidden, self.o = nn.Linear(12, 10), nn.Linear(10, 4)

    def run(self, part, x):
        return part(x) if self.how is None else checkpoint(part, x, use_reentrant=self.how)

    def forward(self, x):
        x = self.run(lambda y: self.run(self.b, self.a(y)), x)
        x = x + self.run(self.c, x)
        return self.o(self.run(self.hidden, x.mean((2, 3))).relu())


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def setting(how):
    torch.manual_seed(0)
    model = Net(how).double()
    for norm in (model.a[1], model.b[1]):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
    batches = [(torch.randn(6, 3, 8, 8).double().requires_grad_(), torch.arange(6) % 4) for _ in range(2)]
    return model, lp.trace(model, batches[0][0]), batches


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("how", [False, True], ids=["saved", "reentrant"])
@pytest.mark.parametrize("criterion", CRITERIA, ids=repr)
def test_scores_are_the_same_with_checkpoints(criterion, how, mode):
    found = []
    for kind in (None, how):
        model, graph, batches = setting(kind)
        baseline = model.state_dict() if criterion.needs_reference else None
        torch.manual_seed(1)
        found.append(lp.score(model, graph, criterion, batches, loss, baseline=baseline, bn_mode=mode))
    assert found[0].keys() == found[1].keys()
    for name, scores in found[0].items():
        assert scores.numel()
        torch.testing.assert_close(found[1][name], scores, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("how", [False, True], ids=["saved", "reentrant"])
@pytest.mark.parametrize("criterion", [Taylor(), JRE(), APoZ()], ids=repr)
def test_a_training_loop_that_is_watched_gets_the_same_scores_and_gradients(criterion, how):
    found, gradients = [], []
    for kind in (None, how):
        model, graph, batches = setting(kind)
        scorer = Scorer(model, graph, criterion)
        torch.manual_seed(1)
        for batch in batches:
            scorer.begin_batch()
            loss(model, batch).backward()
            scorer.end_batch()
        found.append(scorer.compute())
        gradients.append([parameter.grad for parameter in model.parameters()])
    for name, scores in found[0].items():
        torch.testing.assert_close(found[1][name], scores, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    "criterion", [Taylor(), Taylor(site="activation"), JRE(), NextLayerTaylor(), DCP(heads=2)], ids=repr
)
def test_frozen_parts_inside_checkpoints(criterion):
    found = []
    for kind in (None, False):
        model, graph, batches = setting(kind)
        model.a.requires_grad_(False)
        model.b[0].requires_grad_(False)
        batches = [(images.detach(), labels) for images, labels in batches]
        found.append(lp.score(model, graph, criterion, batches, loss))
    for name, scores in found[0].items():
        torch.testing.assert_close(found[1][name], scores, rtol=1e-10, atol=1e-14)
