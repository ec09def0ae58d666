"""Costs: the papers' printed figures, hand-computed operators, and models left as they were."""

from __future__ import annotations

import contextlib
import io
import statistics
import time

import pytest
import torch
import torch.nn.functional as F
import torchvision
from ptflops import get_model_complexity_info
from torch import nn

from lightning_prune import models
from lightning_prune.errors import PruningError, TraceError
from lightning_prune.measure import (
    compare_latency,
    count_flops,
    count_params,
    flops_by_convention,
    measure,
    measure_latency,
    measure_memory,
    state_size,
    thread_count,
)


class Call(nn.Module):
    """A function as a model."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(*args, **kwargs)


def cifar(name, **options):
    with torch.device("meta"):
        return getattr(models, name)(**options), torch.zeros(1, 3, 32, 32)


@pytest.mark.parametrize(
    ("name", "classes", "flops", "params"),
    [
        ("resnet18", 1000, 282_712_016, 11_681_832),
        ("resnet34", 1000, 585_316_304, 21_789_992),
        ("resnet50", 1000, 661_002_192, 25_549_352),
        ("resnet101", 1000, 1_269_585_872, 44_541_480),
        ("resnet18", 10, 281_696_276, 11_173_962),
        ("resnet34", 10, 584_300_564, 21_282_122),
        ("resnet50", 10, 656_945_172, 23_520_842),
        ("resnet101", 10, 1_265_528_852, 42_512_970),
    ],
)
def test_resnets_as_printed_by_lee_et_al(name, classes, flops, params):
    model, x = cifar(name, num_classes=classes)
    assert count_flops(model, x, "paper") == flops
    assert count_params(model) == params


@pytest.mark.parametrize(
    ("name", "flops", "params"),
    [("fcn_resnet50", 260_935_675_200, 35_322_218), ("fcn_resnet101", 397_867_003_200, 54_314_346)],
)
def test_segmentation_networks_as_printed_by_lee_et_al(name, flops, params):
    with torch.device("meta"):
        build = getattr(torchvision.models.segmentation, name)
        model = build(weights=None, weights_backbone=None, aux_loss=True, num_classes=21)
        x = torch.zeros(1, 3, 480, 480)
    assert count_flops(model, x, "paper") == flops
    assert count_params(model) == params


def test_networks_of_li_et_al():
    assert count_flops(*cifar("vgg16_bn")) / 1e6 == pytest.approx(313.2, abs=0.05)
    assert count_flops(*cifar("resnet18", max_pool=False)) / 1e6 == pytest.approx(555.4, abs=0.05)


def test_flops2_of_resnet50():
    """The criteria's 655.66 M contain the 1000 biases of the head."""
    flops = count_flops(*cifar("resnet50", num_classes=1000), "flops2")
    assert (flops + 2 * 1000) / 1e6 == pytest.approx(655.66, abs=0.005)


def test_a_meta_model_counts_as_a_real_one():
    x = torch.zeros(1, 3, 32, 32)
    assert flops_by_convention(models.resnet18(), x) == flops_by_convention(*cifar("resnet18"))


def ptflops(model, shape):
    with contextlib.redirect_stdout(io.StringIO()):
        count, _ = get_model_complexity_info(model, shape, as_strings=False, print_per_layer_stat=False, verbose=False)
    return count


