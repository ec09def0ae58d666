"""The time of a plan by a table: what the reconstructed model's layers come to, without building it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.errors import PlanError
from lightning_prune.measure.layer_calls import layer_calls
from lightning_prune.measure.time_model import TimeModel
from tests.helpers import random_plan
from tests.selection.tables import Steps
from tests.zoo import ZOO, build, images


def calls_of(model: nn.Module, x: Tensor) -> list[tuple[str, tuple[int, int]]]:
    return sorted((call.weight, call.channels) for call in layer_calls(model, x))


@pytest.mark.parametrize("name", ZOO)
def test_widths_are_those_of_the_reconstructed_model(name: str) -> None:
    model, x = build(name), images()
    graph = lp.trace(model, x)
    times = TimeModel(model, graph, x, Steps())
    for ratio in (0.3, 0.6):
        plan = random_plan(graph, ratio)
        kept = {group: len(planned.keep) for group, planned in plan.groups.items()}
        widths = [(layer.weight, (layer.into.of(kept), layer.out.of(kept))) for layer in times.layers]
        every = [pair for pair, layer in zip(widths, times.layers, strict=True) for _ in range(layer.uses)]
        assert sorted(every) == calls_of(lp.reconstruct(model, graph, plan), x)


@pytest.mark.parametrize("name", [name for name in ZOO if "Group" not in name])
def test_time_is_the_sum_over_the_layers_of_the_reconstructed_model(name: str) -> None:
    model, x, table = build(name), images(), Steps(lane=4)
    graph = lp.trace(model, x)
    times, plan = TimeModel(model, graph, x, table), random_plan(graph)
    small = lp.reconstruct(model, graph, plan)
    for milliseconds, of in ((times.dense, model), (times.of(plan), small)):
        summed = sum(float(table.time(call.kind, *call.channels)) for call in layer_calls(of, x))
        assert milliseconds == pytest.approx(summed)


def test_a_convolution_that_loses_whole_groups_takes_their_share_of_its_time() -> None:
    model = nn.Sequential(nn.Conv2d(3, 12, 1), nn.Conv2d(12, 24, 3, groups=4), nn.Conv2d(24, 5, 1)).double()
    x = torch.zeros(2, 3, 8, 8).double()
    graph = lp.trace(model, x)
    times = TimeModel(model, graph, x, Steps(lane=1))
    grouped = times.layers[1]
    assert grouped.whole_groups
    (group,) = grouped.out.parts
    assert graph.group(group).size == 4
    assert float(grouped.at({group: 1})) == pytest.approx(float(grouped.at({})) / 4)
    assert (grouped.into.of({group: 1}), grouped.out.of({group: 1})) == (3, 6)


def test_a_weight_that_is_used_twice_takes_twice_the_time() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.b(self.a(x))))

    model, x = Twice().double(), images()
    times = TimeModel(model, lp.trace(model, x), x, Steps())
    assert [(layer.weight, layer.uses) for layer in times.layers] == [("a.weight", 1), ("b.weight", 2), ("c.weight", 1)]
    assert float(times.layers[1].at({})) == 2 * float(Steps().time(times.layers[1].kind, 8, 8))


def test_another_model_s_graph_and_layers_without_times_are_refused() -> None:
    class Nothing(Steps):
        def time(self, kind, channels_in, channels_out):
            raise PlanError("unknown")

    model, x = build("Vgg"), images()
    graph = lp.trace(model, x)
    with pytest.raises(PlanError, match="traced on another model"):
        TimeModel(build("Residual"), graph, x, Steps())
    with pytest.raises(PlanError, match=r"no times of features.0.0.weight, .*, as this model runs them .* make one"):
        TimeModel(model, graph, x, Nothing())
