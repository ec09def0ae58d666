"""Means folded and weights refitted, against slow references in numpy."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.compensation import fold_constants_, least_squares, least_squares_
from lightning_prune.errors import CompensationError
from lightning_prune.plan import GroupPlan, Plan
from tests.compensation.helpers import READERS, chain, entering, leaving, masked, removed_entries, same, seen_by, state
from tests.helpers import random_plan
from tests.zoo import build, images

# --- means into biases ---


@pytest.mark.parametrize("name", READERS)
def test_folded_is_the_mean_contribution_of_what_goes(name: str) -> None:
    model, graph, plan, x = chain(name)
    value, layer = entering(model, "reader", x), model.reader
    gone, weight = removed_entries(model, graph, plan, "reader"), layer.weight.detach().numpy()
    wanted = np.zeros(6)
    for group in range(layer.groups):
        outputs = slice(group * 6 // layer.groups, (group + 1) * 6 // layer.groups)
        each = [np.einsum("ocab,cab->o", weight[outputs][:, gone], patch[gone])
                for *_, patch in seen_by(layer, value, group)]  # fmt: skip
        wanted[outputs] = np.mean(each, axis=0)
    bias, mean = None if layer.bias is None else layer.bias.detach().clone(), model.norm.running_mean.clone()
    assert fold_constants_(model, graph, plan, [x]) == ("reader",)
    found = mean - model.norm.running_mean if bias is None else layer.bias.detach() - bias
    assert np.abs(wanted).max() > 1e-3
    assert np.allclose(found.numpy(), wanted, atol=1e-12)


def test_expected_pre_activations_are_the_dense_ones() -> None:
    model, graph, plan, x = chain("padded")
    dense = leaving(model, "reader", x).mean((0, 2, 3))
    assert not torch.allclose(leaving(masked(model, graph, plan), "reader", x).mean((0, 2, 3)), dense, atol=1e-3)
    fold_constants_(model, graph, plan, [x])
    assert torch.allclose(leaving(model, "reader", x).mean((0, 2, 3)), dense, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kernel", [1, 3])
def test_constants_are_replaced_exactly_through_unpadded_readers(kernel: int, bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Sigmoid(), nn.Conv2d(6, 5, kernel, bias=bias),
        nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 2, 1),
    ).double().eval()  # fmt: skip
    model[1].weight.data[[0, 3]] = 0.0
    model[1].bias.data[[0, 3]] = torch.tensor([2.0, -1.0], dtype=torch.float64)
    x = images(3)
    before, graph = model(x), lp.trace(model, x)
    plan = Plan({"0": GroupPlan(6, (1, 2, 4, 5))})
    assert not torch.allclose(masked(model, graph, plan)(x), before, atol=1e-3)
    fold_constants_(model, graph, plan, [x])
    other = images(4, seed=5)
    dense = lp.check_lossless(model, lp.reconstruct(model, graph, plan), other)
    assert dense.passed
    assert torch.allclose(lp.reconstruct(model, graph, plan)(x), before, atol=1e-12)


def test_a_linear_reader_behind_a_flatten() -> None:
    model = build("Vgg")
    x = images(5)
    graph = lp.trace(model, x)
    group = graph.group("features.3.0")
    plan = Plan({group.name: GroupPlan(group.size, tuple(range(6)))})
    value = entering(model, "classifier.0", x).numpy()  # 12 maps of 2x2
    weight, bias = model.classifier[0].weight.detach().numpy(), model.classifier[0].bias.detach().clone()
    wanted = value[:, 24:].mean(0) @ weight[:, 24:].T
    assert fold_constants_(model, graph, plan, [x[:2], x[2:]]) == ("classifier.0",)
    assert np.allclose((model.classifier[0].bias.detach() - bias).numpy(), wanted, atol=1e-12)


class AddedBeforeNorm(nn.Module):
    """A convolution without bias whose output reaches a batch norm only through an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1, bias=False)
        self.skip, self.norm, self.last = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.norm(self.outer(F.relu(self.inner(x))) + self.skip(x))))


def test_no_bias_and_no_batch_norm_right_behind() -> None:
    model = AddedBeforeNorm().double().eval()
    x = images()
    graph = lp.trace(model, x)
    plan, before = Plan({"inner": GroupPlan(6, (0, 1, 2))}), state(model)
    with pytest.raises(CompensationError, match=r"outer.*missing='skip'"):
        fold_constants_(model, graph, plan, [x])
    assert same(state(model), before)
    with pytest.raises(CompensationError, match="'refuse' or 'skip'"):
        fold_constants_(model, graph, plan, [x], missing="ignore")


def test_a_batch_norm_further_behind_is_no_place_for_a_constant() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1, bias=False), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)
    )
    model, x = model.double().eval(), images()
    graph = lp.trace(model, x)
    assert graph.layers["2"].norm == "4"
    before = state(model)
    with pytest.raises(CompensationError, match="no batch norm right behind"):
        fold_constants_(model, graph, Plan({"0": GroupPlan(6, (0, 1, 2))}), [x])
    assert same(state(model), before)


def test_others_are_repaired_if_asked_to_skip() -> None:
    model = AddedBeforeNorm().double().eval()
    x = images()
    graph = lp.trace(model, x)
    plan = random_plan(graph)
    assert set(plan.groups) == {"inner", "outer"}
    assert fold_constants_(model, graph, plan, [x], missing="skip") == ("last",)


# --- least squares ---


