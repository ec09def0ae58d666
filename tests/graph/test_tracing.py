"""The channel graph: which channels go together, what is refused, and that tracing leaves no trace."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune.errors import TraceError
from lightning_prune.graph import trace
from tests.zoo import ZOO, build, images


def layers(graph) -> dict[str, list[str]]:
    return {group.name: [layer.name for layer in group.layers] for group in graph.groups if group.prunable}


def test_residual_groups_are_the_layers_that_meet_at_additions() -> None:
    graph = trace(build("Residual"), images())
    assert layers(graph) == {
        "stem.0": ["stem.0", "a2.0"],
        "a1.0": ["a1.0"],
        "b1.0": ["b1.0"],
        "b2.0": ["b2.0", "down.0"],
    }
    assert graph.group("head.fc").reason == "reaches the model's output"


def test_a_group_lists_every_tensor_entry() -> None:
    group = trace(build("Residual"), images()).group("stem.0")
    found = {(part.tensor, part.dim): (part.masked, part.layer) for part in group.slices}
    assert found == {
        **{(f"stem.{n}", 0): (True, "stem.0") for n in ("0.weight", "1.weight", "1.bias")},
        **{(f"a2.{n}", 0): (True, "a2.0") for n in ("0.weight", "1.weight", "1.bias")},
        **{(f"stem.1.running_{n}", 0): (False, "stem.0") for n in ("mean", "var")},
        **{(f"a2.1.running_{n}", 0): (False, "a2.0") for n in ("mean", "var")},
        **{(f"{n}.0.weight", 1): (False, None) for n in ("a1", "b1", "down")},
    }


def test_batch_norm_after_an_addition_belongs_to_the_group() -> None:
    group = trace(build("PreActivation"), images()).group("stem")
    owners = {part.tensor: part.layer for part in group.slices}
    assert owners["bn3.weight"] is None
    assert owners["bn1.weight"] == "stem"
    assert [layer.norm for layer in group.layers] == ["bn1", None]


def test_flatten_repeats_each_channel_over_the_map() -> None:
    group = trace(build("Vgg"), images()).group("features.3.0")
    reader = next(part for part in group.slices if part.tensor == "classifier.0.weight")
    assert reader.index.tolist() == [list(range(4 * c, 4 * c + 4)) for c in range(12)]
    assert group.layers[0].reader == "classifier.0"
    assert torch.equal(group.layers[0].reader_index, reader.index)


def test_concatenation_offsets_the_later_parts() -> None:
    group = trace(build("Branches"), images()).group("b2.0")
    reader = next(part for part in group.slices if part.tensor == "mix.0.weight")
    assert reader.index.flatten().tolist() == list(range(4, 12))


def test_grouped_convolution_ties_positions_over_groups() -> None:
    graph = trace(build("Grouped"), images())
    group = graph.group("b.0")
    assert group.size == 4
    assert group.layers[0].index.tolist() == [[p, p + 4, p + 8] for p in range(4)]
    depthwise = graph.group("stem.0")
    assert [layer.name for layer in depthwise.layers] == ["stem.0", "c.0", "multiply.0"]
    assert depthwise.layers[2].index.tolist() == [[2 * c, 2 * c + 1] for c in range(8)]


def test_gate_and_trunk_go_together_with_the_depthwise_layer() -> None:
    assert layers(trace(build("InvertedResidual"), images()))["expand.0"] == [
        "expand.0",
        "depthwise.0",
        "excite",
    ]


def test_weights_that_read_a_constant_are_masked() -> None:
    group = trace(build("SigmoidConstant"), images()).group("a.0")
    assert {part.tensor: part.masked for part in group.slices}["b.0.weight"]
    plain = trace(build("Plain"), images()).group("a")
    assert not {part.tensor: part.masked for part in plain.slices if part.dim == 1}["b.weight"]


def test_sizes_fixed_in_python_freeze_with_the_reason() -> None:
    padded = trace(build("PaddedShortcut"), images())
    assert padded.group("stem.0").prunable  # the six channels that the padding lies around
    assert (padded.group("b.0").size, padded.group("b.0").reason) == (2, "meets channels of fixed number in aten.add")


def test_train_mode_is_traced_for_auxiliary_heads() -> None:
    group = trace(build("Auxiliary"), images()).group("a.0")
    assert any(part.tensor == "aux.weight" for part in group.slices)


def test_an_operator_without_a_rule_freezes_and_is_named() -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x).renorm(2, 1, 1.0))

    graph = trace(Sorted(), torch.zeros(1, 3, 4, 4))
    assert graph.group("a").reason == "passes an operator without a rule, aten.renorm"
    assert any("aten.renorm" in note for note in graph.notes)


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("training", [True, False])
def test_tracing_leaves_no_trace(name: str, training: bool) -> None:
    model = build(name).train(training)
    next(model.modules()).register_buffer("seen", torch.zeros(3))
    model(images()) if not training else None
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    trace(model, images())
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not nn.modules.module._global_forward_hooks
    assert not nn.modules.module._global_forward_pre_hooks


def test_inputs_that_do_not_run_name_the_module_and_the_cause() -> None:
    with pytest.raises(TraceError, match=r"does not run on the example inputs in module 'stem.0': RuntimeError"):
        trace(build("Residual"), torch.zeros(1, 4, 8, 8, dtype=torch.float64))
    assert not nn.modules.module._global_forward_hooks


@pytest.mark.parametrize("inputs", [images(), (images(),), {"x": images()}])
def test_example_inputs_in_any_form(inputs) -> None:
    assert len(trace(build("Plain"), inputs).prunable_groups) == 2


def test_tracing_works_inside_inference_mode() -> None:
    model = build("Residual")
    with torch.inference_mode():
        graph = trace(model, images())
    assert len(graph.prunable_groups) == 4


def test_a_buffer_that_forward_replaces_is_put_back() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.out = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
            self.register_buffer("calls", torch.zeros(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls = self.calls + 1
            return self.out(self.conv(x))

    model = Counts()
    before = model.calls
    trace(model, torch.zeros(1, 3, 4, 4))
    assert model.calls is before
    assert not model.calls.any()


def test_a_norm_over_a_concatenation_is_no_layers_own() -> None:
    graph = trace(build("Dense"), images())
    assert [group.layers[0].norm for group in graph.prunable_groups] == ["norms.0", None, None, None]


def test_a_weight_of_which_half_is_used_is_cut_in_both_halves() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.read = nn.Parameter(torch.randn(8, 3, 1, 1)), nn.Conv2d(4, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.read(F.conv2d(x, self.weight[: len(self.weight) // 2]))

    group = trace(Half(), torch.zeros(1, 3, 4, 4)).group("weight")
    assert group.prunable
    assert group.layers[0].index.tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_a_model_without_layers_has_no_groups() -> None:
    assert trace(nn.ReLU(), torch.zeros(1, 3)).groups == ()


class Averaged(nn.Module):
    """A network in training, its moving average in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        )
        self.net.append(nn.Conv2d(8, 4, 1))
        self.ema = copy.deepcopy(self.net)

    def forward(self, x):
        return self.net(x) if self.training else self.ema(x)

    def update(self):
        with torch.no_grad():
            for average, parameter in zip(self.ema.parameters(), self.net.parameters(), strict=True):
                average.lerp_(parameter, 0.1)


def test_copies_that_go_together_have_norms_and_readers_of_their_own() -> None:
    graph = trace(Averaged().double(), images(), also=[lambda model: model.update()])
    found = {layer.name: (layer.norm, layer.reader) for group in graph.prunable_groups for layer in group.layers}
    assert found == {f"{of}.{k}": (f"{of}.{k + 1}", f"{of}.{k + 3 - k // 3}") for of in ("net", "ema") for k in (0, 3)}
    owners = {part.tensor: part.layer for group in graph.prunable_groups for part in group.slices if part.layer}
    own = ("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var")
    tensors = [(of, k, *name.split(".")) for of in ("net", "ema") for k in (0, 3) for name in own]
    assert owners == {f"{of}.{k + int(after)}.{name}": f"{of}.{k}" for of, k, after, name in tensors}


def test_a_head_that_vmap_calls() -> None:
    class Mapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Linear(8, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.vmap(lambda one: self.c(self.b(one).relu()))(self.a(x).mean((2, 3)))

    assert [group.name for group in trace(Mapped().double(), images()).prunable_groups] == ["a", "b"]
