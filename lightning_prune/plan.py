"""The plan: which channels of every group are kept. Masking, reconstruction and loading consume nothing else."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning_prune.errors import PlanError, check_choice
from lightning_prune.files import atomic, read_json

if TYPE_CHECKING:
    from lightning_prune.graph import ChannelGraph

Coupling = Literal["joint", "union", "intersection"]
FORMAT = "lightning-prune-plan/1"
MOST_CHANNELS = 1 << 24  # of a group: beyond every layer, and few enough to be listed


@dataclass(frozen=True)
class GroupPlan:
    """Kept channels of one group.

    Attributes:
        size: channels of the dense group.
        keep: channels that exist in the reconstructed model, ascending.
        layers: per member layer, the channels it keeps itself. Equal to ``keep`` when coupled jointly; a part of
            it under ``union`` (the rest are zero filters that fill the addition); possibly more under
            ``intersection``.
    """

    size: int
    keep: tuple[int, ...]
    layers: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _are_counts((self.size,)) or self.size > MOST_CHANNELS:
            raise PlanError(f"size must be a number of channels, got {self.size!r}")
        for name, kept in (("keep", self.keep), *self.layers.items()):
            if not isinstance(kept, tuple) or not _are_counts(kept):
                raise PlanError(f"{name}: kept channels must be a tuple of integers >= 0, got {kept!r}")
            if list(kept) != sorted(set(kept)) or (kept and kept[-1] >= self.size):
                raise PlanError(
                    f"{name}: kept channels must be ascending, distinct and in [0, {self.size}), got {kept}"
                )

    @property
    def removed(self) -> tuple[int, ...]:
        """Channels that the reconstructed model no longer has."""
        kept = set(self.keep)
        return tuple(channel for channel in range(self.size) if channel not in kept)


@dataclass(frozen=True)
class Plan:
    """Kept channels of every group that loses some; plain integers, so that it can be saved anywhere.

    Attributes:
        groups: by group name.
        coupling: how the layers of a group were brought together.
        batch_norm: whether batch norms are masked with their filters. False is an ablation, and lossy.

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
        return replace(self, groups=groups)

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
        with atomic(Path(path)) as stream:
            stream.write(text.encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read what `save` wrote. Whether it fits a model is checked where it is used.

        Raises:
            PlanError: there is no such file, or it holds no plan.
        """
        data = read_json(path, PlanError, "pruning plan")
        if data.get("format") != FORMAT:
            raise PlanError(f"{path} is not a pruning plan of format {FORMAT}")
        try:
            return cls.from_dict(data)
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from error


def _are_counts(values: Iterable[object]) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in values)


def check_coupling(coupling: str) -> None:
    """Refuse anything but the three couplings.

    Raises:
        PlanError: unknown coupling.
    """
    check_choice("coupling", coupling, Coupling, PlanError)
