"""Weights that are computed from other tensors: pruned exactly where that can be followed, named where not."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.utils.prune as torch_prune
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import lightning_prune as lp
from lightning_prune.errors import PlanError, PruningError, ScoreError
from lightning_prune.graph import trace
from lightning_prune.graph.computed_weights import effective_weight, owner, twins
from lightning_prune.model_state.copying import copied
from tests.helpers import random_plan
from tests.zoo import randomise_

Wrap = Callable[[nn.Module], nn.Module]


def structured(layer: nn.Module) -> nn.Module:
    return torch_prune.ln_structured(layer, "weight", 0.25, n=1, dim=0)


def unstructured(layer: nn.Module) -> nn.Module:
    return torch_prune.l1_unstructured(torch_prune.l1_unstructured(layer, "weight", 0.3), "bias", 0.3)


def twice(layer: nn.Module) -> nn.Module:
    return torch_prune.random_unstructured(structured(layer), "weight", 0.2)


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


def weight_norm(layer: nn.Module) -> nn.Module:
    return parametrizations.weight_norm(layer)


class Scaled(nn.Module):
    """A parametrisation of the user's: every entry times the same number."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def scaled(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Scaled())
    return layer


MASKS = {"structured masks": structured, "masks of weight and bias": unstructured, "two masks": twice}
NORMS = {"old weight norm": old_weight_norm, "weight norm": weight_norm}
ALL: dict[str, Wrap] = {**MASKS, **NORMS, "parametrised": scaled}


def network(wrap: Wrap, *, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Two wrapped convolutions with a batch norm, one depthwise, a plain one, two linear layers."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(wrap(nn.Conv2d(3, 8, 3)), nn.BatchNorm2d(8), nn.ReLU()),
        nn.Sequential(wrap(nn.Conv2d(8, 12, 3)), nn.ReLU(), wrap(nn.Conv2d(12, 12, 3, groups=12)), nn.SiLU()),
        nn.Conv2d(12, 10, 1),
        nn.ReLU(),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), wrap(nn.Linear(10, 16)), nn.Sigmoid(), nn.Linear(16, 4)),
    )
    return model.to(dtype)


