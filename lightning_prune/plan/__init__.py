"""The plan: which channels of every group are kept. Masking, reconstruction and loading consume nothing else.

Here: plans, their files, changing them by layer, and going on with one on a model that is smaller already. Not here:
choosing (selection/), carrying them out (reconstruction/).
"""

from lightning_prune.plan.basis import Basis
from lightning_prune.plan.counting import filters_masked
from lightning_prune.plan.group_plan import Coupling, GroupPlan, check_coupling
from lightning_prune.plan.plan import FORMAT, Plan
from lightning_prune.plan.regrouping import groups_left, in_dense_groups, keeping_fixed

__all__ = [
    "FORMAT",
    "Basis",
    "Coupling",
    "GroupPlan",
    "Plan",
    "check_coupling",
    "filters_masked",
    "groups_left",
    "in_dense_groups",
    "keeping_fixed",
]
