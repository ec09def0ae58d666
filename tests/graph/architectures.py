"""Random small CNNs: a hypothesis strategy for descriptions, and the module of a description.

A description (`Net`) is plain nested dataclasses. Its ``repr`` can be pasted into a test and rebuilds the very same
module, weights included, since every random number comes from the description itself.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.graph.architecture_blocks import (
    ACTS,
    DOWN,
    MERGES,
    NORMS,
    UP,
    WEIGHTS,
    Apply,
    Block,
    Conv,
    Depthwise,
    Merge,
    Point,
    Shuffle,
    Split,
)
from tests.graph.architecture_specials import SPECIALS, Special
from tests.zoo import randomise_

SIZE, BATCH = 8, 2
HEADS = ("pooled", "mlp", "maps", "tokens", "flat", "flat_bn", "flat_view", "flat_baked")


@dataclass(frozen=True, repr=False)
class Net(Block):
    """A whole model: blocks, a head, and the block (if any) whose output is an output too."""

    blocks: tuple[Block, ...]
    head: str = "pooled"
    tap: int | None = None
    raw_tap: bool = False
    tap_in_eval: bool = True

    @property
    def any_size(self) -> bool:
        """Whether it runs at another resolution."""
        return not self.head.startswith("flat")

    @property
    def seed(self) -> int:
        return zlib.crc32(repr(self).encode())

    def module(self) -> nn.Module:
        """In float64 and eval mode, with random statistics and biases."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return randomise_(Model(self), self.seed).eval()

    def images(self, batch: int = BATCH, size: tuple[int, int] = (SIZE, SIZE)) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + batch)
        return torch.randn(batch, 3, *size, generator=generator, dtype=torch.float64)


class Model(nn.Module):
    def __init__(self, net: Net) -> None:
        super().__init__()
        built, channels, taps = [], 3, []
        for block in net.blocks:
            module, channels = block.build(channels)
            built.append(module)
            taps.append(channels)
        self.stages, self.tap, self.tap_in_eval = nn.ModuleList(built), net.tap, net.tap_in_eval
        with torch.no_grad():
            shape = nn.Sequential(*built).eval()(torch.randn(2, 3, SIZE, SIZE)).shape
        self.head = head(net.head, channels, shape[1:].numel()).train()
        if net.tap is not None:
            self.side = nn.Identity() if net.raw_tap else nn.Conv2d(taps[net.tap], 2, 1)

    def forward(self, x: Tensor) -> Any:
        side = None
        for number, stage in enumerate(self.stages):
            x = stage(x)
            if number == self.tap and (self.training or self.tap_in_eval):
                side = self.side(x)
        out = self.head(x)
        return out if side is None else {"out": out, "side": (side,)}


def head(kind: str, channels: int, numel: int) -> nn.Module:
    pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(
        *{
            "pooled": lambda: (*pool, nn.Linear(channels, 3)),
            "mlp": lambda: (*pool, nn.Linear(channels, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)),
            "maps": lambda: (nn.Conv2d(channels, 2, 1), nn.Upsample(scale_factor=2, mode="bilinear")),
            "tokens": lambda: (nn.Flatten(2), Transpose(), nn.Linear(channels, 5), nn.GELU(), nn.Linear(5, 3)),
            "flat": lambda: (nn.Flatten(), nn.Linear(numel, 5), nn.ReLU(), nn.Linear(5, 3)),
            "flat_view": lambda: (Apply(lambda x: x.contiguous().view(x.size(0), -1)), nn.Linear(numel, 3)),
            "flat_baked": lambda: (Flat(numel), nn.Linear(numel, 3)),
            "flat_bn": lambda: (nn.Flatten(), nn.BatchNorm1d(numel), nn.Linear(numel, 5), nn.BatchNorm1d(5), nn.ReLU(),
                                nn.Linear(5, 3)),
        }[kind]()
    )  # fmt: skip


