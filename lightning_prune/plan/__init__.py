"""The plan: which channels of every group are kept. Masking, reconstruction and loading consume nothing else.

Here: plans, their files, and changing them by layer. Not here: choosing (selection/), carrying them out
(reconstruction/).
"""

from lightning_prune.plan.basis import Basis
from lightning_prune.plan.group_plan import Coupling, GroupPlan, check_coupling
from lightning_prune.plan.naming import named_as_dense
from lightning_prune.plan.plan import FORMAT, Plan

__all__ = ["FORMAT", "Basis", "Coupling", "GroupPlan", "Plan", "check_coupling", "named_as_dense"]
