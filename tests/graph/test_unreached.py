"""Branches that no trace has taken work after pruning, or what they may read and make stays, and it is said."""

from __future__ import annotations

import copy
import itertools
import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.errors import UnreachedWarning
from lightning_prune.schedule import Rounds
from tests.zoo import images, randomise_

WIDTH = 8


def inputs(seed: int = 0, size: int = 10) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed)).double()


def pruned(model: nn.Module, **options: Any) -> lp.PruneResult:
    """Pruned after a trace of the default path, about which the user is warned."""
    with pytest.warns(UnreachedWarning):
        return lp.prune(randomise_(model).double().eval(), inputs(), **options)


@torch.no_grad()
def assert_same(result: lp.PruneResult, *args: Any, **kwargs: Any) -> None:
    for seed, size in ((1, 10), (2, 13)):
        masked, small = (m(inputs(seed, size), *args, **kwargs) for m in (result.masked, result.model))
        assert masked.shape == small.shape
        assert float((masked - small).abs().max()) <= 1e-10 * float(masked.abs().max())


def conv(inputs: int = WIDTH, outputs: int = WIDTH) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class Net(nn.Module):
    """A stem, branches, a head; ``path`` says how the branches run."""

    def __init__(self, path: Callable[[Any, Tensor, bool], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.stem, self.head = conv(3), nn.Conv2d(WIDTH, 4, 1)
        self.path = path
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor, deep: bool = False) -> Tensor:
        return self.head(self.path(self, self.stem(x), deep))


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "conv": conv,
    "norm": lambda: nn.BatchNorm2d(WIDTH),
    "conv, norm": lambda: nn.Sequential(conv(), nn.BatchNorm2d(WIDTH), nn.ReLU()),
    "two": lambda: nn.Sequential(conv(WIDTH, 6), nn.Sigmoid(), conv(6, WIDTH)),
    "depthwise": lambda: nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH), conv()),
    "grouped": lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=2),
    "group norm": lambda: nn.Sequential(conv(), nn.GroupNorm(4, WIDTH)),
}


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("container", [nn.ModuleList, nn.Sequential, None])
def test_a_branch_built_like_a_reached_one_loses_its_channels(block: str, container: Any) -> None:
    easy, hard = BLOCKS[block](), BLOCKS[block]()
    both = nn.Sequential(easy, hard) if container is nn.Sequential else nn.ModuleList([easy, hard])
    parts = {"easy": easy, "hard": hard} if container is None else {"both": both}

    def path(net: Any, x: Tensor, deep: bool) -> Tensor:
        branches = (net.easy, net.hard) if container is None else tuple(net.both)
        return branches[deep](x)

    result = pruned(Net(path, **parts))
    assert result.graph.group("stem").prunable
    assert_same(result)
    assert_same(result, deep=True)


@pytest.mark.parametrize("block", BLOCKS)
def test_whatever_the_unseen_path_does_between(block: str) -> None:
    def path(net: Any, x: Tensor, deep: bool) -> Tensor:
        x = net.easy(x)
        return net.hard(x.sigmoid()).exp() if deep else x

    result = pruned(Net(path, easy=BLOCKS[block](), hard=BLOCKS[block]()))
    assert result.graph.group("stem").prunable
    assert_same(result)
    assert_same(result, deep=True)


def test_a_norm_of_a_list_belongs_to_its_neighbours_alone() -> None:
    def path(net: Any, x: Tensor, deep: bool) -> Tensor:
        return net.second[str(deep)](net.middle(net.first[deep](x)))

    norms = [nn.BatchNorm2d(WIDTH) for _ in range(4)]
    model = Net(
        path, first=nn.ModuleList(norms[:2]), middle=conv(), second=nn.ModuleDict({"False": norms[2], "True": norms[3]})
    )
    result = pruned(model)
    assert [group.name for group in result.graph.prunable_groups] == ["stem", "middle"]
    parts = {part.tensor: part for part in result.graph.group("stem").slices}
    assert parts["first.1.weight"].norm
    assert parts["first.1.weight"].layer == "stem"
    assert_same(result)
    assert_same(result, deep=True)


def test_data_need_not_reach_what_goes_along() -> None:
    model = Net(lambda net, x, deep: (net.hard if deep else net.easy)(x), easy=conv(), hard=conv())
    assert_same(pruned(model, criterion="jre", batches=[inputs(5)], loss=lambda m, x: m(x).square().mean()), deep=True)


def test_without_a_sibling_built_alike_the_channels_stay() -> None:
    def path(net: Any, x: Tensor, deep: bool) -> Tensor:
        x = net.other(x)
        return x + net.hard(x) if deep else x

    graph = lp.trace(
        Net(path, other=nn.Sequential(conv(WIDTH, 6), conv(6, WIDTH)), hard=nn.Conv2d(WIDTH, WIDTH, 1)),
        inputs().float(),
    )
    verdicts = {group.name: group.verdict for group in graph.groups}
    assert verdicts["stem"] == "no: may be read or made by 'hard', which no trace has reached"
    assert verdicts["other.0"] == "yes"
    assert any("hard" in note for note in graph.notes)


