"""Compensation on a trained net, over the zoo, and what is left after a failure; batch norms against torch's own."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import lightning_prune as lp
from lightning_prune.compensation import fold_constants_, least_squares_, recalibrate_bn_
from lightning_prune.data.digits import split_digits
from lightning_prune.errors import CompensationError, NoEffectWarning
from lightning_prune.plan import GroupPlan, Plan
from tests.compensation.helpers import Chain, chain, masked, same, state
from tests.helpers import random_plan
from tests.zoo import ZOO, build, images

BOTH = [fold_constants_, least_squares_]

# --- batch norm ---


def test_statistics_are_those_of_torch() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)
    )
    batches = [torch.randn(6, 3, 8, 8) + k for k in range(3)]
    reference = copy.deepcopy(model)
    update_bn([[batch] for batch in batches], reference)
    recalibrate_bn_(model, batches)
    assert same(state(model), state(reference))
    means = torch.stack([model[0](batch).transpose(0, 1).flatten(1).mean(1) for batch in batches]).mean(0)
    assert torch.allclose(model[1].running_mean, means, atol=1e-6)


def test_only_batch_norms_are_in_train_mode() -> None:
    model = nn.Sequential(nn.Dropout(0.9), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    without = copy.deepcopy(model[1:])
    batches = [torch.randn(6, 3, 8, 8)]
    recalibrate_bn_(model, batches)
    recalibrate_bn_(without, batches)
    assert torch.equal(model[2].running_mean, without[1].running_mean)


@pytest.mark.parametrize("fails", [False, True])
def test_batch_norm_modes_and_random_state_are_restored(fails: bool) -> None:
    model = nn.Sequential(nn.Dropout(), nn.Linear(2, 3), nn.BatchNorm1d(3, momentum=0.2), nn.BatchNorm1d(3)).train()
    model[3].eval()
    before, random = state(model), torch.get_rng_state()

    def loss(module: nn.Module, batch: int) -> None:
        torch.rand(1)
        module(torch.randn(4, 2))
        if fails and batch:
            raise RuntimeError("out of memory")

    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            recalibrate_bn_(model, range(2), loss=loss)
        assert same(state(model), before)
    else:
        recalibrate_bn_(model, range(2), loss=loss)
        assert not same(state(model), before)
    assert [module.training for module in model] == [True, True, True, False]
    assert model[2].momentum == 0.2
    assert torch.equal(torch.get_rng_state(), random)


def test_a_batch_norm_that_is_not_reached_keeps_its_statistics() -> None:
    model = nn.ModuleList([nn.BatchNorm1d(2), nn.BatchNorm1d(2)])
    model[1].running_mean.fill_(7.0)
    recalibrate_bn_(model, [torch.randn(4, 2)], loss=lambda m, x: m[0](x))
    assert model[1].running_mean.tolist() == [7.0, 7.0]
    assert model[0].running_mean.any()


def test_nothing_to_recalibrate_is_refused() -> None:
    with pytest.raises(CompensationError, match="no batch norm"):
        recalibrate_bn_(nn.Linear(1, 1), [torch.zeros(1, 1)])
    with pytest.raises(CompensationError, match="no batch norm"):
        recalibrate_bn_(nn.BatchNorm1d(1, track_running_stats=False), [torch.zeros(2, 1)])
    norm = nn.BatchNorm1d(1)
    norm.running_mean.fill_(3.0)
    with pytest.raises(CompensationError, match="no batch"):
        recalibrate_bn_(norm, [])
    assert norm.running_mean.item() == 3.0


# --- both ---


@pytest.mark.parametrize("compensate", BOTH)
@pytest.mark.parametrize("name", ZOO)
def test_over_the_zoo_what_is_masked_is_lossless_still(name: str, compensate) -> None:
    model = build(name)
    x = images(8)
    graph = lp.trace(model, x)
    plan = random_plan(graph)
    dense = model(x).detach()
    with torch.no_grad():
        error = float((masked(model, graph, plan)(x) - dense).square().mean())
    assert compensate(model, graph, plan, [x], missing="skip")
    assert lp.check_lossless(model, lp.reconstruct(model, graph, plan), x).passed
    with torch.no_grad(), lp.mask_(model, graph, plan) as handle:  # which changes nothing
        assert handle.is_zero()
        if compensate is least_squares_ and name not in ("Shared", "SigmoidConstant"):  # there exp() magnifies
            assert float((model(x) - dense).square().mean()) < error


@pytest.mark.parametrize("compensate", BOTH)
def test_failures_leave_everything_as_it_was(compensate) -> None:
    model = build("Residual").train()
    model.relu.eval()
    x = images()
    graph = lp.trace(model, x)
    plan, before, random = random_plan(graph), state(model), torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    calls = []

    def loss(module: nn.Module, batch: Tensor) -> None:
        calls.append(torch.rand(1))
        module(batch)
        if len(calls) == 4:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        compensate(model, graph, plan, [x] * 4, loss=loss)
    assert same(state(model), before)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("compensate", BOTH)
def test_modes_and_flags_are_kept_on_success(compensate) -> None:
    model = build("Residual").train()
    model.a1[0].weight.requires_grad_(False)
    x = images(8)
    graph = lp.trace(model, x)
    means = state(model)
    compensate(model, graph, random_plan(graph), [x])
    assert model.training
    assert model.a1[1].training
    assert not model.a1[0].weight.requires_grad
    assert model.a2[0].weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(model.stem[1].running_var, means["stem.1.running_var"])  # running it moved no statistic


@pytest.mark.parametrize("compensate", BOTH)
def test_bad_input_is_refused(compensate) -> None:
    model, graph, plan, x = chain("padded")
    before = state(model)
    for batches, says in (([], "no batch"), (x, "got one tensor")):
        with pytest.raises(CompensationError, match=says):
            compensate(model, graph, plan, batches)
    with pytest.raises(CompensationError, match=r"no batch reached reader"):
        compensate(model, graph, plan, [x], loss=lambda m, batch: m.first(batch))
    with pytest.warns(NoEffectWarning):
        assert compensate(model, graph, Plan({}), [x]) == ()
    assert same(state(model), before)
    with lp.mask_(model, graph, plan), pytest.raises(CompensationError, match="before mask_"):
        compensate(model, graph, plan, [x])
    assert same(state(model), before)
    compensate(model, graph, plan, [x])
    with pytest.raises(CompensationError, match="zero already"):
        compensate(model, graph, plan, [x])


def test_layers_with_a_forward_of_their_own_are_refused() -> None:
    class Scaled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = Chain(Scaled(8, 6, 1)).double().eval()
    x = images()
    graph = lp.trace(model, x)
    for compensate in BOTH:
        with pytest.raises(CompensationError, match=r"reader \(a Scaled of its own\)"):
            compensate(copy.deepcopy(model), graph, Plan({"first": GroupPlan(8, (0, 1))}), [x])


# --- what it is for ---


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, list[Tensor], Tensor, Tensor]:
    """A small net on 8x8 digits: (net, training batches, test images, labels)."""
    torch.manual_seed(0)
    parts = split_digits(size=8)
    (train, targets), (test, labels) = parts["train"].tensors, parts["test"].tensors
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(6):
        for batch in torch.randperm(len(train)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(train[batch]), targets[batch]).backward()
            optimizer.step()
    return model.eval(), list(train.split(256)), test, labels


def test_each_repairs_a_trained_net(trained) -> None:
    model, batches, test, labels = trained
    graph = lp.trace(model, test[:2])
    plan = lp.LayerRatio(0.5).select(graph, lp.score(model, graph, "l1"))

    def quality(net: nn.Module) -> tuple[float, float]:
        """Accuracy, and distance from the dense logits."""
        with torch.no_grad():
            logits, wanted = net(test), model(test)
        return float((logits.argmax(1) == labels).double().mean()), float((logits - wanted).square().mean())

    pruned = {name: copy.deepcopy(model) for name in ("masked", "recalibrated", "folded", "refitted", "both")}
    lp.mask_(pruned["masked"], graph, plan)
    lp.mask_(pruned["recalibrated"], graph, plan)
    recalibrate_bn_(pruned["recalibrated"], batches)
    fold_constants_(pruned["folded"], graph, plan, batches)
    least_squares_(pruned["refitted"], graph, plan, batches)
    least_squares_(pruned["both"], graph, plan, batches)
    recalibrate_bn_(pruned["both"], batches)
    found = {name: quality(net) for name, net in pruned.items()}
    accuracy, distance = found.pop("masked")
    assert quality(model)[0] > 0.95
    assert accuracy < 0.9
    assert all(a > accuracy and d < distance for a, d in found.values())
    assert found["refitted"][1] < 0.5 * distance


def test_in_one_call(trained) -> None:
    model, batches, test, _ = trained
    before = state(model)

    def repair(net: nn.Module, graph: lp.ChannelGraph, plan: Plan) -> None:
        least_squares_(net, graph, plan, batches)

    plain = lp.prune(model, test[:2], ratio=0.4)
    repaired = lp.prune(model, test[:2], ratio=0.4, compensate=repair)
    assert repaired.lossless.passed
    assert repaired.plan == plain.plan
    assert same(state(model), before)
    with torch.no_grad():
        wanted = model(test)
        errors = [float((result.model(test) - wanted).square().mean()) for result in (plain, repaired)]
        assert torch.allclose(repaired.masked(test), repaired.model(test), atol=1e-4)
    assert errors[1] < 0.5 * errors[0]
