"""Compensation against slow references in numpy, its effect on a trained net, and what is left after a failure."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import lightning_prune as lp
from lightning_prune.compensation import fold_constants_, least_squares, least_squares_, recalibrate_bn_
from lightning_prune.data.digits import split_digits
from lightning_prune.errors import CompensationError, NoEffectWarning
from lightning_prune.plan import GroupPlan, Plan
from tests.helpers import random_plan
from tests.zoo import ZOO, build, images

BOTH = [fold_constants_, least_squares_]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def entering(model: nn.Module, path: str, x: Tensor) -> Tensor:
    """What enters a layer."""
    seen = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _m, args: seen.append(args[0].clone()))
    with torch.no_grad():
        model(x)
    handle.remove()
    return seen[0]


def leaving(model: nn.Module, path: str, x: Tensor) -> Tensor:
    """What a layer returns."""
    seen = []
    handle = model.get_submodule(path).register_forward_hook(lambda _m, _a, out: seen.append(out.clone()))
    with torch.no_grad():
        model(x)
    handle.remove()
    return seen[0]


def masked(model: nn.Module, graph: lp.ChannelGraph, plan: Plan) -> nn.Module:
    result = copy.deepcopy(model)
    lp.mask_(result, graph, plan)
    return result


def seen_by(layer: nn.Conv2d, value: Tensor, group: int) -> Iterator[tuple[int, int, int, np.ndarray]]:
    """Python loops: (sample, row, column, (inputs, taps, taps)) of every output position of one group."""
    (p, q), (s, t), (d, e), (kh, kw) = layer.padding, layer.stride, layer.dilation, layer.kernel_size
    size = layer.in_channels // layer.groups
    part = value[:, group * size : (group + 1) * size].numpy()
    part = np.pad(
        part, ((0, 0), (0, 0), (p, p), (q, q)), mode="reflect" if layer.padding_mode == "reflect" else "constant"
    )
    rows = (part.shape[2] - d * (kh - 1) - 1) // s + 1
    columns = (part.shape[3] - e * (kw - 1) - 1) // t + 1
    for n, i, j in itertools.product(range(len(part)), range(rows), range(columns)):
        patch = np.array([[[part[n, c, i * s + a * d, j * t + b * e] for b in range(kw)] for a in range(kh)]
                          for c in range(size)])  # fmt: skip
        yield n, i, j, patch


class Chain(nn.Module):
    """A layer to be pruned, and the layer under test that reads it; then another reader."""

    def __init__(self, reader: nn.Module, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.reader, self.norm = nn.Conv2d(3, 8, 3, padding=1), reader, norm or nn.Identity()
        self.last = nn.Conv2d(reader.out_channels, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.norm(self.reader(F.relu(self.first(x))))))


READERS = {
    "padded": lambda: nn.Conv2d(8, 6, 3, padding=1),
    "strided, dilated": lambda: nn.Conv2d(8, 6, 3, stride=2, dilation=2, padding=2),
    "uneven": lambda: nn.Conv2d(8, 6, (1, 3), stride=(2, 1), padding=(0, 1)),
    "reflected": lambda: nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect"),
    "grouped": lambda: nn.Conv2d(8, 6, 3, padding=1, groups=2),
    "without bias": lambda: nn.Conv2d(8, 6, 3, padding=1, bias=False),
}


def chain(name: str) -> tuple[Chain, lp.ChannelGraph, Plan, Tensor]:
    torch.manual_seed(0)
    model = Chain(READERS[name](), nn.BatchNorm2d(6)).double().eval()
    x = images(6)
    graph = lp.trace(model, x)
    size = graph.group("first").size  # 4 pairs under a grouped reader
    return model, graph, Plan({"first": GroupPlan(size, tuple(range(1, size, 2)))}), x


def removed_entries(model: nn.Module, graph: lp.ChannelGraph, plan: Plan, path: str) -> np.ndarray:
    gone = np.zeros(model.get_submodule(path).weight.shape[1], dtype=bool)
    for name, planned in plan.groups.items():
        for part in graph.group(name).slices:
            if part.tensor == f"{path}.weight" and part.layer is None:
                gone[part.index[list(planned.removed)].flatten().numpy()] = True
    return gone


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

    def forward(module: nn.Module, batch: int) -> None:
        torch.rand(1)
        module(torch.randn(4, 2))
        if fails and batch:
            raise RuntimeError("out of memory")

    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            recalibrate_bn_(model, range(2), forward=forward)
        assert same(state(model), before)
    else:
        recalibrate_bn_(model, range(2), forward=forward)
        assert not same(state(model), before)
    assert [module.training for module in model] == [True, True, True, False]
    assert model[2].momentum == 0.2
    assert torch.equal(torch.get_rng_state(), random)


def test_a_batch_norm_that_is_not_reached_keeps_its_statistics() -> None:
    model = nn.ModuleList([nn.BatchNorm1d(2), nn.BatchNorm1d(2)])
    model[1].running_mean.fill_(7.0)
    recalibrate_bn_(model, [torch.randn(4, 2)], forward=lambda m, x: m[0](x))
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
    for compensate in BOTH:
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

    def forward(module: nn.Module, batch: Tensor) -> None:
        calls.append(torch.rand(1))
        module(batch)
        if len(calls) == 4:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        compensate(model, graph, plan, [x] * 4, forward=forward)
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
        compensate(model, graph, plan, [x], forward=lambda m, batch: m.first(batch))
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
