"""Which layers a forward pass runs, and what belongs to each."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from lightning_prune.errors import PruningError
from lightning_prune.measure import LayerCall, LayerKind, layer_calls
from lightning_prune.measure.counting import count_flops
from lightning_prune.measure.layer_calls import macs

IMAGE = torch.zeros(2, 3, 8, 8)
PLAIN = LayerKind("conv", (3, 3), (1, 1), (1, 1), (1, 1), 1, (8, 8), 2)


def conv(into: int = 3, out: int = 4, **options) -> nn.Conv2d:
    return nn.Conv2d(into, out, 3, padding=1, **options)


def follows(*modules: nn.Module) -> tuple[bool, str | None]:
    """Norm and activation of the first layer."""
    kind = layer_calls(nn.Sequential(*modules), IMAGE)[0].kind
    return kind.norm, kind.activation


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        ([nn.BatchNorm2d(4), nn.ReLU()], (True, "relu")),
        ([nn.BatchNorm2d(4), nn.ReLU(inplace=True)], (True, "relu")),
        ([nn.ReLU6()], (False, "hardtanh")),
        ([nn.SiLU()], (False, "silu")),
        ([nn.GELU()], (False, "gelu")),
        ([nn.Mish()], (False, "mish")),
        ([nn.PReLU(4)], (False, "prelu")),
        ([nn.Hardswish()], (False, "hardswish")),
        ([nn.BatchNorm2d(4)], (True, None)),
        ([nn.MaxPool2d(2), nn.ReLU()], (False, None)),
        ([nn.ReLU(), nn.BatchNorm2d(4)], (False, "relu")),
        ([nn.GroupNorm(2, 4), nn.ReLU()], (False, None)),
    ],
)
def test_what_follows_a_convolution(modules, expected) -> None:
    assert follows(conv(), *modules) == expected


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = conv(3, 4), conv(4, 4)
        self.weight = nn.Parameter(torch.zeros(5, 4, 1, 1))
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        x = self.one(x)
        y = torch.relu(self.two(x) + x)
        return self.head(F.conv2d(y, self.weight).mean((2, 3)))


def test_functional_calls_and_additions_between() -> None:
    calls = layer_calls(Residual(), IMAGE)
    assert calls[:2] == [LayerCall("one.weight", PLAIN, (3, 4)), LayerCall("two.weight", PLAIN, (4, 4))]
    assert [(call.weight, call.channels) for call in calls[2:]] == [("weight", (4, 5)), ("head.weight", (5, 2))]
    assert calls[3].kind == LayerKind("linear", size=(2,))


class Slopes(nn.Module):
    """The slopes of an activation come out of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.slopes = nn.Linear(8, 3)

    def forward(self, x):
        return F.prelu(x, self.slopes(x[0, 0, 0]))


def test_an_activation_belongs_to_the_layer_that_it_is_of() -> None:
    assert layer_calls(Slopes(), IMAGE)[0].kind.activation is None


def test_a_weight_used_twice_is_called_twice() -> None:
    layer = conv(3, 3)
    calls = layer_calls(nn.Sequential(layer, nn.ReLU(), layer), IMAGE)
    assert [(call.weight, call.kind.activation) for call in calls] == [("0.weight", "relu"), ("0.weight", None)]


def test_depthwise_grouped_and_transposed() -> None:
    kinds = [
        layer_calls(layer, torch.zeros(1, 8, 6, 6))[0]
        for layer in (
            nn.Conv2d(8, 8, 3, groups=8),
            nn.Conv2d(8, 4, 3, groups=2),
            nn.ConvTranspose2d(8, 6, 3, 2, 1, output_padding=1, groups=2),
        )
    ]
    assert [call.kind.groups for call in kinds] == [0, 2, 2]
    assert [call.channels for call in kinds] == [(8, 8), (8, 4), (8, 6)]
    assert kinds[2].kind == LayerKind("conv_transpose", (3, 3), (2, 2), (1, 1, 1, 1), (1, 1), 2, (6, 6), 1)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_on_tokens(bias) -> None:
    net = nn.Sequential(nn.Linear(4, 6, bias=bias), nn.GELU(), nn.Linear(6, 5, bias=bias))
    first, second = layer_calls(net, torch.zeros(2, 7, 4))
    assert (first.channels, first.kind) == ((4, 6), LayerKind("linear", size=(14,), activation="gelu"))
    assert (second.channels, second.kind) == ((6, 5), LayerKind("linear", size=(14,)))
    assert layer_calls(net, torch.zeros(4))[0] == LayerCall(
        "0.weight", LayerKind("linear", size=(1,), activation="gelu"), (4, 6)
    )


def test_products_of_activations_are_no_layers() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    calls = layer_calls(attention, (torch.zeros(1, 5, 8), torch.zeros(1, 5, 8), torch.zeros(1, 5, 8)))
    assert {call.weight for call in calls} == {"in_proj_weight", "out_proj.weight"}


@pytest.mark.parametrize(
    "layer",
    [
        parametrizations.weight_norm(conv()),
        prune.l1_unstructured(conv(), "weight", 0.5),
        nn.Sequential(nn.Flatten(), parametrizations.weight_norm(nn.Linear(192, 3))),
    ],
)
def test_a_computed_weight_is_refused(layer) -> None:
    with pytest.raises(PruningError, match="is computed at every call"):
        layer_calls(layer, IMAGE)


class LooksAtValues(nn.Sequential):
    def forward(self, x):
        return super().forward(x if x.sum() > 1 else x + 1)


def test_code_that_looks_at_values_is_run_for_real_and_the_model_is_left_as_it_was() -> None:
    net = LooksAtValues(conv(), nn.BatchNorm2d(4)).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert layer_calls(net, IMAGE)[0].kind.norm
    assert net.training
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


@pytest.mark.parametrize(
    "net",
    [
        conv(),
        nn.Conv2d(3, 6, 3, 2, groups=3),
        nn.Conv2d(3, 3, 3, groups=3, dilation=2),
        nn.ConvTranspose2d(3, 5, 4, 2),
        nn.Sequential(nn.Flatten(), nn.Linear(192, 7)),
    ],
)
def test_multiply_accumulates_are_those_that_are_counted(net) -> None:
    (call,) = layer_calls(net, IMAGE)
    assert macs(call.kind, call.channels) == 2 * count_flops(net, IMAGE)
