"""Which channels stay: from scores to a plan, by a ratio or a budget, under constraints.

Here: selections, and what a plan would do before it is done. Not here: the scores (criteria/), what carries the plan
out (reconstruction/), the removal in several steps (schedule).
"""

from lightning_prune.selection.base import Question, Selection
from lightning_prune.selection.budget import Budget
from lightning_prune.selection.explanation import Explanation, explain
from lightning_prune.selection.fixed_plan import FixedPlan, selection_from
from lightning_prune.selection.ratio import GlobalRatio, LayerRatio
from lightning_prune.selection.search import Reach
from lightning_prune.selection.table_choice import TableChoice

__all__ = [
    "Budget",
    "Explanation",
    "FixedPlan",
    "GlobalRatio",
    "LayerRatio",
    "Question",
    "Reach",
    "Selection",
    "TableChoice",
    "explain",
    "selection_from",
]