def test_resnet18_against_ptflops_itself():
    assert count_flops(models.resnet18(), torch.zeros(1, 3, 32, 32), "ptflops") == ptflops(
        models.resnet18(), (3, 32, 32)
    )


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(4, 6, 3, padding="same"), (4, 12)),
        (nn.Conv2d(4, 6, 3, groups=2), (4, 8, 8)),
        (nn.Conv3d(4, 6, 3, bias=False), (4, 5, 5, 5)),
        (nn.Linear(12, 3), (12,)),
        *((layer, (4, 8, 8)) for layer in (nn.ReLU(True), nn.PReLU(), nn.ELU(), nn.LeakyReLU(), nn.ReLU6(), nn.GELU())),
        *((layer, (4, 8, 8)) for layer in (nn.SiLU(), nn.Sigmoid(), nn.Softmax(1), nn.Dropout())),
        *((layer, (4, 8)) for layer in (nn.MaxPool1d(2), nn.AvgPool1d(2), nn.AdaptiveAvgPool1d(1))),
        *((layer, (4, 8, 8)) for layer in (nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveMaxPool2d(3))),
        *((layer, (4, 8, 8)) for layer in (nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d(3))),
        *((layer, (4, 4, 4, 4)) for layer in (nn.MaxPool3d(2), nn.AvgPool3d(2), nn.AdaptiveMaxPool3d(1))),
        *((layer, (4, 8, 8)) for layer in (nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False))),
        *((layer, (4, 8, 8)) for layer in (nn.InstanceNorm2d(4), nn.InstanceNorm2d(4, affine=True))),
        *((layer, (4, 8, 8)) for layer in (nn.GroupNorm(2, 4), nn.GroupNorm(2, 4, affine=False))),
    ],
    ids=str,
)
def test_layers_against_ptflops_itself(layer, shape):
    assert count_flops(layer, torch.zeros(1, *shape), "ptflops") == ptflops(nn.Sequential(layer), shape)


X, W = torch.zeros(1, 4, 6, 6), torch.zeros(8, 4, 3, 3)


@pytest.mark.parametrize(
    ("function", "x", "macs", "others"),
    [
        (lambda x: F.conv2d(x, W), X, 3 * 3 * 4 * 8 * 4 * 4, 0),
        (lambda x: F.conv2d(x, W, torch.zeros(8), padding=1), X, 3 * 3 * 4 * 8 * 6 * 6, 8 * 6 * 6),
        (lambda x: F.conv2d(x, torch.zeros(8, 2, 3, 3), stride=2, groups=2), X, 3 * 3 * 2 * 8 * 2 * 2, 0),
        (lambda x: F.conv2d(x, torch.zeros(4, 1, 3, 3), groups=4), X, 3 * 3 * 4 * 4 * 4, 0),
        # every input position times the whole kernel
        (lambda x: F.conv_transpose2d(x, torch.zeros(4, 5, 2, 2), stride=2), X, 4 * 6 * 6 * 5 * 2 * 2, 0),
        (lambda x: F.conv_transpose2d(x, torch.zeros(4, 5, 2, 2), stride=2, groups=2), X, 4 * 6 * 6 * 5 * 2 * 2, 0),
        (lambda x: F.linear(x, torch.zeros(5, 6)), X, 4 * 6 * 6 * 5, 0),
        (lambda x: F.linear(x, torch.zeros(5, 6), torch.zeros(5)), X, 4 * 6 * 6 * 5, 4 * 6 * 5),
        (lambda x: x @ torch.zeros(6, 3), X, 4 * 6 * 6 * 3, 0),
        (lambda x: torch.matmul(x, x.transpose(2, 3)), X, 4 * 6 * 6 * 6, 0),
        (lambda x: x[0, 0] @ torch.zeros(6), X, 6 * 6, 0),
        (lambda x: x[0, 0, 0] @ torch.zeros(6), X, 6, 0),
        (lambda x: torch.addmv(torch.zeros(6), x[0, 0], torch.zeros(6)), X, 6 * 6, 6),
        (lambda x: torch.einsum("nchw,cd->ndhw", x, torch.zeros(4, 7)), X, 4 * 7 * 6 * 6, 0),
        # queries times keys, then weights times values: 4 heads of 6 positions, 6 features
        (lambda x: F.scaled_dot_product_attention(x, x, x), X, 2 * 4 * 6 * 6 * 6, 0),
        (lambda x: F.relu(x) + x.relu_(), X, 0, 2 * 4 * 6 * 6),
        (lambda x: F.interpolate(torch.cat([x, x + 1], 1), scale_factor=2), X, 0, 0),
        (lambda x: F.max_pool2d(x, 3, 1, 1), X, 0, 4 * 6 * 6),
        (lambda x: F.adaptive_avg_pool2d(x, 1), X, 0, 4 * 6 * 6),
        (lambda x: x - x.mean(-1, keepdim=True), torch.zeros(1, 4, 6), 0, 0),  # a hand-written norm, no pooling
    ],
)
def test_functional_calls(function, x, macs, others):
    counts = flops_by_convention(Call(function), x)
    assert counts == {
        "macs": macs,
        "flops2": 2 * macs,
        "ptflops": macs + others,
        "paper": 2 * (macs + others),
    }
    assert {name: count_flops(Call(function), x, name) for name in counts} == counts


