"""A plan that was made before, where a selection is asked for."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, final

from typing_extensions import override

from lightning_prune.errors import PlanError
from lightning_prune.graph import Group
from lightning_prune.plan import GroupPlan, Plan
from lightning_prune.selection.base import ByLayer, Question, Selection


@final
@dataclass(repr=False, eq=False, kw_only=True)
class FixedPlan(Selection):
    """Chooses what a plan says, whatever the scores: one that was changed by hand, or made in another run.

    Wherever a selection is asked for a plan may be given, which is turned into this. Scores are still computed, and
    shown; a criterion of weights, such as "l1", takes no time.

    Attributes:
        given: the plan, also where its file was given.

    Args:
        plan: of the same dense model, or a file (`Plan.save`).
        min_channels, round_to, ignore: must be left as they are: the plan says it all.

    Raises:
        PlanError: no plan; in `select` also one of another model, or of another coupling.

    Example:
        >>> import torch, lightning_prune as lp
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> plan = lp.plan.Plan({"0": lp.plan.GroupPlan(4, (0, 3))})
        >>> lp.prune(model, torch.zeros(1, 3), selection=plan).model[0]
        Linear(in_features=3, out_features=2, bias=True)
    """

    plan: Plan | str | os.PathLike[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ignore or self.round_to != 1 or self.min_channels != 1:
            raise PlanError(
                "a plan says which channels stay; constraints do not apply: Plan.keep, Plan.whole change it"
            )
        if isinstance(self.plan, (str, os.PathLike)):
            self.plan = Plan.load(self.plan)
        if not isinstance(self.plan, Plan):
            raise PlanError(f"plan must be a Plan, or the file of one, got {self.plan!r}")

    def __repr__(self) -> str:
        plan = self.given
        return f"FixedPlan({len(plan.groups)} groups, {100 * plan.ratio:.0f} % of their channels removed)"

    @property
    def given(self) -> Plan:
        """The plan, read from its file."""
        assert isinstance(self.plan, Plan)
        return self.plan

    @override
    def _kept(self, question: Question) -> ByLayer:
        plan = self.given
        plan.check(question.graph)
        for name in ("coupling", "batch_norm"):
            asked, made = getattr(question, name), getattr(plan, name)
            if asked != made:
                raise PlanError(f"the plan was made with {name}={made!r}, and it is asked for with {name}={asked!r}")
        return {group.name: {} for group in question.groups}

    @override
    def _group_plan(self, group: Group, question: Question, kept: dict[str, Any]) -> GroupPlan:
        planned = self.given.groups.get(group.name) or GroupPlan.whole(group.size)
        own = {layer.name: planned.kept_by(layer.name) for layer in group.layers}
        return GroupPlan(group.size, planned.keep, own)


def selection_from(given: Any) -> Selection:
    """A selection as it is, a plan as one.

    Raises:
        PlanError: it is neither.
    """
    if isinstance(given, Plan):
        return FixedPlan(plan=given)
    if not isinstance(given, Selection):
        raise PlanError(f"selection must be a Selection such as GlobalRatio(0.5), got {given!r}; a Plan is taken too")
    return given
