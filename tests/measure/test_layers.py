"""Layer by layer: what is counted, what is timed, and what is said about it."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from lightning_prune.errors import PruningError, TraceError
from lightning_prune.measure import (
    Latency,
    LayerTime,
    Machine,
    ModelTime,
    count_flops,
    explain_speed,
    measure_machine,
    time_layers,
    with_samples,
)
from lightning_prune.measure.layer_findings import TIMES, empty_lanes

MACHINE = Machine(flops=100e9, bandwidth=10e9, call=2e-6, product_call=10e-6, threads=1)  # a balance of 10


class Slow(nn.Module):
    """Sleeps, so that its time is known."""

    def forward(self, x):
        time.sleep(0.05)
        return x


class Block(nn.Module):
    """A rectifier that runs twice, an addition between layers, and a layer that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1, bias=False)
        self.relu = nn.ReLU()
        self.slow = Slow()
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        return self.relu(self.slow(self.relu(self.conv(x))) + 1)


def timed(model: nn.Module, inputs=None, **options) -> ModelTime:
    options.setdefault("repeats", 3)
    return time_layers({"": (model, torch.rand(2, 3, 6, 6) if inputs is None else inputs)}, **options)[""]


def test_layers_that_run_are_counted_by_hand() -> None:
    conv, relu, slow = timed(Block()).layers
    assert (conv.name, conv.kind, conv.channels, conv.calls) == ("conv", "Conv2d", (3, 5), 1)
    assert conv.flops == 2 * 2 * 36 * 5 * 3 * 9
    assert conv.bytes == 4 * (2 * 3 * 36 + 5 * 3 * 9 + 2 * 5 * 36)
    assert (relu.name, relu.calls, relu.flops, relu.bytes) == ("relu", 2, 2 * 360, 2 * 2 * 4 * 360)
    assert (slow.name, slow.calls, slow.flops, slow.channels) == ("slow", 1, 0, ())


def test_flops_of_all_layers_are_those_of_the_model() -> None:
    model, images = Block(), torch.rand(1, 3, 6, 6)
    macs, others = count_flops(model, images), count_flops(model, images, "ptflops")
    assert timed(model, images).flops == 2 * macs + (others - macs)


def test_times_go_to_the_layer_that_takes_them() -> None:
    times = timed(Block())
    slow = times.layers[2]
    assert slow.latency.median >= 50
    assert len(slow.latency.samples) == 3
    assert times.share(slow) > 0.5
    assert times.latency.median >= 50


def test_what_no_layer_does_is_between_them() -> None:
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Identity()

        def forward(self, x):
            time.sleep(0.01)
            return self.layer(x)

    times = timed(Functional())
    assert times.outside >= 10
    assert timed(Slow()).layers[0].name == "Slow"  # a model that is one layer


def test_a_layer_within_a_layer_belongs_to_what_contains_no_other() -> None:
    model = nn.Sequential(nn.Sequential(nn.ReLU(), nn.Identity()), nn.ReLU())
    assert [layer.name for layer in timed(model).layers] == ["0.0", "0.1", "1"]


def test_the_model_is_left_as_it_was() -> None:
    model = Block().train()
    timed(model)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(TraceError, match="does not run on the example inputs"):
        timed(model, torch.rand(1, 4, 6, 6))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_pass_at_least_is_timed() -> None:
    with pytest.raises(PruningError, match="repeats at least 1, got 2 and 0"):
        timed(Block(), repeats=0)


def test_layers_elsewhere_than_on_the_cpu_are_refused() -> None:
    with pytest.raises(PruningError, match="on the CPU only, and model '' is on meta"):
        timed(Block().to("meta"))


def test_the_machine_is_measured() -> None:
    machine = measure_machine(repeats=1)
    assert 1e8 < machine.flops < 1e14
    assert 1e8 < machine.bandwidth < 1e13
    assert 0 < machine.call < 1e-2
    assert machine.threads == torch.get_num_threads()


# --- words


def layer(name="conv", ms=1.0, flops=10**8, moved=10**6, channels=(8, 8), iqr=0.0, kind="Conv2d") -> LayerTime:
    return LayerTime(name, kind, channels, 1, flops, moved, Latency(ms, iqr, (ms,)))


def model(*layers: LayerTime, rest: float = 0.0) -> ModelTime:
    whole = sum(each.latency.median for each in layers) + rest
    return ModelTime(layers, Latency(whole, 0.0, (whole,)), Latency(whole, 0.0, (whole,)))


def kinds(after: ModelTime, before: ModelTime | None = None) -> dict[str, str]:
    return {finding.kind: finding.text for finding in explain_speed(after, MACHINE, before)}


def test_a_pass_is_taken_apart_by_medians() -> None:
    a = LayerTime("a", "Conv2d", (8, 8), 1, 300, 100, Latency(2.0, 1.0, (1.0, 2.0, 3.0)))
    b = LayerTime("b", "ReLU", (), 2, 50, 0, Latency(2.0, 0.0, (2.0, 2.0, 2.0)))
    times = ModelTime((a, b), Latency(3.0, 1.5, (2.0, 3.0, 5.0)), Latency(5.0, 1.0, (4.0, 6.0, 5.0)))
    assert times.overhead == 1  # twice, twice and once as long as the pass without timers
    assert (times.outside, times.total) == (1, 5)  # 1, 2 and 0 ms are left over
    assert (times.share(a), times.share(a, b), times.flops) == (0.4, 0.8, 350)
    assert (a.intensity, b.intensity) == (3, 0)


def test_a_layer_is_held_against_three_limits() -> None:
    assert MACHINE.balance == 10
    limits = layer(flops=3 * 10**8, moved=2 * 10**7).limits(MACHINE)
    assert limits == pytest.approx({"compute": 3.0, "memory": 2.0, "call": 0.01})
    assert layer(channels=()).limits(MACHINE)["call"] == pytest.approx(0.002)