@pytest.mark.parametrize(("layer", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
@pytest.mark.parametrize("directions", [1, 2])
def test_recurrent_layers(layer, gates, directions):
    """Torch runs an LSTM on the CPU as one fused operator, the others as matrix products."""
    model = layer(5, 7, bidirectional=directions == 2, batch_first=True)
    counts = flops_by_convention(model, torch.zeros(2, 3, 5))
    assert counts["macs"] == 3 * directions * gates * 7 * (5 + 7)
    assert counts["ptflops"] - counts["macs"] == 3 * directions * gates * 7 * 2  # two biases


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: (x,),
        lambda x: {"x": x},
        lambda x: list(x),  # images of a detection model
        lambda x: (list(x),),
        lambda x: {"x": list(x)},
    ],
)
@pytest.mark.parametrize("size", [1, 2])
def test_figures_are_per_sample(wrap, size):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2)).eval()
    model = Call(lambda x: net(torch.stack(x) if isinstance(x, list) else x))
    counts = flops_by_convention(model, wrap(torch.zeros(size, 3, 4, 4)))
    assert counts["macs"] == 27 * 8 * 4 + 64
    assert counts["ptflops"] == counts["macs"] + 32 + 2 * 32 + 32 + 2


def test_unknown_convention():
    with pytest.raises(PruningError, match=r"macs, flops2, ptflops, paper, got 'mac'"):
        count_flops(nn.Linear(2, 2), torch.zeros(1, 2), "mac")


@pytest.mark.parametrize("function", [count_flops, lambda *of: measure(*of).macs, measure_latency, measure_memory])
def test_inputs_that_do_not_run(function):
    model = nn.Linear(2, 2)
    with pytest.raises(TraceError, match=r"does not run on the example inputs: RuntimeError.*shapes"):
        function(model, torch.zeros(1, 3))
    assert model.training


def test_frozen_parameters_are_counted_apart():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).requires_grad_(True)
    model[0].requires_grad_(False)
    assert count_params(model) == 10
    assert count_params(model, trainable=False) == 26
    model[1].weight = nn.Parameter(model[1].weight.detach())
    model.append(nn.Linear(4, 2, bias=False))
    model[2].weight = model[1].weight
    assert count_params(model) == 10


class Noisy(nn.Module):
    """Draws numbers, counts its calls in a buffer and keeps what it computed."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout()
        self.register_buffer("calls", torch.zeros(()))
        self.cached = None

    def forward(self, x):
        self.calls += 1
        if self.cached is None:
            self.cached = torch.arange(4.0).view(1, 4, 1, 1)
        return self.drop(self.norm(self.conv(x + torch.rand_like(x)))) * self.cached


@pytest.mark.parametrize("function", [count_flops, measure, measure_latency, measure_memory, state_size])
def test_no_trace_is_left(function):
    model = Noisy()
    model.norm.eval()
    seen = []
    model.conv.register_forward_hook(lambda *args: seen.append(torch.is_grad_enabled()))
    x = torch.randn(2, 3, 5, 5)
    model(x).sum().backward()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    pixels, random, threads = x.clone(), torch.get_rng_state(), torch.get_num_threads()
    model.cached = None

    function(model) if function is state_size else function(model, x)

    assert {name: module.training for name, module in model.named_modules()} == {
        "": True,
        "conv": True,
        "norm": False,
        "drop": True,
    }
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, grads[name]) and p.requires_grad for name, p in model.named_parameters())
    assert len(model.conv._forward_hooks) == 1
    assert not any(seen[1:])
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(x, pixels)
    assert torch.get_num_threads() == threads
    assert torch.is_grad_enabled()
    model(x).sum().backward()  # what the model cached can be trained with


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only when `advance` is called."""

    class Clock:
        now = 0.0

        def advance(self, seconds):
            self.now += seconds

    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    return clock