def reference_fit(
    layer: nn.Conv2d, value: Tensor, target: Tensor, kept: np.ndarray, damping: float
) -> list[np.ndarray]:
    """numpy's lstsq on the rows themselves, with the damping as rows of its own; per group weights, then bias."""
    found = []
    per_group = layer.out_channels // layer.groups
    for group in range(layer.groups):
        outputs = slice(group * per_group, (group + 1) * per_group)
        now = layer.weight.detach().numpy()[outputs][:, kept].reshape(per_group, -1)
        rows, wanted = [], []
        for n, i, j, patch in seen_by(layer, value, group):
            rows.append(patch[kept].ravel())
            wanted.append(target[n, outputs, i, j].numpy())
        rows, wanted = np.array(rows), np.array(wanted)
        held = np.sqrt(damping * (rows**2).sum(0).mean())
        columns = rows.shape[1]
        ones = np.ones((len(rows), 1)) if layer.bias is not None else np.zeros((len(rows), 0))
        matrix = np.vstack(
            [np.hstack([rows, ones]), np.hstack([held * np.eye(columns), np.zeros((columns, ones.shape[1]))])]
        )
        goal = np.vstack([wanted, held * now.T])
        found.append(np.linalg.lstsq(matrix, goal, rcond=None)[0])
    return found


@pytest.mark.parametrize("damping", [1e-6, 0.1])
@pytest.mark.parametrize("name", READERS)
def test_fit_is_that_of_numpy(name: str, damping: float) -> None:
    model, graph, plan, x = chain(name)
    kept = ~removed_entries(model, graph, plan, "reader")
    value, target = entering(masked(model, graph, plan), "reader", x), leaving(model, "reader", x)
    wanted = reference_fit(model.reader, value, target, kept, damping)
    assert least_squares_(model, graph, plan, [x], damping=damping) == ("reader",)
    weight = model.reader.weight.detach()[:, torch.from_numpy(kept)].flatten(1).unflatten(0, (len(wanted), -1))
    for group, solution in enumerate(wanted):
        columns = weight.shape[2]
        assert np.allclose(weight[group].numpy().T, solution[:columns], atol=1e-8)
        if model.reader.bias is not None:
            bias = model.reader.bias.detach().unflatten(0, (len(wanted), -1))[group]
            assert np.allclose(bias.numpy(), solution[columns], atol=1e-8)


def test_later_layers_see_the_refitted_earlier_ones() -> None:
    model, graph, _, x = chain("padded")
    plan = random_plan(graph)
    stepwise = copy.deepcopy(model)
    first = Plan({"first": plan.groups["first"]})
    damping = 1e-3
    assert least_squares_(model, graph, plan, [x], damping=damping) == ("reader", "last")

    dense_output = leaving(stepwise, "last", x)
    least_squares_(stepwise, graph, first, [x], damping=damping)
    pruned = masked(stepwise, graph, plan)
    kept = ~removed_entries(stepwise, graph, plan, "last")
    (wanted,) = reference_fit(stepwise.last, entering(pruned, "last", x), dense_output, kept, damping)
    assert np.allclose(
        model.last.weight.detach()[:, torch.from_numpy(kept)].flatten(1).numpy().T, wanted[:-1], atol=1e-8
    )


def test_neither_batches_nor_chunks_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for batches, chunk in (([6], 2**22), ([4, 2], 2**22), ([6], 1)):
        model, graph, plan, x = chain("grouped")
        monkeypatch.setattr(least_squares, "CHUNK", chunk)
        least_squares_(model, graph, plan, x.split(batches))
        results.append(model.reader.weight.detach().clone())
    assert torch.allclose(results[0], results[1], atol=1e-10)
    assert torch.allclose(results[0], results[2], atol=1e-10)


def test_linear_layers_on_sequences() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 2)).double().eval()
    model[0].bias.data += 1.0  # no feature is always zero: lstsq would zero its weights, damping leaves them
    x = torch.randn(3, 7, 4, dtype=torch.float64)  # (samples, places, features)
    graph = lp.trace(model, x)
    plan = Plan({"0": GroupPlan(8, (0, 2, 3, 7))})
    rows = entering(masked(model, graph, plan), "2", x)[..., [0, 2, 3, 7]].reshape(-1, 4).numpy()
    target = leaving(model, "2", x).reshape(-1, 5).numpy()
    wanted = np.linalg.lstsq(np.hstack([rows, np.ones((21, 1))]), target, rcond=None)[0]
    least_squares_(model, graph, plan, [x], damping=1e-12)
    assert np.allclose(model[2].weight.detach()[:, [0, 2, 3, 7]].numpy().T, wanted[:4], atol=1e-6)
    assert np.allclose(model[2].bias.detach().numpy(), wanted[4], atol=1e-6)


def test_weights_stay_where_the_data_say_nothing() -> None:
    model, graph, plan, x = chain("padded")
    before = model.reader.weight.detach().clone()
    least_squares_(model, graph, plan, [torch.full_like(x, 0.0)])  # every position alike: nothing but the border varies
    assert torch.isfinite(model.reader.weight).all()
    model, graph, plan, x = chain("padded")
    model.first.bias.data.zero_()
    least_squares_(model, graph, plan, [torch.zeros_like(x)])  # nothing enters the reader at all
    assert torch.equal(model.reader.weight, before)


def test_values_that_are_not_finite_are_refused() -> None:
    for compensate in (fold_constants_, least_squares_):
        model, graph, plan, x = chain("padded")
        before = state(model)
        with pytest.raises(CompensationError, match=r"reader: .*NaN or infinite"):
            compensate(model, graph, plan, [x, x / 0])
        assert same(state(model), before)


@pytest.mark.parametrize("damping", [0, -1.0, float("nan"), float("inf"), True])
def test_damping_must_be_positive(damping: float) -> None:
    model, graph, plan, x = chain("padded")
    with pytest.raises(CompensationError, match="damping"):
        least_squares_(model, graph, plan, [x], damping=damping)