class Decoder(nn.Module):
    """Only the path that is not taken reads the second input."""

    def __init__(self, hard: nn.Module) -> None:
        super().__init__()
        self.easy, self.hard = conv(), hard

    def forward(self, x: Tensor, skipped: Tensor, deep: bool) -> Tensor:
        return self.easy(x) + self.hard(skipped) if deep else self.easy(x)


@pytest.mark.parametrize("hard", [conv, lambda: nn.Conv2d(WIDTH, WIDTH, 1)])
def test_what_enters_the_module_is_met_too(hard: Callable[[], nn.Module]) -> None:
    model = Net(
        lambda net, x, deep: net.decoder(net.second(net.first(x)), x, deep),
        first=conv(WIDTH, 6),
        second=conv(6, WIDTH),
        decoder=Decoder(hard()),
    )
    result = pruned(model)
    assert result.graph.group("first").prunable
    assert_same(result)
    assert_same(result, deep=True)


def test_the_warning_names_the_ways_out_and_comes_once() -> None:
    model = Net(lambda net, x, deep: (net.hard if deep else net.easy)(x), easy=conv(), hard=conv())
    session = lp.PruningSession(model, inputs().float(), schedule=Rounds(2, epochs=1))
    session.score()
    with pytest.warns(UnreachedWarning, match=r"hard \(as easy\).*also=\[.*remove it") as told:
        session.mask_()
    assert [warning.filename for warning in told] == [__file__]
    session.reconstruct_()
    session.step()


def test_it_comes_too_where_the_steps_are_called_one_by_one() -> None:
    model = Net(lambda net, x, deep: (net.hard if deep else net.easy)(x), easy=conv(), hard=conv()).double()
    for remove in (lp.mask_, lp.reconstruct):
        graph = lp.trace(model, inputs())
        plan = lp.LayerRatio(0.5).select(graph, lp.score(model, graph, "l1"))
        with pytest.warns(UnreachedWarning, match="hard"):
            remove(copy.deepcopy(model), graph, plan)


def test_nothing_is_said_of_a_path_that_was_traced_too() -> None:
    model = Net(lambda net, x, deep: (net.hard if deep else net.easy)(x), easy=conv(), hard=conv()).double()
    also = [{"x": inputs(), "deep": True}]
    result = lp.prune(model, inputs(), also=also)
    assert result.graph.unreached == ()
    assert_same(result, deep=True)


class Inner(nn.Module):
    """Reached and unreached parts of random kinds, in random containers, run in a random order."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        kinds = draw.choices(list(BLOCKS), k=2)
        self.steps: list[tuple[str, str, str]] = []
        for number in range(draw.choice([1, 2, 3])):
            easy, hard = BLOCKS[draw.choice(kinds)](), BLOCKS[draw.choice(kinds)]()
            container = draw.choice([None, nn.ModuleList, nn.ModuleDict, nn.Sequential])
            name, names = f"step{number}", ("0", "1")
            if container is None:
                names = "easy", "hard"
                self.add_module(f"{name}_easy", easy)
                self.add_module(f"{name}_hard", hard)
            elif container is nn.ModuleDict:
                names = "easy", "hard"
                self.add_module(name, nn.ModuleDict({"easy": easy, "hard": hard}))
            else:
                self.add_module(
                    name, nn.ModuleList([easy, hard]) if container is nn.ModuleList else nn.Sequential(easy, hard)
                )
            places = [f"{name}_{key}" if container is None else f"{name}.{key}" for key in names]
            self.steps.append((draw.choice(["either", "series", "added", "input", "sigmoid", "joined"]), *places))
        self.join = nn.Conv2d(2 * WIDTH, WIDTH, 1) if draw.random() < 0.3 else None

    def forward(self, f: Tensor, g: Tensor, deep: bool) -> Tensor:
        for how, *places in self.steps:
            easy, hard = map(self.get_submodule, places)
            if not deep:
                f = easy(f)
            elif how == "either":
                f = hard(f)
            elif how == "series":
                f = hard(easy(f))
            elif how == "added":
                f = easy(f) + hard(f)
            elif how == "input":
                f = easy(f) * hard(g)
            elif how == "joined" and self.join is not None:
                f = self.join(torch.cat([hard(f), easy(g)], 1))
            else:
                f = hard(f.sigmoid()).sigmoid()
        return f


class Random(nn.Module):
    """One or two of these between stem and head, which choose the path by value, flag or attribute."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.stem, self.head = conv(3, WIDTH), nn.Conv2d(WIDTH, 4, 1)
        self.parts = nn.ModuleList(Inner(draw) for _ in range(draw.choice([1, 2])))
        self.by, self.deep = draw.choice(["value", "flag", "attribute"]), False

    def forward(self, x: Tensor, deep: bool = False) -> Tensor:
        deep = {"value": bool(x.detach().std() > 2), "flag": deep, "attribute": self.deep}[self.by]
        f = g = self.stem(x).relu()
        for part in self.parts:
            f = part(f, g, deep)
        return self.head(f)


