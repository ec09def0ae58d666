"""A model that becomes smaller in steps, and its channel graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from lightning_prune.errors import PlanError
from lightning_prune.graph import ChannelGraph, trace
from lightning_prune.graph.entry_points import EntryPoint, entry_points
from lightning_prune.graph.model_checks import check_traceable
from lightning_prune.measure import CostModel
from lightning_prune.model_state.preservation import copy_sharing_tensors, copy_without_masks
from lightning_prune.plan import Plan, groups_left, in_dense_groups


class TracedModel:
    """A model, its graph as it is now, and that of the dense model; each is traced when first needed.

    Args:
        model: any eager module, dense.
        example_inputs: inputs, or a function that returns them, called whenever they are needed.
        also: what else the model will run, or a function that returns it.
        statistics: see `lightning_prune.trace`.

    Attributes:
        built: the part of a plan that the model was already reconstructed with.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        also: Sequence[Any] | Callable[[], Sequence[Any]],
        statistics: bool,
    ) -> None:
        self.model = model
        self.built: Plan | None = None
        self._example_inputs, self._also, self._statistics = example_inputs, also, statistics
        self._graph: ChannelGraph | None = None
        self._dense_graph: ChannelGraph | None = None
        self._dense: nn.Module | None = None
        self._cost: CostModel | None = None

    @property
    def example_inputs(self) -> Any:
        """What the model is traced and compared on."""
        return self._example_inputs() if callable(self._example_inputs) else self._example_inputs

    @property
    def entries(self) -> list[EntryPoint]:
        """All that the model is traced and compared on."""
        return entry_points(self.example_inputs, self._also() if callable(self._also) else self._also)

    @property
    def graph(self) -> ChannelGraph:
        """Channel graph of the model as it is, its groups named as the dense model's.

        Raises:
            TraceError: the model does not run on the example inputs.
        """
        if self._graph is None:
            check_traceable(self.model)  # before copies of it are run to find what it is traced on
            known = [] if self.built is None else groups_left(self.dense_graph, self.built)
            inputs, *others = self.entries
            graph = trace(self.model, inputs.inputs, also=others, statistics=self._statistics, known=known)
            self._graph = in_dense_groups(graph, known) if known else graph
            if self._dense_graph is None:
                self._dense_graph = self._graph
            self._graph.warns_with(self._dense_graph)
        return self._graph

    @property
    def dense_graph(self) -> ChannelGraph:
        """Channel graph of the dense model.

        Raises:
            PlanError: the model was already small when it was first met.
        """
        if self._dense_graph is None and self.built is not None:
            raise PlanError("this model was loaded pruned, to be evaluated: nothing is known of its dense graph")
        return self._dense_graph or self.graph

    @property
    def dense(self) -> nn.Module:
        """What selections count: the model as long as it is dense, then a copy if one was kept."""
        return self._dense or self.model

    @property
    def met_dense(self) -> bool:
        """Whether the dense model was traced."""
        return self._dense_graph is not None

    def is_dense(self) -> bool:
        """Whether the model has the shapes of the dense graph, or was never traced."""
        try:
            self.dense_graph.check(self.model)
        except PlanError:
            return False
        return True

    def within(self, plan: Plan) -> Plan:
        """A plan of the dense model in the channels of the model as it is."""
        return plan if self.built is None else plan.within(self.built)

    def keep_dense(self) -> None:
        """Keep a copy of the dense model, which shares its tensors, before it becomes smaller."""
        if self._dense is None and self.dense_graph is self._graph:
            self._dense = copy_sharing_tensors(self.model)

    def became(self, built: Plan | None) -> None:
        """Note what the model was reconstructed with, in all; None: nothing."""
        self.built = built
        self._graph = self._dense_graph if built is None else None
        self._cost = None

    def cost(self, plan: Plan | None) -> tuple[int, int]:
        """Parameters and multiply-accumulates (per sample) that a plan of the dense model leaves."""
        if self._cost is None:
            self._cost = CostModel(copy_without_masks(self.model), self.graph, self.example_inputs)
        left = Plan({}) if plan is None else self.within(plan)
        left.check(self.graph)
        return self._cost.of(left)
