"""The penalty on whole channels: its gradient against autograd, who is penalised together, what is refused."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_prune as lp
from lightning_prune.criteria import GroupSparsity, condemned_strengths, importance_strengths
from lightning_prune.errors import PlanError, ScoreError
from lightning_prune.plan import GroupPlan, Plan
from tests import zoo
from tests.criteria.helpers import case, loss


def random_strengths(graph):
    generator = torch.Generator().manual_seed(3)
    return {group.name: torch.rand(group.size, generator=generator).double() for group in graph.prunable_groups}


def explicit(model, graph, strengths):
    """The formula channel by channel: W_k is what every tensor loses when channel k alone is removed."""
    parameters, total = dict(model.named_parameters()), torch.zeros((), dtype=torch.float64)
    for name, values in strengths.items():
        for channel, strength in enumerate(values.tolist()):
            for cut in graph.cuts({name: torch.tensor([channel])}):
                if cut.tensor in parameters:
                    gone = torch.ones(parameters[cut.tensor].shape[cut.dim], dtype=torch.bool)
                    gone[cut.keep] = False
                    lost = parameters[cut.tensor].movedim(cut.dim, 0)[gone]
                    total = total + 0.5 * strength * lost.square().sum()
    return total


@pytest.mark.parametrize("name", ["Vgg", "Residual", "Grouped", "Dense", "Shared", "InvertedResidual", "PreActivation"])
def test_the_gradient_is_that_of_the_penalty(name):
    model, graph, images, labels = case(name)
    strengths = random_strengths(graph)
    loss(model, (images, labels)).backward()
    plain = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    penalty = GroupSparsity(model, graph, strengths)
    expected = explicit(model, graph, strengths)
    torch.testing.assert_close(penalty.value(), expected.detach(), rtol=1e-12, atol=0)
    penalty.add_(0.3)
    found = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    model.zero_grad()
    (0.3 * expected).backward()
    penalised = 0
    for key, parameter in model.named_parameters():
        added = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found[key], plain[key] + added, rtol=1e-12, atol=1e-15)
        penalised += bool(added.any())
    assert penalised > len(plain) / 2


def test_layers_that_meet_at_an_addition_and_all_readers_are_penalised_together():
    model, graph, images, labels = case("Residual")
    strengths = {"stem.0": torch.zeros(8)}
    strengths["stem.0"][3] = 2.0
    loss(model, (images, labels)).backward()
    plain = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    GroupSparsity(model, graph, strengths).add_()
    rows = ["stem.0.weight", "stem.1.weight", "stem.1.bias", "a2.0.weight", "a2.1.weight", "a2.1.bias"]
    columns = ["a1.0.weight", "b1.0.weight", "down.0.weight"]
    for key, parameter in model.named_parameters():
        expected = torch.zeros_like(parameter)
        if key in rows:
            expected[3] = 2 * parameter.detach()[3]
        elif key in columns:
            expected[:, 3] = 2 * parameter.detach()[:, 3]
        torch.testing.assert_close(parameter.grad - plain[key], expected, rtol=1e-12, atol=1e-14)


def test_what_has_no_gradient_or_belongs_to_another_optimizer_is_left_alone():
    model, graph, images, labels = case("Residual")
    frozen, other = model.a1[0].weight.requires_grad_(False), model.b1[0].weight
    loss(model, (images, labels)).backward()
    before = other.grad.clone()
    penalty = GroupSparsity(model, graph, random_strengths(graph))
    penalty.add_(1.0, [parameter for parameter in model.parameters() if parameter is not other])
    assert frozen.grad is None
    assert torch.equal(other.grad, before)
    penalty.add_(1.0, [other])
    assert not torch.equal(other.grad, before)
    again = model.a2[0].weight.grad.clone()
    penalty.add_(1.0, [])
    assert torch.equal(model.a2[0].weight.grad, again)


def test_one_parameter_under_two_names_counts_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.first, self.second = (nn.Conv2d(3, 6, 1), *(nn.Conv2d(6, 6, 1, bias=False) for _ in "ab"))
            self.second.weight, self.head = self.first.weight, nn.Conv2d(6, 2, 1)

        def forward(self, x):
            return self.head(F.relu(self.second(F.relu(self.first(F.relu(self.stem(x)))))))

    model = Tied().double()
    graph = lp.trace(model, zoo.images())
    strengths = random_strengths(graph)
    assert graph.prunable_groups
    expected = explicit(model, graph, strengths).detach()
    torch.testing.assert_close(GroupSparsity(model, graph, strengths).value(), expected, rtol=1e-12, atol=0)


def test_strengths_by_importance_are_the_formula():
    found = importance_strengths({"a": torch.tensor([3.0, 1.0, 2.0]), "b": torch.tensor([5.0, 5.0])}, alpha=2.0)
    assert found["a"].tolist() == [1.0, 4.0, 2.0]
    assert found["b"].tolist() == [1.0, 1.0]
    assert importance_strengths({"a": torch.tensor([0.0, 1.0])})["a"].tolist() == [16.0, 1.0]


def test_strengths_of_the_condemned_are_those_that_the_plan_removes():
    plan = Plan({"a": GroupPlan(4, (0, 3)), "b": GroupPlan(2, (0, 1))})
    assert {key: values.tolist() for key, values in condemned_strengths(plan).items()} == {
        "a": [0.0, 1.0, 1.0, 0.0],
        "b": [0.0, 0.0],
    }


def test_what_does_not_fit_is_refused():
    model, graph, *_ = case("Residual")
    with pytest.raises(ScoreError, match=r"group 'stem.0' has 8 channels, got strengths of shape \[7\]"):
        GroupSparsity(model, graph, {"stem.0": torch.ones(7)})
    for bad in (-1.0, float("nan")):
        with pytest.raises(ScoreError, match="strengths must be finite numbers"):
            GroupSparsity(model, graph, {"stem.0": torch.full((8,), bad)})
    with pytest.raises(PlanError, match="no channel group 'nowhere'"):
        GroupSparsity(model, graph, {"nowhere": torch.ones(8)})
    with pytest.raises(PlanError, match="traced on another model"):
        GroupSparsity(zoo.build("Vgg"), graph, {"stem.0": torch.ones(8)})
