"""The kept channels of a whole model: plain integers, their file, and what changes them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightning_prune.errors import PlanError
from lightning_prune.files import read_json, write_text
from lightning_prune.plan.basis import Basis
from lightning_prune.plan.group_plan import Coupling, GroupPlan, check_coupling

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_prune.graph import ChannelGraph

FORMAT = "lightning-prune-plan/1"


@dataclass(frozen=True)
class Plan:
    """Kept channels of every group that loses some; plain integers, so that it can be saved anywhere.

    Attributes:
        groups: by group name.
        coupling: how the layers of a group were brought together.
        batch_norm: whether batch norms are masked with their filters. False is an ablation, and lossy.
        basis: the graph and constraints that `keep`, `remove` and `whole` go by. A selection sets it, `on` does too; it
            is in no file and no copy, and does not count when plans are compared.

    Example:
        >>> plan = Plan({"conv1": GroupPlan(4, (0, 2), {"conv1": (0, 2)})})
        >>> plan.groups["conv1"].removed
        (1, 3)
        >>> Plan.from_dict(plan.to_dict()) == plan
        True
    """

    groups: dict[str, GroupPlan]
    coupling: Coupling = "joint"
    batch_norm: bool = True
    basis: Basis | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_coupling(self.coupling)
        if self.coupling == "intersection":
            return
        for name, group in self.groups.items():
            for layer, kept in group.layers.items():
                lost = set(kept) - set(group.keep)
                if lost:
                    raise PlanError(
                        f"{layer} keeps channels {sorted(lost)[:5]} that its group {name!r} removes: that is not "
                        "lossless, and only coupling='intersection' does it"
                    )

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "basis": None}

    def __bool__(self) -> bool:
        return any(
            len(kept) < group.size for group in self.groups.values() for kept in (group.keep, *group.layers.values())
        )

    @property
    def lossless(self) -> bool:
        """Whether reconstruction equals the masked model: not where layers keep channels that the group drops."""
        return self.batch_norm and self.coupling != "intersection"

    @property
    def ratio(self) -> float:
        """Share of the planned groups' channels that the reconstructed model loses."""
        total = sum(group.size for group in self.groups.values())
        return sum(len(group.removed) for group in self.groups.values()) / total if total else 0.0

    @property
    def channels_removed(self) -> dict[str, Tensor]:
        """{group: channels that the reconstructed model no longer has}."""
        return {name: torch.tensor(group.removed, dtype=torch.int64) for name, group in self.groups.items()}

    def check(self, graph: ChannelGraph) -> None:
        """Refuse a graph that cannot carry out this plan.

        Raises:
            PlanError: unknown or unprunable group, wrong size, unknown layer, or a group that would lose all channels.
        """
        for name, planned in self.groups.items():
            group = graph.group(name)
            if not group.prunable and len(planned.keep) < planned.size:
                raise PlanError(f"group {name!r} cannot be pruned: it {group.reason}")
            if planned.size != group.size:
                raise PlanError(f"group {name!r} has {group.size} channels, the plan is for {planned.size}")
            if not planned.keep:
                raise PlanError(
                    f"the plan leaves no channel of group {name!r}; raise min_channels, lower the ratio, or use "
                    f"coupling='union' instead of {self.coupling!r}"
                )
            unknown = set(planned.layers) - {layer.name for layer in group.layers}
            if unknown:
                raise PlanError(f"group {name!r} has no layer {', '.join(sorted(unknown))}")

    def on(
        self,
        graph: ChannelGraph,
        scores: Mapping[str, Tensor] | None = None,
        *,
        min_channels: float = 1,
        round_to: int = 1,
    ) -> Plan:
        """The same plan, told its graph, so that it can be changed: for one that was loaded or written by hand.

        Args:
            graph: from `lightning_prune.trace`, of the dense model.
            scores: from `lightning_prune.score`; only ``round_to`` asks for them.
            min_channels: how many channels of a group, or which share of them, have to stay.
            round_to: kept channels are multiples of it.

        Raises:
            PlanError: the graph cannot carry out this plan.
        """
        self.check(graph)
        return replace(self, basis=Basis(graph, scores or {}, min_channels, round_to))

    def keep(self, layer: str, channels: int | Iterable[int]) -> Plan:
        """A plan in which some channels stay, whatever this one says of them; all others are as they were.

        A channel stays or goes whole: with the other layers of its group under joint coupling, and with its equal
        shares in a grouped convolution. Where kept channels have to be multiples (``round_to``), the best of the
        condemned stay as well.

        Args:
            layer: module path of a convolution or linear layer, or the name of a group (`ChannelGraph.groups`).
            channels: numbers of the layer's filters; of a group that has a name of its own, of its channels.

        Raises:
            PlanError: unknown layer or number, or a constraint that cannot be respected.

        Example:
            >>> import torch, lightning_prune as lp
            >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 1))
            >>> graph = lp.trace(model, torch.zeros(1, 3, 8, 8))
            >>> plan = lp.LayerRatio(0.5).select(graph, {"0": torch.arange(8.0)})
            >>> plan.groups["0"].keep, plan.keep("0", [0]).remove("0", range(6, 8)).groups["0"].keep
            ((4, 5, 6, 7), (0, 4, 5))
            >>> plan.whole("0").groups["0"].keep
            (0, 1, 2, 3, 4, 5, 6, 7)
        """
        return self._changed(layer, channels, stay=True)

    def remove(self, layer: str, channels: int | Iterable[int]) -> Plan:
        """A plan in which some channels go, whatever this one says of them; see `keep`.

        Under union coupling the layer loses them, and the smaller model those that its whole group loses.

        Args:
            layer: see `keep`.
            channels: see `keep`.

        Raises:
            PlanError: see `keep`; also a group that cannot be pruned, with the reason, or fewer channels than have to
                stay.
        """
        return self._changed(layer, channels, stay=False)

    def whole(self, layer: str) -> Plan:
        """A plan that removes nothing of a layer; see `keep`.

        Args:
            layer: see `keep`; also a module around some layers (``layer4``), or a pattern (``layer4.*.conv1``).

        Raises:
            PlanError: there is no such layer.
        """
        plan = self
        for name in self._based().matching(layer):
            plan = plan._changed(name, None, stay=True)
        return plan

    def _changed(self, layer: str, channels: int | Iterable[int] | None, *, stay: bool) -> Plan:
        basis, groups = self._based(), dict(self.groups)
        for group, own, found in basis.groups_of(layer, channels):
            before = groups.get(group.name)
            after = basis.changed(group, before, own, found, self.coupling, stay=stay)
            if before is not None or len(after.keep) < after.size or after.layers:
                groups[group.name] = after
            basis = basis.remembering(group.name, found, stay=stay)
        return replace(self, groups=groups, basis=basis)

    def _based(self) -> Basis:
        if self.basis is None:
            raise PlanError("this plan does not know its model's layers: call plan.on(graph) first")
        return self.basis

    def within(self, done: Plan) -> Plan:
        """The same plan in the channel numbers of a model that was already reconstructed with an earlier one.

        Args:
            done: of the same dense model; nothing that it removes may be kept here.

        Raises:
            PlanError: a channel is asked for that ``done`` has removed.

        Example:
            >>> first, both = Plan({"conv1": GroupPlan(4, (0, 2, 3))}), Plan({"conv1": GroupPlan(4, (0, 3))})
            >>> both.within(first).groups["conv1"]
            GroupPlan(size=3, keep=(0, 2), layers={})
        """
        groups = {}
        for name, group in self.groups.items():
            left = done.groups[name].keep if name in done.groups else tuple(range(group.size))
            place = {channel: position for position, channel in enumerate(left)}
            gone = [channel for channel in group.keep if channel not in place]
            if gone:
                raise PlanError(f"channels {gone[:5]} of group {name!r} are kept, but an earlier plan removed them")
            layers = {k: tuple(place[c] for c in kept if c in place) for k, kept in group.layers.items()}
            if name in done.groups and len(left) == 1 < group.size:
                continue  # the smaller model has no such group: what broadcasts has no channels to follow
            groups[name] = GroupPlan(len(left), tuple(place[channel] for channel in group.keep), layers)
        return replace(self, groups=groups, basis=None)

    def keeping(self, names: Iterable[str], before: Plan | None = None) -> Plan:
        """The plan without what it removes from some groups, which keep the channels that an earlier plan left."""
        had = {} if before is None else {name: group.keep for name, group in before.groups.items()}
        sizes = {name: self.groups[name].size for name in names}
        groups = {name: GroupPlan(size, had.get(name, tuple(range(size)))) for name, size in sizes.items()}
        return replace(self, groups={**self.groups, **groups})

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists and integers."""
        groups = {
            name: {"size": g.size, "keep": list(g.keep), "layers": {k: list(v) for k, v in g.layers.items()}}
            for name, g in self.groups.items()
        }
        return {"coupling": self.coupling, "batch_norm": self.batch_norm, "groups": groups}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        """Read what `to_dict` wrote.

        Raises:
            PlanError: the data are not a plan.
        """
        try:
            groups = {
                str(name): GroupPlan(g["size"], tuple(g["keep"]), {str(k): tuple(v) for k, v in g["layers"].items()})
                for name, g in data["groups"].items()
            }
            if not isinstance(data["batch_norm"], bool):
                raise TypeError(f"batch_norm must be true or false, got {data['batch_norm']!r}")
            return cls(groups, data["coupling"], data["batch_norm"])
        except (KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"not a pruning plan: {error!r}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON; the file appears whole or not at all.

        Raises:
            PruningError: the file cannot be written.

        Example:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     Plan({"conv1": GroupPlan(4, (0, 2))}).save(f"{folder}/plan.json")
            ...     Plan.load(f"{folder}/plan.json").groups["conv1"].keep
            (0, 2)
        """
        text = json.dumps({"format": FORMAT, **self.to_dict()})
        write_text(Path(path), text)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read what `save` wrote. Whether it fits a model is checked where it is used.

        Raises:
            PlanError: there is no such file, or it holds no plan.
        """
        data = read_json(path, PlanError, "pruning plan")
        if data.get("format") != FORMAT:
            raise PlanError(f"{path} is not a pruning plan of format {FORMAT}; name a file that Plan.save wrote")
        try:
            return cls.from_dict(data)
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from error
