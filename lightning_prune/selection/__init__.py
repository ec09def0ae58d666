"""Selection: from scores to a plan, under a ratio, a number of channels or a budget, and constraints."""

from lightning_prune.selection.base import Question, Selection
from lightning_prune.selection.budget import Budget, Reach
from lightning_prune.selection.explanation import Explanation, explain
from lightning_prune.selection.network import ChannelsPerRound, GlobalRatio, NetworkSelection
from lightning_prune.selection.ratio import LayerRatio

__all__ = [
    "Budget",
    "ChannelsPerRound",
    "Explanation",
    "GlobalRatio",
    "LayerRatio",
    "NetworkSelection",
    "Question",
    "Reach",
    "Selection",
    "explain",
]
