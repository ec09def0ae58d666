"""Labels cost as much as there are channels, move as the tensor's elements do, and fold to what goes together."""

from __future__ import annotations

import torch

from lightning_prune.graph.label_space import LabelSpace, joined
from lightning_prune.graph.labels import NO_LABEL, Labels


def channels(live: torch.Tensor | bool = False) -> Labels:
    return Labels.along(Labels(torch.arange(4), live), (2, 4, 3), 1)


def test_labels_vary_along_the_channels_only_and_movement_keeps_it_so() -> None:
    labels = channels()
    assert (labels.dims, labels.ids.stride()) == ((1,), (0, 1, 0))
    moved = labels.moved(lambda tensor: tensor.permute(2, 1, 0).contiguous())
    assert (moved.dims, moved.ids.stride(0), moved.ids.stride(2)) == ((1,), 0, 0)
    assert moved.flat().ids.tolist() == [0, 1, 2, 3]


def test_flags_move_with_the_ids() -> None:
    moved = channels(torch.tensor([False, True, False, True])).moved(lambda tensor: tensor.flip(1))
    assert moved.flat().ids.tolist() == [3, 2, 1, 0]
    assert moved.flat().live.tolist() == [True, False, True, False]
    assert channels().live.dim() == channels().constant().live.dim() == 0  # one for all


def test_joined_labels_follow_each_other() -> None:
    joined = Labels.joined([channels(), channels(live=True)], 1)
    assert joined.flat().ids.tolist() == [0, 1, 2, 3] * 2
    assert joined.flat().live.tolist() == [False] * 4 + [True] * 4


def test_folding_ties_what_varies_along_the_other_dimension() -> None:
    space = LabelSpace(count=7)
    grid = Labels(torch.tensor([[0, 1, 2], [3, 4, NO_LABEL]]), torch.tensor([[False, True, False], [False] * 3]))
    folded = space.fold(grid, (0,), "here")
    assert folded.flat().ids.tolist() == [0, NO_LABEL]
    assert folded.flat().live[0]
    assert space.classes().tolist() == [0, 0, 0, 3, 4, 5, 6]
    (frozen,) = space.frozen
    assert (frozen.ids.tolist(), frozen.reason) == ([3, 4], "goes together with channels that stay in here")
    assert space.fold(grid, (2,), "here") is None


def test_components_by_hand() -> None:
    first, second = torch.tensor([1, 4, 6]), torch.tensor([2, 1, 5])
    assert joined(torch.arange(7), [(first, second)]).tolist() == [0, 1, 1, 3, 1, 5, 5]
