"""A number of channels per round: as many as asked, on top of those of earlier rounds."""

from __future__ import annotations

import pytest

from lightning_prune.criteria.scoring import Scores
from lightning_prune.errors import NoEffectWarning, PlanError
from lightning_prune.graph import trace
from lightning_prune.schedule import Rounds, keep_removed
from lightning_prune.selection import ChannelsPerRound, GlobalRatio
from tests.helpers import RandomScores
from tests.selection.test_selection import chain, kept, rising
from tests.zoo import build, images


@pytest.mark.parametrize("over", ["all", "groups", "inner"])
@pytest.mark.parametrize("name", ["Residual", "Dense", "Vgg"])
def test_channels_per_round_removes_what_the_same_ratio_removes(name: str, over) -> None:
    graph = trace(build(name), images())
    scores = RandomScores(graph, seed=2)
    total = GlobalRatio(0.5, over=over).total(graph)
    for number in (1, 2, 3):
        plan = ChannelsPerRound(4, round=number, over=over).select(graph, scores)
        assert plan == GlobalRatio(4 * number / total, over=over).select(graph, scores)


def test_rounds_remove_the_earlier_ones_and_as_many_more() -> None:
    graph = chain(10, 10)
    first = ChannelsPerRound(4).select(graph, rising(graph))
    assert kept(first) == {"0": tuple(range(2, 10)), "1": tuple(range(2, 10))}
    turned = {name: values.flip(0) for name, values in rising(graph).items()}
    turned = Scores(turned, {name: {name: values} for name, values in turned.items()})
    second = ChannelsPerRound(4, round=2).select(graph, keep_removed(turned, first))
    assert kept(second) == {"0": tuple(range(2, 8)), "1": tuple(range(2, 8))}


def test_rounds_of_a_schedule_are_those_of_the_selection() -> None:
    graph = chain(10, 10)
    steps = [step.selection for step in Rounds(4, epochs=1).steps(GlobalRatio(0.5), graph)]
    assert len(steps) == 3  # 4, 8, and the remainder
    for number, step in enumerate(steps[:2], 1):
        assert step.select(graph, rising(graph)) == ChannelsPerRound(4, round=number).select(graph, rising(graph))


def test_rounds_end_where_the_constraints_do() -> None:
    graph = chain(10, 10)
    plan = ChannelsPerRound(128, min_channels=3, ignore="1").select(graph, rising(graph))
    assert kept(plan) == {"0": (7, 8, 9)}
    with pytest.warns(NoEffectWarning, match="removes no channel"):
        ChannelsPerRound(1, round_to=8, ignore="1").select(graph, rising(graph))
    again = ChannelsPerRound(8, round=2, over="inner", min_channels=0.5, ignore=["a"])
    assert repr(eval(repr(again))) == repr(again)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "4", None])
def test_rounds_that_make_no_sense_are_refused(value) -> None:
    with pytest.raises(PlanError, match="channels and round must be integers >= 1"):
        ChannelsPerRound(value)
    with pytest.raises(PlanError, match="channels and round must be integers >= 1"):
        ChannelsPerRound(4, round=value)
