"""Losslessness: masked and reconstructed models compute the same, in float64, whatever the topology."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

from lightning_prune.errors import NotReconstructedWarning, PlanError, ReconstructionError
from lightning_prune.graph import trace
from lightning_prune.plan import GroupPlan, Plan
from lightning_prune.reconstruction.lossless import check_lossless
from lightning_prune.reconstruction.masks import mask_, masked_entries
from lightning_prune.reconstruction.small_model import cuts, reconstruct, reconstruct_
from tests.helpers import random_plan
from tests.zoo import ZOO, build, images, randomise_


@pytest.mark.parametrize("coupling", ["joint", "union"])
@pytest.mark.parametrize("name", ZOO)
def test_masked_equals_reconstructed(name: str, coupling: str) -> None:
    model, x = build(name), images()
    graph = trace(model, x)
    plan = random_plan(graph, 0.5, coupling)
    small = reconstruct(model, graph, plan)
    dense = model(x)
    handle = mask_(model, graph, plan)
    report = check_lossless(model, small, x)
    assert report.passed, report
    assert report.dtype == "float64"
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    assert (model(x) - dense).abs().max() > 1e-3  # the masks matter
    other = images(3, 12, seed=7) if name != "Vgg" else images(3, 8, seed=7)
    assert check_lossless(model, small, other).passed  # not only on the traced size
    handle.undo()
    assert torch.equal(model(x), dense)


@pytest.mark.parametrize("name", sorted(set(ZOO) - {"Vgg"}))  # dropout differs
@pytest.mark.parametrize("coupling", ["joint", "union"])
def test_equal_in_train_mode_with_gradients(name: str, coupling: str) -> None:
    model, x = build(name).train(), images(4)
    graph = trace(model, x)
    plan = random_plan(graph, 0.5, coupling)
    small = reconstruct(model, graph, plan)
    mask_(model, graph, plan)
    outputs = [m(x) for m in (model, small)]
    outputs = [out if isinstance(out, tuple) else (out,) for out in outputs]
    for masked, reconstructed in zip(*outputs, strict=True):
        assert torch.allclose(masked, reconstructed, rtol=1e-10, atol=1e-12)
    for out in outputs:
        sum(o.square().sum() for o in out).backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    free = {key: torch.ones(parameter.shape, dtype=torch.bool) for key, parameter in model.named_parameters()}
    for zeros in masked_entries(graph, plan):
        zeros.clear_(free[zeros.parameter])  # held at zero; those that the small model still has train again
    for cut in cuts(graph, plan):
        for tensors in (gradients, free):
            if cut.tensor in tensors:
                tensors[cut.tensor] = cut.apply(tensors[cut.tensor])
    assert sum(bool(parameter.grad.any()) for parameter in small.parameters()) >= 0.8 * len(list(small.parameters()))
    for key, parameter in small.named_parameters():
        assert torch.allclose(gradients[key] * free[key], parameter.grad * free[key], rtol=1e-8, atol=1e-10), key


def test_intersection_is_smaller_and_lossy() -> None:
    model, x = build("Residual"), images()
    graph = trace(model, x)
    plan = random_plan(graph, 0.5, "intersection")
    small = reconstruct(model, graph, plan)
    mask_(model, graph, plan)
    assert not plan.lossless
    assert check_lossless(model, small, x).max_rel_error > 1e-3


def test_batch_norm_left_out_is_lossy() -> None:
    model, x = build("Residual"), images()
    graph = trace(model, x)
    plan = random_plan(graph, 0.5, batch_norm=False)
    small = reconstruct(model, graph, plan)
    mask_(model, graph, plan)
    assert model.stem[1].bias.ne(0).all()
    assert check_lossless(model, small, x).max_rel_error > 1e-3


def test_union_keeps_what_any_layer_keeps_as_zero_filters() -> None:
    model, x = build("Residual"), images()
    graph = trace(model, x)
    plan = random_plan(graph, 0.5, "union")
    group = plan.groups["stem.0"]
    assert set(group.keep) == set(group.layers["stem.0"]) | set(group.layers["a2.0"])
    small = reconstruct(model, graph, plan)
    empty = (small.stem[0].weight.flatten(1).abs().sum(1) == 0).sum()
    assert int(empty) == len(group.keep) - len(group.layers["stem.0"]) > 0


def test_the_model_itself_is_untouched() -> None:
    model, x = build("Residual"), images()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    reconstruct(model, trace(model, x), random_plan(trace(model, x)))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.stem[0].out_channels == 8


def test_in_place_keeps_parameters_and_cuts_optimizer_state() -> None:
    model, x = build("Residual").train(), images(4)
    graph = trace(model, x)
    parameters = list(model.parameters())
    for make in (
        lambda p: torch.optim.SGD(p, 0.01, momentum=0.9),
        lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True),
    ):
        work = copy.deepcopy(model)
        optimizer = make(work.parameters())
        identities = [id(p) for p in work.parameters()]
        _step(work, optimizer, x)
        plan = random_plan(graph)
        expected = {key: value.clone() for key, value in optimizer.state[work.a1[0].weight].items() if value.dim() > 0}
        reconstruct_(work, graph, plan, optimizers=[optimizer])
        assert [id(p) for p in work.parameters()] == identities
        rows, columns = list(plan.groups["a1.0"].keep), list(plan.groups["stem.0"].keep)
        for key, value in expected.items():
            assert torch.equal(optimizer.state[work.a1[0].weight][key], value[rows][:, columns])
        _step(work, optimizer, x)
    assert len(parameters) == len(identities)


def test_zero_filters_that_stay_have_no_momentum() -> None:
    model, x = build("Residual").train(), images(4)
    graph = trace(model, x)
    plan = random_plan(graph, 0.5, "union")
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    _step(model, optimizer, x)
    reconstruct_(model, graph, plan, optimizers=[optimizer])
    zero = ~model.stem[0].weight.flatten(1).any(1)
    momentum = optimizer.state[model.stem[0].weight]["momentum_buffer"].flatten(1)
    assert 0 < zero.sum() < len(zero)
    assert not momentum[zero].any()
    assert momentum[~zero].any(1).all()


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()


def test_attributes_say_what_the_weights_are() -> None:
    model, x = build("Grouped"), images()
    graph = trace(model, x)
    small = reconstruct(model, graph, random_plan(graph))
    assert (small.multiply[0].groups, small.multiply[0].in_channels, small.multiply[0].out_channels) == (
        4,
        4,
        8,
    )
    assert (small.b[0].groups, small.b[0].in_channels, small.b[0].out_channels) == (3, 6, 6)
    assert small.stem[1].num_features == 4
    assert small.head.fc.in_features == 8


def test_position_tied_groups_of_one_filter_stay_groups() -> None:
    model, x = build("Grouped"), images()
    graph = trace(model, x)
    small = reconstruct(model, graph, random_plan(graph, 0.74))
    mask_(model, graph, random_plan(graph, 0.74))
    assert small.b[0].weight.shape[:2] == (3, 1)
    assert check_lossless(model, small, x).passed


def test_result_can_be_copied_pickled_and_trained() -> None:
    model, x = build("InvertedResidual"), images(4)
    graph = trace(model, x)
    small = reconstruct(model, graph, random_plan(graph))
    for twin in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert torch.equal(twin(x), small(x))
        _step(twin.train(), torch.optim.SGD(twin.parameters(), 0.1), x)


class Picky(nn.Module):
    """Does not run with fewer than three channels, which tracing does not try."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        if x.shape[1] < 3:
            raise ValueError("three channels at least")
        return self.fc(self.b(x).mean((2, 3)))


