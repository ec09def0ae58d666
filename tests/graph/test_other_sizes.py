"""Batch and image sizes other than the traced one: what holds at one size only stays whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.errors import NoEffectWarning, NotReconstructedWarning
from lightning_prune.graph.entry_points import entry_points
from lightning_prune.graph.other_sizes import other_sizes, takes_size
from lightning_prune.plan import GroupPlan, Plan


def images(*size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(size)))


class Scrambles(nn.Module):
    """MAnet's attention: (n, h w, c) is reshaped, not transposed, to (n, c, h, w)."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 64, 1), nn.Conv2d(64, 64, 1), nn.Conv2d(64, 4, 1)
        self.inner = nn.Conv2d(64, 32, 1) if own else None
        if own:
            self.b = nn.Conv2d(32, 64, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        n, c, h, w = x.shape
        y = self.b(x if self.inner is None else torch.relu(self.inner(x)))
        return self.c(x + y.flatten(2).transpose(1, 2).reshape(n, c, h, w))


@pytest.mark.parametrize("side", [2, 4, 8, 10])
def test_a_reshape_that_mixes_positions_and_channels_stays_whole(side: int) -> None:
    torch.manual_seed(0)
    model = Scrambles(own=True).double().eval()
    result = lp.prune(model, images(2, 3, side, side))
    for name in ("a", "b"):
        group = next(group for group in result.graph.groups if name in [layer.name for layer in group.layers])
        assert not group.prunable
    assert result.model.inner.out_channels < 32
    for size in ((2, side, side), (3, 5, 7), (1, 6, 6), (2, 8, 4)):
        x = images(size[0], 3, *size[1:])
        assert torch.allclose(result.masked(x), result.model(x), rtol=1e-10, atol=1e-12)


def test_where_nothing_is_left_the_model_comes_back_whole_and_it_is_said() -> None:
    model = Scrambles(own=False).double().eval()
    with pytest.warns(NoEffectWarning, match="one batch and image size only"):
        result = lp.prune(model, images(2, 3, 4, 4))
    assert sum(p.numel() for p in result.model.parameters()) == sum(p.numel() for p in model.parameters())
    assert all(group.withheld for group in result.graph.groups if "a" in [layer.name for layer in group.layers])
    with pytest.raises(lp.PruningError, match="one batch and image size only"):
        lp.prune(model, images(2, 3, 4, 4), selection=lp.Budget(params=0.5))


class Rows(nn.Module):
    """A tutorial's ``view(-1, features)``, which runs on other sizes too and makes other rows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).relu().view(-1, 8 * 64) if x.shape[1] == 3 else x)


class Flattens(Rows):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).relu().flatten(1))


@pytest.mark.parametrize("kind", [Flattens])
def test_a_model_of_one_image_size_is_compared_at_another_batch_size(kind: type[Rows]) -> None:
    result = lp.prune(kind().double().eval(), images(2, 3, 8, 8))
    assert result.model.conv.out_channels < 8
    assert result.lossless.compared == ("forward", "forward at another size")
    x = images(5, 3, 8, 8)
    assert torch.allclose(result.masked(x), result.model(x), rtol=1e-10, atol=1e-12)


def test_rows_that_are_no_samples_say_that_a_size_is_not_meant() -> None:
    entry = entry_points(images(2, 3, 8, 8))[0]
    other = next(other_sizes(entry))
    assert len(other.inputs) == 3
    assert Rows().double()(other.inputs).shape[0] != 3
    assert not takes_size(other, [2], [Rows().double()(other.inputs).shape[0]])
    assert takes_size(other, [2, 7], [3, 11])  # boxes, say


@pytest.mark.parametrize(
    ("inputs", "shapes"),
    [
        (torch.ones(2, 3, 64, 64), [(3, 3, 128, 96), (2, 3, 128, 96), (3, 3, 64, 64)]),
        (torch.ones(1, 3, 7, 5), [(2, 3, 14, 7), (1, 3, 14, 7), (2, 3, 7, 5)]),
        ({"x": torch.ones(2, 3, 8, 8), "n": torch.ones(2, dtype=torch.int64)}, None),
    ],
)
def test_sizes_that_are_tried(inputs: object, shapes: list[tuple[int, ...]] | None) -> None:
    found = list(other_sizes(entry_points(inputs)[0]))
    if shapes is None:
        assert found[0].inputs["x"].shape[0] == found[0].inputs["n"].shape[0] == 3
        return
    assert [tuple(one.inputs.shape) for one in found] == shapes


class OneSizeOnly(nn.Module):
    """Its channels are read in another order at any other size."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        return self.b(x if x.shape[-1] == 8 else x.flip(1))


def test_the_returned_pair_is_compared_at_sizes_that_were_not_traced() -> None:
    model = OneSizeOnly().double().eval()
    graph = lp.trace(model, images(2, 3, 8, 8))
    plan = Plan({"a": GroupPlan(8, (0, 1, 4))})
    small = lp.reconstruct(model, graph, plan)  # nothing is compared
    with lp.mask_(model, graph, plan):
        assert lp.check_lossless(model, small, images(2, 3, 8, 8)).passed
        assert not lp.check_lossless(model, small, images(2, 3, 6, 6)).passed
    with pytest.warns(NotReconstructedWarning, match="at another size"):
        assert lp.reconstruct(model, graph, plan, example_inputs=images(2, 3, 8, 8)).a.out_channels == 8
