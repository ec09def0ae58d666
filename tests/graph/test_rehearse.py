"""Sizes in the model's own code: met by ties and repairs where they can be, respected where not, tried out always."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.graph import ChannelGraph, trace
from lightning_prune.reconstruction.checkpoint import load, save
from lightning_prune.reconstruction.lossless import check_lossless
from lightning_prune.reconstruction.masks import mask_
from lightning_prune.reconstruction.small_model import reconstruct, reconstruct_
from tests.helpers import random_plan
from tests.zoo import Head, conv_bn, images, randomise_


class Net(nn.Module):
    """Stem, the module under test, head."""

    def __init__(self, middle: nn.Module, channels: int = 8) -> None:
        super().__init__()
        self.stem, self.middle, self.head = conv_bn(3, 8), middle, Head(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(F.relu(self.stem(x))))


def net(middle: nn.Module, channels: int = 8) -> nn.Module:
    return randomise_(Net(middle, channels)).eval()


def smaller(model: nn.Module, ratio: float = 0.5) -> tuple[ChannelGraph, nn.Module]:
    """Graph and reconstructed model, compared with the masked one."""
    graph = trace(model, images())
    plan = random_plan(graph, ratio)
    small, masked = reconstruct(model, graph, plan), copy.deepcopy(model)
    mask_(masked, graph, plan)
    for x in (images(), images(3, seed=4)):
        assert check_lossless(masked, small, x).passed
    return graph, small


class Scales(nn.Module):
    """Res2Net: split by an attribute, every part after the first convolved and added to the next."""

    def __init__(self, width: int = 2) -> None:
        super().__init__()
        self.width = width
        self.convs = nn.ModuleList(conv_bn(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        first, *parts = x.split(self.width, 1)
        out = [first]
        for conv, part in zip(self.convs, parts, strict=True):
            out.append(F.relu(conv(part + out[-1] if len(out) > 1 else part)))
        return torch.cat(out, 1)


def test_the_width_of_equal_parts_follows() -> None:
    _, small = smaller(net(Scales()))
    assert small.middle.width == 1
    assert small.middle.convs[0][0].weight.shape[:2] == (1, 1)


class Uneven(nn.Module):
    """FasterNet: a part is convolved, the rest is passed on; both sizes are attributes."""

    def __init__(self, as_list: bool) -> None:
        super().__init__()
        self.touched, self.untouched, self.sizes = 3, 5, [3, 5]
        self.as_list = as_list
        self.conv = conv_bn(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        sizes = self.sizes if self.as_list else [self.touched, self.untouched]
        first, rest = x.split(sizes, 1)
        return torch.cat([rest, self.conv(first)], 1)


@pytest.mark.parametrize("as_list", [True, False])
def test_uneven_parts_are_cut_freely_and_their_sizes_follow(as_list: bool) -> None:
    graph, small = smaller(net(Uneven(as_list)), 0.4)
    assert {group.name: group.size for group in graph.prunable_groups} == {
        "stem.0[0:3]": 3,
        "stem.0[3:8]": 5,
        "middle.conv.0": 3,
    }
    assert (small.middle.touched, small.middle.untouched, small.middle.sizes) == (2, 3, [2, 3])


class Heads(nn.Module):
    """Attention whose heads are an attribute; ``derived``: their width is computed from the input's channels."""

    def __init__(self, derived: bool = False, scaled_by_heads: bool = False) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 4, 2
        self.derived, self.scaled_by_heads = derived, scaled_by_heads
        self.qkv, self.proj = nn.Conv2d(8, 24, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        width = c // self.num_heads if self.derived else self.head_dim
        q, k, v = self.qkv(x).view(n, 3, self.num_heads, width, h * w).unbind(1)
        attention = (q.transpose(-2, -1) @ k).softmax(-1)
        out = (v @ attention.transpose(-2, -1)).reshape(n, -1, h, w)
        return self.proj(out * self.num_heads if self.scaled_by_heads else out)


def test_whole_heads_go_and_their_number_follows() -> None:
    graph, small = smaller(net(Heads()))
    assert graph.group("middle.qkv").size == 4
    assert (small.middle.num_heads, small.middle.head_dim) == (2, 2)
    assert small.middle.qkv.weight.shape[0] == 12
    assert small.middle.qkv.out_channels == 12


def test_heads_computed_from_the_inputs_channels_keep_their_width() -> None:
    graph, small = smaller(net(Heads(derived=True)))
    assert graph.group("middle.qkv").size == 4
    assert small.middle.num_heads == 2
    assert list(small.middle.sizes_in_code.values()) == [2]  # the width that c // num_heads no longer is


def test_an_attribute_with_a_second_meaning_is_not_changed() -> None:
    graph, small = smaller(net(Heads(scaled_by_heads=True)))
    assert graph.group("middle.qkv").prunable
    assert small.middle.num_heads == 4
    assert 2 in small.middle.sizes_in_code.values()


class Tokens(nn.Module):
    """Attention and MLP over tokens with linear layers; the attention's sizes come through a function of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).reshape(*self.layout(n, h * w, c)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        tokens = tokens + self.proj(mixed.transpose(1, 2).reshape(n, h * w, c))
        return (tokens + self.down(F.gelu(self.up(tokens)))).transpose(1, 2).reshape(n, c, h, w)

    def layout(self, samples: int, positions: int, width: int) -> tuple[int, ...]:
        return samples, positions, 3, 4, width // 4


def test_a_failing_linear_layer_is_not_to_blame_for_the_sizes_of_its_module() -> None:
    graph, _ = smaller(net(Tokens()))
    assert "fixed in the Python code" in graph.group("middle.qkv").reason
    assert graph.group("middle.up").prunable


class Counted(nn.Module):
    """Its result depends on how many channels there are."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.shape[1] ** 0.5


class CountedInATensor(nn.Module):
    """The same, as torchvision's RAFT computes it."""

    def forward(self, x: Tensor) -> Tensor:
        return x / torch.sqrt(torch.tensor(x.shape[1]))


@pytest.mark.parametrize(("middle", "where"), [(Counted, "aten.div gets"), (CountedInATensor, "torch.tensor gets")])
def test_a_number_computed_from_the_channels_is_noticed(middle: type[nn.Module], where: str) -> None:
    graph = trace(net(middle()), images())
    assert where in graph.group("stem.0").reason


class Update(nn.Module):
    def __init__(self, hidden: int, inputs: int) -> None:
        super().__init__()
        self.hidden_size, self.conv = hidden, nn.Conv2d(inputs, hidden, 3, padding=1)

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        return h * self.conv(torch.cat([h, x], 1)).tanh()


class Flow(nn.Module):
    """RAFT: products of features are divided by the root of their number; a child knows where context is cut."""

    def __init__(self, hidden: int, context: int) -> None:
        super().__init__()
        self.features, self.context = nn.Conv2d(3, 12, 1), nn.Conv2d(3, hidden + context, 1)
        self.update, self.head = Update(hidden, hidden + context), nn.Conv2d(hidden, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        n, c, height, width = features.shape
        flat = features.view(n, c, height * width)
        alike = torch.matmul(flat.transpose(1, 2), flat).mean(2).view(n, 1, height, width)
        context = self.context(x)
        size = self.update.hidden_size
        h, context = torch.split(context, [size, context.shape[1] - size], dim=1)
        return self.head(self.update(h.tanh() * alike / torch.sqrt(torch.tensor(c)), context.relu()))


@pytest.mark.parametrize(("hidden", "context"), [(8, 6), (8, 8)])
def test_channels_that_the_code_counts_stay_and_other_sizes_of_it_follow(hidden: int, context: int) -> None:
    model = randomise_(Flow(hidden, context)).double().eval()
    result = lp.prune(model, images(), selection=lp.LayerRatio(0.5))
    assert "fixed in the Python code" in str(result.graph.group("features").reason)
    assert result.model.update.hidden_size == hidden // 2
    assert result.model.context.out_channels == (hidden + context) // 2
    assert check_lossless(result.masked, result.model, images(3, size=12)).passed


class Branches(nn.Module):
    """Takes another path with fewer channels."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.shape[1] > 6 else x + torch.full_like(x, 2.0) * 3


def test_another_path_is_noticed() -> None:
    graph = trace(net(Branches()), images())
    assert "takes another path" in graph.group("stem.0").reason


class Picky(nn.Module):
    """Compares its input with a number that nothing in the trace shows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == 8, "eight channels expected"
        return self.conv(x)


def test_a_module_that_fails_keeps_what_it_reads_and_is_named() -> None:
    graph = trace(net(Picky()), images())
    reason = graph.group("stem.0").reason
    assert "around 'middle'" in reason
    assert "AssertionError: eight channels expected" in reason


class Peeks(nn.Module):
    """Looks at values: nothing that the meta device could do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if float(x.sum()) > -1e9 else x


def test_a_model_that_looks_at_values_is_tried_on_its_own_device() -> None:
    graph, _ = smaller(net(Peeks()))
    assert len(graph.prunable_groups) == 2


class Cached(nn.Module):
    """Derives a tensor in its first evaluation and keeps it until it is trained again, as LeViT does."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(8))
        self.cache: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        if mode:
            self.cache = {}
        return self

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and "scale" in self.cache:
            return x * self.cache["scale"]
        scale = self.scale.exp().view(-1, 1, 1)
        if not self.training:
            self.cache["scale"] = scale.detach()
        return x * scale


def test_what_a_module_derived_and_kept_does_not_survive_the_cut() -> None:
    model = net(Cached())
    model(images())
    graph, small = smaller(model)
    assert graph.group("stem.0").prunable
    assert small.middle.scale.shape == (4,)
    assert not small.training


class Shuffled(nn.Module):
    """Channel shuffle between two numbers of groups, one fixed, one computed."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return self.conv(x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w))


@pytest.mark.parametrize(("groups", "left"), [(2, 2), (4, 2)])
def test_a_shuffle_loses_places_in_its_groups_or_whole_groups_whichever_are_more(groups: int, left: int) -> None:
    graph, small = smaller(net(Shuffled(groups)))
    assert graph.group("stem.0").size == 4
    assert small.middle.groups == left


def test_whole_groups_of_a_convolution_go_where_there_are_many() -> None:
    many, few = net(conv_bn(8, 12, groups=4), 12), net(conv_bn(8, 12, groups=2), 12)
    graph, small = smaller(many)
    assert graph.group("stem.0").size == 4
    assert (small.middle[0].groups, small.middle[0].in_channels, small.middle[0].out_channels) == (2, 4, 6)
    graph, small = smaller(few)
    assert (graph.group("stem.0").size, graph.group("middle.0").size) == (4, 6)
    assert small.middle[0].groups == 2


def test_whole_groups_of_a_group_norm_go() -> None:
    _, small = smaller(net(nn.GroupNorm(4, 8)))
    assert (small.middle.num_groups, small.middle.num_channels) == (2, 4)


class LastNorm(nn.Module):
    """Layer norm over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def test_channels_under_a_layer_norm_go_by_choice_only() -> None:
    model = net(LastNorm())
    assert "statistic over channels" in trace(model, images()).group("stem.0").reason
    graph = trace(model, images(), statistics=True)
    group = graph.group("stem.0")
    assert group.prunable
    assert group.verdict.startswith("yes, but with loss: enters a statistic over channels")
    plan = random_plan(graph)
    report = reconstruct_(model, graph, plan, example_inputs=images())
    assert not report.passed
    assert model.middle.norm.normalized_shape == (4,)


class AsksForTheMode(nn.Module):
    """Takes another path in training."""

    runs = 0

    def __init__(self, asks: bool) -> None:
        super().__init__()
        self.asks = asks

    def forward(self, x: Tensor) -> Tensor:
        if x.is_meta:
            return x
        AsksForTheMode.runs += 1
        return x * 2 if self.asks and self.training else x


@pytest.mark.parametrize("asks", [True, False])
def test_train_mode_is_traced_only_if_the_model_asks_for_it(asks: bool) -> None:
    before = AsksForTheMode.runs
    trace(net(AsksForTheMode(asks)), images())
    assert AsksForTheMode.runs - before == 1 + asks
    assert "training" not in vars(nn.Module)


def test_repaired_sizes_are_saved_and_loaded(tmp_path) -> None:
    model = net(Scales())
    graph = trace(model, images())
    plan = random_plan(graph)
    small = reconstruct(model, graph, plan)
    save(tmp_path / "small.pt", small, plan)
    fresh = net(Scales())
    assert load(tmp_path / "small.pt", fresh) == plan
    assert fresh.middle.width == 1
    assert torch.equal(fresh(images()), small(images()))
    save(tmp_path / "again.pt", fresh, plan)
    assert load(tmp_path / "again.pt", net(Scales())) == plan


def test_a_failed_reconstruction_puts_sizes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net(Scales())
    graph = trace(model, images())
    monkeypatch.setattr("lightning_prune.reconstruction.small_model._at_fault", lambda *_: {})
    monkeypatch.setattr("lightning_prune.model_state.cutting.drop_caches_", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        reconstruct_(model, graph, random_plan(graph))
    assert model.middle.width == 2
    assert model.middle.convs[0][0].out_channels == 2
    model(images())


class Attends(nn.Module):
    """Lays its channels out by numbers that it computes, one of which its caller's attribute has by chance."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = 2
        self.mixed, self.out = nn.Conv2d(width, 2 * width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        query, value = self.mixed(x).view(n, self.heads, c, h * w).split([c // 2, c // 2], dim=2)
        return self.out((query.softmax(-1) * value).reshape(n, c, h, w))


class Halves(nn.Module):
    """Position-sensitive attention of YOLOv10: one half of the channels passes."""

    def __init__(self) -> None:
        super().__init__()
        self.c = 8
        self.first, self.attends, self.last = nn.Conv2d(8, 16, 1), Attends(8), nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        passing, attended = self.first(x).split((self.c, self.c), dim=1)
        return self.last(torch.cat([passing, attended + self.attends(attended)], 1))


def test_a_number_of_the_modules_own_code_is_not_that_of_what_it_calls() -> None:
    graph, _ = smaller(net(Halves()))
    assert graph.group("stem.0").prunable


class Plain(nn.Module):
    """Insists on a number that stands in its code only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == 8
        return self.conv(x)


class Reads(nn.Module):
    """What is missing fails here, not where it was not kept."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 6, 1)

    def forward(self, kept: Tensor, x: Tensor) -> Tensor:
        return self.conv(kept.relu()) + x


class Numbered(nn.Module):
    """Keeps what some of its layers make, by their number, as ultralytics' models do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 1), Plain(), nn.Conv2d(8, 6, 1)])
        self.save, self.read = [6, 8], Reads()

    def forward(self, x: Tensor) -> Tensor:
        kept = {}
        for number, layer in enumerate(self.layers, start=5):
            x = layer(x)
            if number in self.save:
                kept[number] = x
        return self.read(kept.get(6), x)


def test_a_number_that_followed_in_vain_is_put_back() -> None:
    graph, small = smaller(net(Numbered(), 6))
    assert small.middle.save == [6, 8]
    assert graph.group("middle.layers.0").prunable


class Chunks(nn.Module):
    """Cuts into two by a number of pieces; for export by their width (C2f of ultralytics)."""

    def __init__(self) -> None:
        super().__init__()
        self.c = 4
        self.first, self.last = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([piece.relu() for piece in self.first(x).chunk(2, 1)], 1))

    def forward_split(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([piece.relu() for piece in self.first(x).split((self.c, self.c), 1)], 1))


class ChunksScaled(Chunks):
    """The same number for another purpose."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.c


def test_the_width_of_pieces_follows_where_no_run_reads_it() -> None:
    graph, small = smaller(net(Chunks()))
    assert graph.group("middle.first").prunable
    assert small.middle.c == 2
    x = torch.randn(2, small.middle.first.in_channels, 5, 5).to(small.middle.first.weight)
    torch.testing.assert_close(small.middle.forward_split(x), small.middle(x))


def test_a_number_that_is_read_for_another_purpose_does_not_follow() -> None:
    graph, small = smaller(net(ChunksScaled()))
    assert graph.group("middle.first").prunable
    assert small.middle.c == 4