def test_the_limit_is_what_asks_for_most() -> None:
    assert layer(flops=10**8, moved=10**6).bound(MACHINE) == "compute"  # 1 ms against 0.1
    assert layer(flops=10**8, moved=10**8).bound(MACHINE) == "memory"  # 1 ms against 10
    assert layer(flops=100, moved=100).bound(MACHINE) == "call"
    assert layer(ms=2.0).reach(MACHINE) == pytest.approx(0.5)


def test_a_lossless_gain_is_compared_with_its_promise() -> None:
    said = kinds(model(layer(ms=1.0, flops=10**8)), model(layer(ms=2.0, flops=4 * 10**8)))
    assert said["speed"] == (
        f"2.00{TIMES} faster with 4.00{TIMES} fewer FLOPs and 1.00{TIMES} fewer bytes: 50 % of what the FLOPs promise"
    )
    assert f"1.25{TIMES} SLOWER" in kinds(model(layer(ms=2.5)), model(layer(ms=2.0, flops=10**9)))["speed"]
    assert "speed" not in kinds(model(layer()))


def test_each_cause_is_found_and_only_then() -> None:
    plain = model(layer())
    assert set(kinds(plain)) == {"timers"}
    assert "conv: bound by memory" in kinds(model(layer(moved=10**8, ms=10)))["memory"]
    assert "100 % of the time in conv" in kinds(model(layer(ms=0.02, flops=1, moved=1)))["call"]
    assert not {"memory", "call"} & set(kinds(model(layer("a", ms=31, moved=10**8), layer("b", flops=1, moved=1))))
    assert "over 3 times as long" in kinds(model(layer(ms=3.1)))["far"]
    assert "far" not in kinds(model(layer(ms=2.9)))
    assert "did not shrink" in kinds(plain, plain)["not shrunk"]
    assert "not shrunk" not in kinds(plain, model(layer(flops=2 * 10**8)))
    assert "50 % of the time between the layers" in kinds(model(layer(), rest=1.0))["outside"]


def test_slower_means_beyond_the_spread() -> None:
    dense = model(layer(ms=1.0, flops=2 * 10**8, iqr=0.2))
    assert "slower" in kinds(model(layer(ms=1.3, iqr=0.2)), dense)
    assert "slower" not in kinds(model(layer(ms=1.1, iqr=0.2)), dense)


def test_empty_lanes() -> None:
    assert empty_lanes(layer(channels=(16, 64))) == 0
    assert empty_lanes(layer(channels=(3, 64))) == 0  # colours
    assert empty_lanes(layer(channels=(12, 8))) == pytest.approx(1 - 12 / 16)
    assert empty_lanes(layer(channels=(12, 4))) == pytest.approx(1 - 12 / 16 * 4 / 8)
    assert empty_lanes(layer(channels=())) == 0
    said = kinds(model(layer(channels=(12, 8)), rest=1.0))["lanes"]
    assert said.startswith("up to 12 % of the time in conv: ")  # a quarter of half of the time
    assert "up to 25 % of the SIMD lanes empty" in said


def test_lanes_are_told_where_pruning_chose_the_channels() -> None:
    dense = model(layer("odd", channels=(64, 45)), layer("even", channels=(64, 64)))
    pruned = model(layer("odd", channels=(32, 45)), layer("even", channels=(64, 33)))
    (found,) = [finding for finding in explain_speed(pruned, MACHINE, dense) if finding.kind == "lanes"]
    assert found.layers == ("even",)
    assert "--round-to 8" in found.text
    assert "round" not in kinds(pruned)["lanes"]


def test_pooling_is_not_blamed_on_its_shape() -> None:
    said = kinds(model(layer("pool", ms=9.0, flops=0, channels=(), kind="MaxPool2d")))
    assert "channels_last" in said["pooling"]
    assert "far" not in said


def test_the_shortfall_is_what_is_later_than_the_flops_promise() -> None:
    pool = {"flops": 0, "channels": (), "kind": "MaxPool2d"}
    dense = model(layer("a", ms=8.0, flops=4 * 10**8), layer("pool", ms=4.0, **pool), rest=2.0)
    pruned = model(layer("a", ms=2.5), layer("pool", ms=2.0, **pool), rest=0.5)
    said = kinds(pruned, dense)["shortfall"]
    assert said == "1.50 of 5.00 ms are more than the FLOPs promise: 1.00 in MaxPool2d, 0.50 in Conv2d"
    assert "shortfall" not in kinds(model(layer("a", ms=2.0)), model(layer("a", ms=8.0, flops=4 * 10**8)))


def test_what_takes_most_comes_first_and_trifles_are_left_out() -> None:
    small = layer("small", ms=0.005, flops=10, channels=(9, 9))
    found = explain_speed(model(layer("big", ms=9.0), small, rest=2.0), MACHINE)
    assert [finding.kind for finding in found] == ["far", "outside", "timers"]
    assert found[0].layers == ("big",)


# --- other numbers of samples


def test_samples_are_repeated_or_left_out_wherever_they_are() -> None:
    images, mask = torch.arange(3)[:, None], torch.ones(5)
    assert with_samples(images, 5).flatten().tolist() == [0, 1, 2, 0, 1]
    assert with_samples(images, 1).flatten().tolist() == [0]
    named = with_samples({"x": images, "mask": mask}, 2)
    assert (named["x"].shape, named["mask"].shape) == ((2, 1), (5,))
    listed, targets = with_samples(([mask, 2 * mask], None), 3)
    assert [part[0].item() for part in listed] == [1, 2, 1]
    assert targets is None