@pytest.mark.parametrize("seed", range(20))
def test_random_branches(seed: int) -> None:
    model = randomise_(Random(seed)).double().eval()
    graph = lp.trace(model, inputs())
    if not graph.prunable_groups:
        assert any("no trace has reached" in str(group.reason) for group in graph.groups)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreachedWarning)
        result = lp.prune(model, inputs())
    assert_same(result)
    for one in (result.masked, result.model):
        one.by, one.deep = "attribute", True
    assert_same(result)


class Affine(nn.Module):
    """Scales by one of several parameters."""

    def __init__(self, listed: bool) -> None:
        super().__init__()
        first, second = (nn.Parameter(torch.rand(1, WIDTH, 1, 1)) for _ in range(2))
        self.listed = nn.ParameterList([first, second] if listed else [])
        if not listed:
            self.first, self.second = first, second

    def forward(self, x: Tensor, deep: bool) -> Tensor:
        return x * (self.listed[deep] if len(self.listed) else self.second if deep else self.first)


@pytest.mark.parametrize("listed", [True, False])
def test_single_parameters(listed: bool) -> None:
    model = Net(
        lambda net, x, deep: net.affine(net.second(net.first(x)), deep),
        first=conv(),
        second=conv(),
        affine=Affine(listed),
    )
    result = pruned(model)
    assert result.graph.group("second").prunable == listed
    assert_same(result)
    assert_same(result, deep=True)


def test_norms_without_parameters() -> None:
    norms = nn.ModuleList(nn.BatchNorm2d(WIDTH, affine=False) for _ in range(2))
    model = Net(lambda net, x, deep: net.last(net.norms[deep](x)), norms=norms, last=nn.Conv2d(WIDTH, WIDTH, 1))
    result = pruned(model)
    assert result.graph.group("stem").prunable
    assert_same(result)
    assert_same(result, deep=True)


def test_a_leftover_head_of_another_size_changes_nothing() -> None:
    model = Net(lambda net, x, deep: net.conv(x), conv=conv(), leftover=nn.Linear(5 * WIDTH + 1, 3))
    assert [group.name for group in pruned(model).graph.prunable_groups] == ["stem", "conv"]


def stages(*widths: int) -> nn.ModuleList:
    """Each reads what the one before makes."""
    return nn.ModuleList(nn.Sequential(conv(a, b), nn.ReLU()) for a, b in itertools.pairwise(widths))


def up_to(depth: int, *, read: int) -> Callable[[Any, Tensor, bool], Tensor]:
    """An encoder of which the decoder wants some stages only."""

    def path(net: Any, x: Tensor, deep: bool) -> Tensor:
        made = [x]
        for stage in net.stages[: None if deep else depth]:
            made.append(stage(made[-1]))
        return net.decoder(made[read]) * (made[-1].mean() if deep else 1)

    return path


def test_a_stage_after_another_that_never_runs_says_nothing_of_those_that_do() -> None:
    # The last reads 4 times as many channels as the stem makes, but those of the stage before it.
    net = Net(up_to(2, read=2), stages=stages(WIDTH, 12, 16, 4 * WIDTH, 40), decoder=nn.Conv2d(16, WIDTH, 1))
    result = pruned(net)
    assert [group.name for group in result.graph.prunable_groups] == ["stem", "stages.0.0", "decoder"]
    assert "may be read or made by 'stages.2'" in str(result.graph.group("stages.1.0").reason)
    assert_same(result)
    assert_same(result, deep=True)


def test_what_nobody_reads_may_be_for_a_stage_that_never_ran() -> None:
    net = Net(up_to(2, read=1), stages=stages(WIDTH, 12, 16, 20), decoder=nn.Conv2d(12, WIDTH, 1))
    result = pruned(net)
    assert [group.name for group in result.graph.prunable_groups] == ["stem", "stages.0.0", "decoder"]
    assert_same(result)
    assert_same(result, deep=True)


def test_a_penalty_on_weights_or_an_average_of_them_does_not_reach_a_branch() -> None:
    """What runs over all parameters says nothing about the paths that they lie on."""

    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.side, self.b = nn.Conv2d(3, 8, 3), nn.Sequential(nn.Conv2d(8, 8, 1)), nn.Conv2d(8, 4, 1)
            self.taken = False

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.b(x + self.side(x) if self.taken else x)

    def step(model: nn.Module) -> Tensor:
        penalty = sum(p.abs().sum() for p in model.parameters())
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.5).add_(p * 0.5)
        return model(x).sum() + penalty

    model, x = Late().double(), images()
    graph = lp.trace(model, x, also=[step])
    (group,) = (group for group in graph.groups if group.name == "a")
    assert not group.prunable or any(part.tensor == "side.0.weight" for part in group.slices)
    assert [one for one in graph.notes if "side" in one]
