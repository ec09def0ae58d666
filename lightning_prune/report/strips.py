"""Which channels of every layer were kept, as the page draws it: a strip of cells per layer, light at 500 layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_prune.graph.describe import ranges, renumbered, runs
from lightning_prune.report.data import KeptChannels
from lightning_prune.report.figures import bands

APART = 64  # channels of a layer whose cells have room for a gap
HINT = 160  # characters that pointing at a strip shows; opening the layer shows all


@dataclass(frozen=True)
class Strip:
    """A layer on the page.

    Attributes:
        layer: what is drawn.
        path: SVG path of the kept cells, a unit wide and high each.
        band: whether it lies on grey, as every second stage of the network does.
    """

    layer: KeptChannels
    path: str
    band: bool

    @property
    def count(self) -> str:
        """How many are left."""
        kept, dense = self.layer.kept, self.layer.dense
        return f"{kept:,} of {dense:,}" if kept < dense else f"all {dense:,}"

    @property
    def share(self) -> str:
        """The same in per cent."""
        return f"{100 * self.layer.kept / max(self.layer.dense, 1):.0f} %"

    @property
    def hint(self) -> str:
        """What pointing at it shows."""
        return f"kept: {ranges(self.layer.keep, HINT)}" if self.moved else ""

    @property
    def moved(self) -> str:
        """Old and new numbers; empty if they are the same, or unknown."""
        return renumbered(self.layer.keep) if self.layer.kept < self.layer.dense else ""

    @property
    def removed(self) -> str:
        """Old numbers of those that are gone."""
        gone = sorted({*range(self.layer.dense)} - {*self.layer.keep})
        return ranges(gone, 8 * len(gone) + 8)


def strips(layers: Sequence[KeptChannels]) -> list[Strip]:
    """A strip per layer, in the order of the network."""
    grey = {row for first, last in bands([one.layer for one in layers])[1::2] for row in range(first, last + 1)}
    return [Strip(layer, _path(layer), row in grey) for row, layer in enumerate(layers)]


def _path(layer: KeptChannels) -> str:
    keep = layer.keep or range(layer.kept)  # how many, if not which
    if layer.dense <= APART and layer.keep:
        return "".join(f"M{number + 0.08:g} 0h.84v1h-.84z" for number in keep)
    return "".join(f"M{first} 0h{last - first + 1}v1h-{last - first + 1}z" for first, last in runs(keep))