def images(count: int = 2, size: int = 12, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def differ(first: nn.Module, second: nn.Module, x: Tensor) -> float:
    """Largest relative difference, in eval mode."""
    with torch.no_grad():
        a, b = first.eval()(x), second.eval()(x)
    return float((a - b).abs().max() / a.abs().max())


def steps(model: nn.Module, count: int = 3) -> None:
    """Training with everything that moves a weight."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    model.train()
    for step in range(count):
        optimizer.zero_grad()
        model(images(4, seed=step)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("name", ALL)
def test_pruned_exactly_on_other_inputs_before_and_after_training(name: str) -> None:
    model = network(ALL[name])
    steps(model)  # leaves weights with an autograd history, which torch does not deep-copy
    result = lp.prune(model, images(), ratio=0.5)
    assert result.lossless.passed
    assert result.lossless.dtype == "float64"
    pruned = {name for name, group in result.plan.groups.items() if group.removed}
    assert {"1.0", "4.2"} <= pruned  # their readers are plain, or multiply entry by entry
    assert ("0.0" in pruned) is (ALL[name] not in NORMS.values())
    assert {layer for group in result.graph.groups for layer in (x.name for x in group.layers)} == {
        *("0.0", "1.0", "1.2", "2", "4.2", "4.4")
    }
    for x in (images(3, 12, 5), images(2, 15, 6)):
        assert differ(result.masked, result.model, x) < 1e-10
    steps(result.masked)
    steps(result.model)
    assert differ(result.masked, result.model, images(3, 13, 7)) < 1e-8  # the same computation


@pytest.mark.parametrize("name", [*ALL])
def test_effective_filters_are_zero_at_every_training_step(name: str) -> None:
    result = lp.prune(network(ALL[name]), images(), ratio=0.5)
    seen = []
    for path, module in result.masked.named_modules():
        if path in ("1.0", "4.2"):
            group = next(g for g in result.graph.groups if any(layer.name == path for layer in g.layers))
            gone = list(result.plan.groups[group.name].removed)

            def look(module: nn.Module, _args: object, output: Tensor, gone: list[int] = gone) -> None:
                seen.append(bool((module.weight[gone] == 0).all()) and bool((output[:, gone] == 0).all()))

            assert gone
            module.register_forward_hook(look)
    for _ in range(4):
        steps(result.masked, 1)
        with torch.no_grad():  # as averaging does, or an optimizer with a mind of its own
            for parameter in result.masked.parameters():
                parameter.add_(0.01)
    assert len(seen) == 8
    assert all(seen)


def test_only_the_scale_of_a_weight_norm_is_masked() -> None:
    model = network(weight_norm)
    result = lp.prune(model, images(), ratio=0.5)
    weights, gone = result.masked[1][0].parametrizations.weight, list(result.plan.groups["1.0"].removed)
    assert not weights.original0[gone].any()
    assert torch.equal(weights.original1, model[1][0].parametrizations.weight.original1)
    assert all(bool(parameter.isfinite().all()) for parameter in result.masked.parameters())
    group = trace(model, images()).group("0.0")
    assert "statistic" in group.reason
    assert "'1.0.parametrizations.weight.0'" in group.reason


def test_what_a_weight_norm_reads_goes_only_with_loss() -> None:
    group = trace(network(weight_norm), images(), statistics=True).group("0.0")
    assert group.prunable
    assert "weight_norm" in group.statistics


def test_a_transposed_convolution_with_weight_norm_loses_inputs() -> None:
    torch.manual_seed(0)
    inner = weight_norm(nn.ConvTranspose2d(8, 6, 3))  # one norm per input channel
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sigmoid(), inner, nn.ReLU(), nn.Conv2d(6, 4, 1)).double()
    result = lp.prune(model, images(), ratio=0.5)
    assert result.model[2].in_channels == 4
    assert result.model[2].out_channels == 6
    assert differ(result.masked, result.model, images(3, 9, 4)) < 1e-10


@pytest.mark.parametrize("wrap", [structured, old_weight_norm])
def test_copies_pickles_and_files_of_the_pruned_model(wrap: Wrap, tmp_path) -> None:
    result = lp.prune(network(wrap), images(), ratio=0.5)
    x = images(3, 11, 8)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(result.model)))
    assert differ(result.model, copied, x) == 0
    lp.save(tmp_path / "small.pt", result.model, result.plan)
    loaded = network(wrap)
    steps(loaded, 1)
    assert lp.load(tmp_path / "small.pt", loaded) == result.plan
    assert loaded[1][0].out_channels == result.model[1][0].out_channels < 12
    assert differ(result.model, loaded, x) == 0


def test_file_of_a_parametrised_model(tmp_path) -> None:
    result = lp.prune(network(weight_norm), images(), ratio=0.5)
    lp.save(tmp_path / "small.pt", result.model, result.plan)
    lp.load(tmp_path / "small.pt", loaded := network(weight_norm))
    assert differ(result.model, loaded, images(3, 11, 8)) == 0
    parametrize.remove_parametrizations(loaded[1][0], "weight")
    assert loaded[1][0].weight.shape == (result.model[1][0].out_channels, 8, 3, 3)
    assert differ(result.model, loaded, images(3, 11, 8)) < 1e-12


def test_a_failed_or_undone_pruning_leaves_the_computed_weight() -> None:
    model = network(structured)
    graph = trace(model, images())
    plan = lp.LayerRatio(0.5).select(graph, lp.score(model, graph, "l1"))
    before, x = model[1][0].weight.detach().clone(), images()
    handle = lp.mask_(model, graph, plan)
    assert not model[1][0].weight[list(plan.groups["1.0"].removed)].any()
    handle.undo()
    assert torch.equal(model[1][0].weight, before)
    model[4][4].register_forward_pre_hook(lambda module, args: None if module.in_features == 16 else 1 / 0)
    with pytest.raises(PruningError):
        lp.reconstruct_(model, graph, plan, example_inputs=torch.zeros(1, 1))
    assert torch.equal(model[1][0].weight, before)
    assert model(x).shape == (2, 4)


@pytest.mark.parametrize("criterion", ["l1", "l2", "fpgm"])
@pytest.mark.parametrize("name", ALL)
def test_weight_criteria_see_what_the_layer_computes_with(name: str, criterion: str) -> None:
    model = network(ALL[name])
    steps(model)
    plain = network(lambda layer: layer)
    with torch.no_grad():
        model.eval()(images())
        for path, module in plain.named_modules():
            for attribute in ("weight", "bias"):
                if getattr(module, attribute, None) is not None:
                    getattr(module, attribute).copy_(getattr(model.get_submodule(path), attribute))
    found = lp.score(model, trace(model, images()), criterion)
    expected = lp.score(plain, trace(plain, images()), criterion)
    assert {"1.0", "4.2"} <= found.keys()
    for group, scores in found.items():
        assert torch.allclose(scores, expected[group])


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def test_gradients_by_weights_count_masks_and_refuse_weight_norm() -> None:
    criterion = lp.criteria.TaylorFO(form="weight")
    model = network(unstructured)
    plain = copied(model)
    for module in plain.modules():
        if torch_prune.is_pruned(module) and not list(module.children()):
            torch_prune.remove(module, "weight")
            torch_prune.remove(module, "bias")
    found, expected = (lp.score(m, trace(m, images()), criterion, [images(4)], loss) for m in (model, plain))
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name]) for name in found)
    normed = network(weight_norm)
    with pytest.raises(ScoreError, match=r"1\.0\.parametrizations\.weight\.original1: .*looks at activations"):
        lp.score(normed, trace(normed, images()), criterion, [images(4)], loss)
    scores = lp.score(normed, trace(normed, images()), "taylor", [images(4)], loss)
    assert all(bool((values > 0).any()) for values in scores.values())


def test_next_layers_behind_masks() -> None:
    model = network(structured)
    graph = trace(model, images())
    assert lp.score(model, graph, lp.criteria.NextLayerTaylor(), [images(4)], loss)["0.0"].any()
    plan = lp.LayerRatio(0.5).select(graph, lp.score(model, graph, "l1"))
    with pytest.raises(lp.errors.CompensationError, match=r"1\.0 \(its weight is computed from other parameters\)"):
        lp.compensation.least_squares_(model, graph, plan, [images(8)])


HELD = {
    "spectral norm": (parametrizations.spectral_norm, r"0, 2 \(spectral norm\).*remove_parametrizations\(module, 'we"),
    "old spectral norm": (nn.utils.spectral_norm, r"0, 2 \(spectral norm\).*remove_spectral_norm\(module, 'weight'\)"),
    "orthogonal": (parametrizations.orthogonal, r"0, 2 \(orthogonal weights\).*remove_parametrizations"),
    "one norm of all": (
        lambda layer: parametrizations.weight_norm(layer, dim=None),
        r"0, 2 \(weight norm\).*remove_parametrizations\(module, 'weight'\) first",
    ),
}


@pytest.mark.parametrize("name", HELD)
def test_other_layers_are_named_with_the_call_that_frees_them(name: str) -> None:
    wrap, way_out = HELD[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = nn.Sequential(
            wrap(nn.Conv2d(3, 8, 3)), nn.ReLU(), wrap(nn.Conv2d(8, 12, 3)), nn.ReLU(), nn.Conv2d(12, 4, 1)
        )
    x = torch.randn(2, 3, 8, 8)
    steps_of = model.train()(x).sum()
    steps_of.backward()
    with pytest.raises(PlanError, match=way_out):
        lp.prune(model, x)
    told = trace(model, x).describe()
    assert any(line.startswith("note: 0, 2 (") for line in told.splitlines())


def test_a_layer_with_spectral_norm_holds_back_its_neighbours_only() -> None:
    torch.manual_seed(0)
    normed = parametrizations.spectral_norm(nn.Conv2d(8, 8, 1))
    layers = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), normed, nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)]
    model = nn.Sequential(*layers).double()
    steps(model)
    result = lp.prune(model, images(), ratio=0.5)
    assert {g.name for g in result.graph.prunable_groups} == {"0", "4"}
    assert any("2 (spectral norm)" in note for note in result.graph.notes)
    assert differ(result.masked, result.model, images(3, 9, 4)) < 1e-10


@pytest.mark.filterwarnings("ignore")
def test_a_model_prepared_for_quantization_is_named() -> None:
    import torch.ao.quantization as quantization

    model = nn.Sequential(
        quantization.QuantStub(), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)
    ).train()
    quantization.fuse_modules_qat(model, [["1", "2", "3"]], inplace=True)
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    quantization.prepare_qat(model, inplace=True)
    x = torch.randn(2, 3, 8, 8)
    model(x)
    with pytest.raises(PlanError, match=r"1 passes a fake quantizer.* 1, 4 \(fake quantization\).*before prepare_qat"):
        lp.prune(model, x)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.norm = nn.LSTM(6, 8, batch_first=True), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.lstm(x)[0])


NOTHING = {
    "recurrent": (Recurrent, torch.randn(2, 5, 6), r"lstm \(LSTM: its hidden size stays\), norm \(LayerNorm: it norm"),
    "embedding": (lambda: nn.Embedding(5, 3), torch.tensor([1, 2]), r"Embedding: its vectors are picked by number"),
    "no parameters": (lambda: nn.Sequential(nn.ReLU()), torch.randn(2, 3), "the model has no parameters"),
    "one channel": (lambda: nn.Sequential(nn.Linear(3, 1)), torch.randn(2, 3), r"0 \(Linear: it makes a single chann"),
    "scale": (lambda: nn.Sequential(nn.PReLU()), torch.randn(2, 3), r"0 \(PReLU: its parameters are no filters\)"),
}


@pytest.mark.parametrize("name", NOTHING)
def test_a_model_without_channels_is_refused_with_its_layers(name: str) -> None:
    build, x, message = NOTHING[name]
    with pytest.raises(PlanError, match=f"nothing to prune in this model: .*{message}"):
        lp.prune(build(), x)


def test_owner_and_effective_weight() -> None:
    assert owner("a.b.parametrizations.weight.original0") == "a.b"
    assert owner("parametrizations.weight.0.inner.scale") == ""
    assert owner("a.weight") == "a"
    layer = weight_norm(nn.Conv2d(2, 3, 1))
    assert torch.equal(effective_weight(layer, "parametrizations.weight.original1"), layer.weight)
    assert effective_weight(layer, "parametrizations.weight.original0").shape == (3, 1, 1, 1)
    assert torch.equal(effective_weight(layer, "bias"), layer.bias)


class OwnUse(nn.Module):
    """Uses its norm's vectors by hand, each in another way: what shares labels must not say more than is so."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x) - self.norm.running_mean[:, None, None]
        return self.head(torch.relu(x * self.norm.weight[:, None, None] + self.norm.bias[:, None, None]))


@pytest.mark.parametrize("shared", [False, True])
def test_vectors_of_one_norm_share_labels_unless_another_module_has_them_too(shared: bool) -> None:
    model = randomise_(OwnUse()).eval()
    if shared:
        model.conv.bias = model.norm.bias
    assert len(twins(model)) == (1 if shared else 2)
    graph = trace(model, images())
    plan = random_plan(graph, 0.5)
    small, masked = lp.reconstruct(model, graph, plan), copy.deepcopy(model)
    assert small.conv.out_channels == len(small.norm.bias) == len(small.norm.running_var) == 4
    lp.mask_(masked, graph, plan)
    assert lp.check_lossless(masked, small, images(3, seed=4)).passed
