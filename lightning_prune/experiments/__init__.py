"""Whole studies: both orders of reconstruction, criteria against each other.

Here: what trains, prunes and evaluates several times. Not here: one pruning (session), how results look (report/).
"""

from lightning_prune.experiments.comparison import Comparison, compare_criteria
from lightning_prune.experiments.orders import OrderSettings, compare_orders

__all__ = ["Comparison", "OrderSettings", "compare_criteria", "compare_orders"]