def test_a_group_that_the_code_needs_whole_keeps_its_width_and_is_reported() -> None:
    model, x = randomise_(Picky()).eval(), images(2, 4)
    graph = trace(model, x)
    plan = random_plan(graph, 0.67)
    masked = copy.deepcopy(model)
    mask_(masked, graph, plan)
    with pytest.warns(NotReconstructedWarning, match="group 'a' keeps its 6 channels.*three channels at least"):
        report = reconstruct_(model, graph, plan, example_inputs=x)
    assert (model.a.out_channels, model.b.out_channels) == (6, 2)
    assert report.passed
    assert list(report.left) == ["a"]
    assert check_lossless(masked, model, x).passed


class Together(Picky):
    """Does not run if both layers are narrow."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.a(x)
        b = self.b(a)
        if a.shape[1] + b.shape[1] < 5:
            raise ValueError("five channels at least")
        return self.fc(b.mean((2, 3)))


def test_groups_that_cannot_both_be_cut_both_keep_their_width() -> None:
    model, x = randomise_(Together()).eval(), images(2, 4)
    graph = trace(model, x)
    with pytest.warns(NotReconstructedWarning, match="five channels at least"):
        report = reconstruct_(model, graph, random_plan(graph, 0.67), example_inputs=x)
    assert (model.a.out_channels, model.b.out_channels) == (6, 6)
    assert list(report.left) == ["a", "b"]
    assert report.passed


class Changing(Picky):
    """Once told to, computes something else at every call, or nothing at all."""

    then, calls = "", itertools.count(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.then == "fail":
            raise ValueError("no more")
        return self.fc(self.b(self.a(x)).mean((2, 3))) + (next(self.calls) if self.then == "drift" else 0)


def test_a_failure_is_undone() -> None:
    model, x = randomise_(Changing()).eval(), images(2, 4)
    graph = trace(model, x)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    _step(model, optimizer, x)
    before, state = model(x), copy.deepcopy(optimizer.state_dict())
    gradient = model.a.weight.grad.clone()
    model.then = "fail"
    with pytest.raises(ReconstructionError, match=r"does not run.*no more.*ignore"):
        reconstruct_(model, graph, random_plan(graph, 0.67), optimizers=[optimizer], example_inputs=x)
    model.then = ""
    assert torch.equal(model(x), before)
    assert torch.equal(model.a.weight.grad, gradient)
    assert model.a.out_channels == 6
    after = optimizer.state_dict()
    assert all(
        torch.equal(after["state"][k]["momentum_buffer"], v["momentum_buffer"]) for k, v in state["state"].items()
    )


def test_a_result_that_differs_is_refused_and_undone() -> None:
    model, x = randomise_(Changing()).eval(), images(2, 4)
    graph = trace(model, x)
    model.then = "drift"
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ReconstructionError, match="differs from the masked one"):
        reconstruct_(model, graph, random_plan(graph), example_inputs=x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan({"nowhere": GroupPlan(2, (0,))}), "no channel group 'nowhere'"),
        (Plan({"a1.0": GroupPlan(7, (0,))}), "has 8 channels, the plan is for 7"),
        (Plan({"a1.0": GroupPlan(8, ())}), "leaves no channel"),
        (Plan({"a1.0": GroupPlan(8, (0,), {"b": (0,)})}), "has no layer b"),
        (Plan({"head.fc": GroupPlan(5, (0,))}), "cannot be pruned: it reaches the model's output"),
    ],
)
def test_a_plan_of_another_model_is_refused(plan: Plan, message: str) -> None:
    model = build("Residual")
    graph = trace(model, images())
    for act in (mask_, reconstruct, reconstruct_):
        with pytest.raises(PlanError, match=message):
            act(model, graph, plan)


def test_a_graph_of_another_model_is_refused() -> None:
    graph = trace(build("Residual"), images())
    with pytest.raises(PlanError, match="traced on another model"):
        reconstruct(build("Plain"), graph, random_plan(graph))
    model = build("Residual")
    small = reconstruct(model, graph, random_plan(graph))
    with pytest.raises(PlanError, match=r"is \[4, 3, 3, 3\] here and was \[8, 3, 3, 3\]"):
        mask_(small, graph, random_plan(graph))


def test_the_copy_shares_no_memory_with_the_model() -> None:
    model, x = build("InvertedResidual"), images()
    model(x).sum().backward()
    graph = trace(model, x)
    small = reconstruct(model, graph, random_plan(graph))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    for parameter in small.parameters():
        parameter.data.fill_(7)
        parameter.grad.fill_(7)
    for buffer in small.buffers():
        buffer.fill_(7)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))


def test_a_graph_that_somebody_still_holds_does_not_disturb_the_next_backward() -> None:
    model = build("Residual")
    graph = trace(model, images())
    held = model(images()).sum()
    held.backward(retain_graph=True)
    reconstruct_(model, graph, random_plan(graph, 0.5))
    model(images()).sum().backward()
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())
    assert held.grad_fn is not None
