"""A graph in words: numbers agree with what reconstruction removes, long lists stay short, nothing is left out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.graph import trace
from lightning_prune.graph.describe import describe, parameters, percent, shortened, totals
from lightning_prune.graph.groups import Group, Layer
from lightning_prune.plan import GroupPlan, Plan
from lightning_prune.reconstruction.small_model import reconstruct
from tests.zoo import build, images


def identity(size: int) -> Tensor:
    return torch.arange(size).unsqueeze(1)


def group(*names: str, size: int = 8, reason: str | None = None) -> Group:
    layers = tuple(Layer(name, f"{name}.weight", 0, size, identity(size)) for name in names)
    return Group(names[0], size, layers, (), reason)


def test_the_table_of_a_residual_network() -> None:
    expected = """\
group    layers  channels  parameters  per channel  prunable
-------  ------  --------  ----------  -----------  --------
stem.0        2         8       2,360          295  yes, together with a2.0
a1.0          1         8       1,168          146  yes
b1.0          1        12       2,184          182  yes
b2.0          2        12       1,500          125  yes, together with down.0
head.fc       1         5          65           13  no: reaches the model's output

40 of 45 channels (89 %) can be pruned: 4 of 5 groups, 6 of 7 layers."""
    assert trace(build("Residual"), images()).describe() == expected


@pytest.mark.parametrize("name", ["Residual", "PreActivation", "Dense", "InvertedResidual", "Grouped", "Vgg", "Shared"])
def test_parameters_per_channel_are_those_that_reconstruction_removes(name: str) -> None:
    model = build(name)
    graph = trace(model, images())
    dense = sum(p.numel() for p in model.parameters())
    for one in graph.prunable_groups:
        kept = tuple(range(1, one.size))
        plan = Plan({one.name: GroupPlan(one.size, kept, {layer.name: kept for layer in one.layers})})
        small = sum(p.numel() for p in reconstruct(model, graph, plan).parameters())
        assert parameters(one, graph.shapes)[1] == dense - small, one.name


def test_a_weight_that_makes_and_reads_the_same_channels_counts_once() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.step = nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 8, 1, bias=False)
            self.out = nn.Conv2d(8, 2, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.out(x + self.step(x))

    graph = trace(Loop(), torch.zeros(1, 3, 4, 4))
    assert [layer.name for layer in graph.group("stem").layers] == ["stem", "step"]
    # 3 of the stem, row and column of the 8x8 step which cross once, 2 of the output
    assert parameters(graph.group("stem"), graph.shapes) == (24 + 64 + 16, 3 + 15 + 2)


def test_running_statistics_are_no_parameters() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1, bias=False))
    graph = trace(model, torch.zeros(1, 3, 4, 4))
    assert parameters(graph.group("0"), graph.shapes) == (sum(p.numel() for p in model.parameters()), 3 + 2 + 2)


def test_long_lists_are_cut_and_their_number_told() -> None:
    names = [f"encoder.layers.{n}.mlp" for n in range(30)]
    text = describe([group(*names)], {})
    row = text.splitlines()[2]
    assert row.endswith("encoder.layers.1.mlp, encoder.layers.2.mlp … (29)")
    assert len(row) < 140
    assert shortened(["one"], 2) == "one"


def test_a_refused_group_says_why_and_with_whom() -> None:
    text = describe([group("a", "b", reason="meets a statistic")], {}, ["no rule for aten.foo"])
    assert "no: meets a statistic; together with b" in text
    assert text.endswith(
        "0 of 8 channels (0 %) can be pruned: 0 of 1 groups, 0 of 2 layers.\nnote: no rule for aten.foo"
    )


def test_columns_are_aligned_and_nothing_trails() -> None:
    lines = trace(build("InvertedResidual"), images()).describe().splitlines()
    table = lines[: lines.index("")]
    assert len({line.index(word) for line, word in zip(table[2:], ["yes"] * 3, strict=False)}) == 1
    assert all(line == line.rstrip() for line in lines)


def test_a_layer_in_two_groups_counts_once() -> None:
    halves = tuple(
        Group(f"conv[{n}:{n + 4}]", 4, (Layer("conv", "conv.weight", 0, 8, identity(4) + n),), ()) for n in (0, 4)
    )
    assert totals(halves).endswith("2 of 2 groups, 1 of 1 layers.")


def test_a_graph_without_groups_is_told_in_one_sentence() -> None:
    assert describe([], {}, ["a note"]).splitlines() == [
        "There are no channels to prune: no convolution or linear layer was seen.",
        "note: a note",
    ]


@pytest.mark.parametrize(("part", "shown"), [(0, "0 %"), (1, "1 %"), (500, "50 %"), (999, "99 %"), (1000, "100 %")])
def test_all_and_nothing_are_said_only_where_true(part: int, shown: str) -> None:
    assert percent(part, 1000) == shown


class Written(nn.Module):
    """Several weights of one module's own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Parameter(torch.randn(8, 3, 3, 3)), nn.Conv2d(8, 2, 1)
        self.more = nn.ParameterList(torch.randn(8, 8, 3, 3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.conv2d(x, self.first).relu()
        for weight in self.more:
            x = torch.conv2d(x, weight).relu()
        return self.out(x)


def test_weights_of_one_module_have_names_of_their_own() -> None:
    graph = trace(nn.Sequential(Written()).double(), images())
    assert [one.name for one in graph.groups] == ["0", "0.more.0", "0.more.1", "0.out"]
    assert all(graph.group(one.name) is one for one in graph.groups)
