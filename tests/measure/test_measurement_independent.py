"""Counts against torch's own counter and torchvision's published figures; measuring in odd places."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_prune.errors import PruningError, TraceError
from lightning_prune.measure import (
    compare_latency,
    count_flops,
    flops_by_convention,
    measure,
    measure_latency,
    measure_memory,
    thread_count,
)

# one of each family: grouped and depthwise convolution, functional pooling and activation, squeeze-and-excitation,
# attention with fused and with written-out products, linear layers on permuted maps
NAMES = [
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "mnasnet1_0",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "resnet50",
    "resnext50_32x4d",
    "shufflenet_v2_x1_0",
    "squeezenet1_1",
    "swin_t",
    "vgg16_bn",
    "vit_b_16",
]


@pytest.mark.parametrize("name", NAMES)
def test_macs_against_torchs_counter_and_torchvisions_figures(name):
    weights = next(iter(torchvision.models.get_model_weights(name)))
    options = {"init_weights": False} if name == "googlenet" else {}
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None, **options).eval()
        x = torch.zeros(1, 3, 224, 224)
    macs = count_flops(model, x)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    assert 2 * macs == counter.get_total_flops()
    if weights.transforms.keywords["crop_size"] == 224:
        assert macs / 1e9 == pytest.approx(weights.meta["_ops"], abs=0.0006)


def blocks() -> nn.Module:
    """Every kind of operator that is composite for autograd."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding="same"),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.ConvTranspose2d(8, 4, 2, stride=2, groups=2),
        nn.PReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(2),
        nn.TransformerEncoderLayer(4, 2, dim_feedforward=8, batch_first=True),
        nn.Linear(4, 5),
        nn.AdaptiveAvgPool1d(1),
    )


@pytest.mark.parametrize("guard", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("function", [flops_by_convention, measure_memory])
def test_the_count_is_the_same_wherever_it_is_taken(guard, function):
    """Lightning validates under inference_mode, where operators arrive whole."""
    model, x = blocks(), torch.randn(2, 3, 8, 8)
    expected = function(model, x)
    with guard():
        assert function(model, x) == expected
    assert function is not flops_by_convention or expected["macs"] > 8 * 27 * 64


def test_what_is_measured_under_inference_mode_can_be_trained_afterwards():
    model, x = blocks(), torch.randn(2, 3, 8, 8)
    with torch.inference_mode():
        measure(model, x, repeats=1)
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model[0].parameters())


class Replacing(nn.Module):
    """Replaces a buffer instead of writing to it, and fails if asked to."""

    def __init__(self, fail=False):
        super().__init__()
        self.fail = fail
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("absent", None)

    def forward(self, x):
        self.calls = self.calls + 1
        torch.rand(1)
        if self.fail:
            raise ValueError("no wonder")
        return x


@pytest.mark.parametrize("function", [count_flops, measure_latency, measure_memory])
@pytest.mark.parametrize("fail", [False, True])
def test_replaced_buffers_come_back(function, fail):
    model = Replacing(fail)
    buffer, random = model.calls, torch.get_rng_state()
    if fail:
        with pytest.raises(TraceError, match="ValueError: no wonder"):
            function(model, torch.zeros(1, 2))
    else:
        function(model, torch.zeros(1, 2))
    assert model.calls is buffer
    assert buffer == 0
    assert model.absent is None
    assert model.training
    assert torch.equal(torch.get_rng_state(), random)


def test_a_model_without_values_cannot_be_timed():
    with torch.device("meta"):
        model, x = nn.Linear(2, 2), torch.zeros(1, 2)
    with pytest.raises(PruningError, match="'dense' is on the meta device"):
        compare_latency({"dense": (model, x)})


@pytest.mark.parametrize("threads", [0, -1])
def test_timing_needs_a_thread(threads):
    before = torch.get_num_threads()
    with pytest.raises(PruningError, match="threads must be at least 1"), thread_count(threads):
        pass
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("fused", [True, False])
def test_fused_attention_is_counted_and_stays_as_it_was_set(fused):
    """In eval mode torch may run a whole encoder layer as one operator."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fused)
    try:
        width, hidden, length = 4, 8, 5
        layer = nn.TransformerEncoderLayer(width, 2, dim_feedforward=hidden, batch_first=True)
        projections = length * (3 * width * width + width * width + 2 * width * hidden)
        assert count_flops(layer, torch.randn(3, length, width)) == projections + 2 * length * length * width
        assert torch.backends.mha.get_fastpath_enabled() is fused
        with pytest.raises(TraceError):
            count_flops(layer, torch.randn(3, length, width + 1))
        assert torch.backends.mha.get_fastpath_enabled() is fused
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@pytest.mark.parametrize("shape", [(2, 6), (2, 3, 6), (2, 3, 4, 6)])
@pytest.mark.parametrize("contiguous", [True, False])
def test_a_bias_counts_whatever_the_layout(shape, contiguous):
    """Torch multiplies a permuted input first and adds the bias afterwards."""
    x = torch.zeros(shape) if contiguous else torch.zeros(shape[::-1]).permute(*range(len(shape))[::-1])
    counts = flops_by_convention(nn.Linear(6, 5), x)
    positions = x[0].numel() // 6
    assert counts["macs"] == positions * 6 * 5
    assert counts["ptflops"] - counts["macs"] == positions * 5


def test_adding_a_vector_to_something_else_is_free():
    class Shift(nn.Module):
        def forward(self, x):
            return x.relu() + torch.zeros(x.shape[-1])

    counts = flops_by_convention(Shift(), torch.zeros(1, 4, 6))
    assert counts["ptflops"] == 4 * 6  # the activation
