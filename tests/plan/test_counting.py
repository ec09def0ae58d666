"""How many filters a plan masks."""

from torch import nn

import lightning_prune as lp
from lightning_prune.plan import filters_masked
from lightning_prune.report.tracking import share_removed
from tests.zoo import images


def test_filters_are_counted_where_several_are_one_channel() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.Conv2d(24, 2, 1)
    )
    graph = lp.trace(model.double(), images(2))
    assert graph.group("0").size == 4
    plan = lp.GlobalRatio(0.5, ignore=["3"]).select(graph, lp.score(model, graph, "l1"))
    assert set(plan.groups) == {"0"}
    assert filters_masked(graph, plan) == (8, 40)
    assert share_removed(graph, plan) == 0.2


def test_layers_that_choose_for_themselves_are_counted_each() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x):
            x = self.stem(x)
            return self.head(x + self.block(x))

    model = Residual().double()
    graph = lp.trace(model, images(2))
    plan = lp.LayerRatio(0.5).select(graph, lp.score(model, graph, "random"), coupling="union")
    (group,) = plan.groups.values()
    assert len(group.keep) > 4
    assert filters_masked(graph, plan) == (8, 16)
    assert group.kept_by("stem") == group.layers["stem"]