def test_models_are_timed_in_turns_after_warming_up(clock):
    calls = []

    def model(name, durations):
        remaining = iter(durations)

        def run(x):
            calls.append((name, module.training, torch.is_grad_enabled()))
            clock.advance(next(remaining))
            return x

        module = Call(run)
        return module, torch.zeros(1)

    latencies = compare_latency(
        {
            # the first four passes of a turn bring the weights back into the caches
            "slow": model("slow", [9, 9, *[7] * 4, 0.004, 0.008, 0.006, 0.001, *[7] * 4, 0.005]),
            "fast": model("fast", [5, 5, *[7] * 4, *[1] * 4, *[7] * 4, 1]),
        },
        warmup=2,
        repeats=5,
    )
    slow, fast = ("slow", False, False), ("fast", False, False)
    assert calls == [slow, fast] * 2 + [slow] * 8 + [fast] * 8 + [slow] * 5 + [fast] * 5
    assert latencies["slow"].samples == pytest.approx((4, 8, 6, 1, 5))
    assert latencies["slow"].median == pytest.approx(5)
    # quartiles of 1 4 5 6 8
    assert latencies["slow"].iqr == pytest.approx(2)
    assert latencies["fast"].median == pytest.approx(1000)
    assert latencies["fast"].iqr == pytest.approx(0)


def test_one_repeat_has_no_spread(clock):
    latency = measure_latency(Call(lambda x: clock.advance(0.25)), torch.zeros(1), warmup=0, repeats=1)
    assert (latency.median, latency.iqr, latency.samples) == (250, 0, (250,))


@pytest.mark.parametrize("options", [{"repeats": 0}, {"warmup": -1}])
def test_timing_needs_repeats(options):
    with pytest.raises(PruningError, match="repeats at least 1"):
        measure_latency(nn.Identity(), torch.zeros(1), **options)


def test_threads_are_set_while_timing():
    before, seen = torch.get_num_threads(), []
    threads = before + 1
    with thread_count(threads):
        measure_latency(Call(lambda x: seen.append(torch.get_num_threads())), torch.zeros(1), repeats=2)
    assert set(seen) == {threads}
    assert torch.get_num_threads() == before


def test_peak_memory_of_a_chain():
    """Input and first map together: (16 + 128) floats; later two maps at a time, and the input, held by the caller."""
    model = nn.Sequential(
        nn.Conv2d(1, 8, 1, bias=False), nn.Conv2d(8, 4, 1, bias=False), nn.Conv2d(4, 1, 1, bias=False)
    )
    x = torch.zeros(1, 1, 4, 4)
    assert measure_memory(model, x) == 4 * (16 + 128 + 64)
    assert measure_memory(model, torch.cat([x, x])) == 2 * 4 * (16 + 128 + 64)
    assert measure_memory(model[:1], x) == 4 * (16 + 128)


def test_peak_memory_counts_shared_storage_once_and_inplace_not_at_all():
    x = torch.zeros(1, 100)
    assert measure_memory(Call(lambda x: x.view(10, 10).t()[2:]), x) == 400
    assert measure_memory(nn.Sequential(nn.Tanh(), nn.ReLU(inplace=True)), x) == 800
    assert measure_memory(nn.Sequential(nn.Tanh(), nn.ReLU()), x) == 1200
    assert measure_memory(Call(lambda x: [x + 1, x + 2, x + 3]), x) == 1600