class Flat(nn.Module):
    """The number of features is an attribute."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel = numel

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, self.numel)


class Transpose(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


# --- the strategy -------------------------------------------------------------------------------------------

WIDTHS = st.integers(2, 12)
AFTER_CONV = tuple(name for name in ACTS if name not in ("l2", "softmax"))
FRESH = tuple(name for name in ACTS if name != "relu_")  # what may follow a tensor that others read too
INNER_SPECIALS = tuple(name for name in SPECIALS if not name.startswith(("pixel", "mixer")))

convs = st.builds(
    Conv,
    width=WIDTHS,
    kernel=st.sampled_from((1, 3)),
    norm=st.sampled_from(("none", "bn", "bn", "bn", *NORMS)),
    act=st.sampled_from(("none", "relu", "relu", *AFTER_CONV)),
    groups=st.sampled_from((1, 1, 1, 2, 3, 4)),
    mode=st.sampled_from(("zeros", "zeros", "zeros", "reflect", "circular", "replicate")),
    bias=st.booleans(),
    weight=st.sampled_from(("plain",) * 9 + tuple(WEIGHTS)),
)
pre = st.builds(
    Conv,
    width=WIDTHS,
    norm=st.sampled_from(("bn", "bn", *NORMS)),
    act=st.sampled_from(FRESH),
    pre=st.just(True),
)
depthwise = st.builds(
    Depthwise,
    multiplier=st.sampled_from((1, 1, 2)),
    norm=st.sampled_from(("none", "bn", *NORMS)),
    act=st.sampled_from(AFTER_CONV),
    mode=st.sampled_from(("zeros", "reflect")),
)
points = st.builds(Point, kind=st.sampled_from((*FRESH, *NORMS, "max3", "avg3")))
shuffles = st.builds(
    Shuffle,
    groups=st.integers(2, 4),
    how=st.sampled_from(("shape", "baked", "flatten", "torch")),
    fit=st.sampled_from((True, True, True, False)),
)
specials = st.builds(Special, kind=st.sampled_from(INNER_SPECIALS), width=WIDTHS)
leaves = st.one_of(convs, convs, convs, convs, pre, depthwise, points, shuffles, specials)


def chains(blocks: st.SearchStrategy[Block], least: int = 1) -> st.SearchStrategy[tuple[Block, ...]]:
    return st.lists(blocks, min_size=least, max_size=3).map(tuple)


def merges(blocks: st.SearchStrategy[Block], strides: tuple[int, ...] = (1,)) -> st.SearchStrategy[Merge]:
    return st.builds(
        Merge,
        branches=st.lists(chains(blocks, 0), min_size=2, max_size=3).map(tuple),
        how=st.sampled_from(("add", "add", "cat", "cat", *MERGES)),
        act=st.sampled_from(("none", "relu", "relu", *FRESH)),
        stride=st.sampled_from(strides),
    )


def splits(blocks: st.SearchStrategy[Block]) -> st.SearchStrategy[Split]:
    return st.builds(
        Split,
        blocks=chains(blocks),
        how=st.sampled_from(("chunk", "split", "slice", "stride", "split_baked", "slice_baked")),
        join=st.sampled_from(("cat", "cat", "reverse", "all", "write")),
    )


inner = st.recursive(leaves, lambda blocks: st.one_of(merges(blocks), merges(blocks), splits(blocks)), max_leaves=5)
downs = st.one_of(
    st.builds(Point, kind=st.sampled_from(DOWN)),
    st.builds(Conv, width=WIDTHS, stride=st.just(2), norm=st.sampled_from(("none", "bn")), act=st.just("relu")),
    st.sampled_from((Special("pixel_unshuffle"), Special("mixer"))),
    merges(leaves, strides=(2,)),
)
ups = st.one_of(
    st.builds(Point, kind=st.sampled_from(UP)),
    st.builds(
        Conv,
        width=WIDTHS,
        transposed=st.just(True),
        groups=st.integers(1, 3),
        bias=st.booleans(),
        norm=st.sampled_from(("none", "bn")),
    ),
    st.builds(Special, kind=st.just("pixel_shuffle"), width=WIDTHS),
)

KINDS: dict[str, st.SearchStrategy[Block]] = {
    "conv": convs,
    "pre": pre,
    "depthwise": depthwise,
    "point": points,
    "shuffle": shuffles,
    "special": specials,
    "merge": merges(leaves),
    "nested": merges(inner),
    "split": splits(leaves),
    "down": downs,
    "up": ups,
}


@st.composite
def nets(draw: Any, kind: str | None = None) -> Net:
    """A description; ``kind``: with at least one such block, a key of KINDS."""
    blocks = draw(st.lists(inner, max_size=3))
    if kind is None:
        blocks += draw(st.lists(downs, max_size=2))
        blocks += draw(st.lists(ups, max_size=1))
        blocks = draw(st.permutations(blocks))
    else:
        blocks.append(draw(KINDS[kind]))
    blocks += draw(st.lists(inner, max_size=2))
    tap = draw(st.one_of(st.none(), st.none(), st.integers(0, len(blocks) - 1))) if blocks else None
    return Net(
        tuple(blocks),
        head=draw(st.sampled_from(HEADS)),
        tap=tap,
        raw_tap=tap is not None and draw(st.booleans()),
        tap_in_eval=tap is None or draw(st.booleans()),
    )
