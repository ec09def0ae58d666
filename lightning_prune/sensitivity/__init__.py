"""What masking channels of one group alone costs, and the ratio of every layer that follows from it.

Here: curves of a metric over the ratio, measured by masking and undoing; ratios from them. Not here: what a metric is
(the caller's function), evaluating a task in a Trainer (experiments), tables and pictures (report).
"""

from lightning_prune.sensitivity.blocks import block_sensitivity
from lightning_prune.sensitivity.budget import Tolerated, within_budget
from lightning_prune.sensitivity.curves import Point, Sensitivity
from lightning_prune.sensitivity.measuring import RATIOS, measure_sensitivity

__all__ = ["RATIOS", "Point", "Sensitivity", "Tolerated", "block_sensitivity", "measure_sensitivity", "within_budget"]