def test_state_size_is_that_of_the_file(tmp_path):
    model = nn.Sequential(nn.Linear(100, 50), nn.BatchNorm1d(50))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    assert state_size(model) == pytest.approx((tmp_path / "model.pt").stat().st_size, rel=0.05)
    more = state_size(nn.Linear(1000, 100)) - state_size(nn.Linear(1000, 50))
    assert more == pytest.approx(4 * 50 * 1001, abs=256)  # entries are padded to 64 bytes


def test_what_takes_passes_of_its_own_is_measured_once_when_it_is_read():
    passes = []
    found = measure(Call(lambda x: passes.append(x) or x + 1), torch.zeros(1), repeats=3)
    assert not passes
    assert found.flops["macs"] == found.macs == 0
    assert [x.device.type for x in passes] == ["meta"]  # where operators are counted without being computed
    first = found.latency
    timed = len(passes)
    assert timed >= 1 + 6 + 3  # counted, warmed up until six passes tell that it is, and timed
    assert found.latency is first
    assert found.peak_memory_bytes == 8
    assert (found.peak_memory_bytes, len(passes)) == (8, timed + 1)
    late = measure(Call(lambda x: x), torch.zeros(1), repeats=0)
    with pytest.raises(PruningError, match="repeats at least 1"):
        _ = late.latency


def test_flops_are_those_of_the_model_as_it_was_measured():
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)), torch.zeros(2, 3, 8, 8)
    expected = flops_by_convention(model, x)
    found, again = measure(model, x), measure(model, x)
    model[0], model[2] = nn.Conv2d(3, 2, 3), nn.Conv2d(2, 4, 1)
    model.register_forward_pre_hook(lambda *_: pytest.fail("it was run"))
    assert (found.flops, found.params) == (expected, 27 * 8 + 8 + 32 + 4)
    assert repr(found) == f"Measurement(params=260, total_params=260, flops={expected})"
    assert found == again
    assert found != measure(nn.Sequential(model[0], model[2]), x)


def test_what_looks_at_values_is_counted_as_it_is_or_refused():
    first, second = nn.Linear(4, 8), nn.Linear(8, 2)
    model = Call(lambda x: second(first(x)) if x.sum() >= 0 else first(x))
    model.layers = nn.ModuleList([first, second])
    found, late, never = (measure(model, x) for x in (torch.ones(1, 4), torch.ones(1, 4), torch.ones(1, 3)))
    assert found.macs == 4 * 8 + 8 * 2
    with pytest.raises(TraceError, match="does not run on the example inputs"):
        _ = never.flops
    first.weight.data, second.weight.data = torch.ones(6, 4), torch.ones(2, 6)
    with pytest.raises(PruningError, match="cut after it was measured"):
        _ = late.flops
    assert found.macs == 4 * 8 + 8 * 2


def test_a_model_that_cannot_be_copied_is_counted_at_once():
    model = Call(lambda x: x @ torch.ones(3, 2))
    model.refuses = type("Refuses", (nn.Module,), {"__deepcopy__": lambda *_: 1 / 0})()
    found = measure(model, torch.ones(1, 3))
    assert "flops" in vars(found)
    assert found.macs == 6


def test_measure_puts_all_together():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    model[0].requires_grad_(False)
    x = torch.zeros(3, 4)
    found = measure(model, x, repeats=3)
    assert (found.params, found.total_params, found.macs) == (18, 58, 48)
    assert found.flops == flops_by_convention(model, x)
    assert found.flops["paper"] == 2 * (48 + 8 + 8 + 2)
    assert len(found.latency.samples) == 3
    assert found.latency.median == statistics.median(found.latency.samples) > 0
    assert found.peak_memory_bytes == measure_memory(model, x)
    assert found.size_bytes == state_size(model)
