"""What a pruning run measured, as plain data."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from lightning_prune.errors import PruningError

if TYPE_CHECKING:
    from lightning_prune.reconstruction import LosslessReport

DENSE = "dense"
"""Name of the state of a model before pruning."""
MASKED = "masked"
"""Name of the state of a model whose removed channels are zero."""
RECONSTRUCTED = "reconstructed"
"""Name of the state of a model without them."""
FINE_TUNED = {"A": "fine-tuned (order A)", "B": "fine-tuned (order B)"}
"""Names of the two states after fine-tuning."""


def plain(value: Any) -> Any:
    """Reduce to what JSON knows: lists for tuples, names for NaN and infinities, numbers for scalars, else text."""
    text = json.dumps(value, default=lambda other: other.item() if getattr(other, "ndim", None) == 0 else str(other))
    return json.loads(text, parse_constant=lambda name: str(float(name)))


@dataclass(frozen=True)
class StageResult:
    """One state of the model and all that was measured of it; `None` is what was not.

    Attributes:
        name: "dense", "masked", "reconstructed", "fine-tuned (order A)" or "fine-tuned (order B)".
        accuracy: 0 to 1.
        metric: what `accuracy` is.
        params: number of trainable parameters.
        flops: per image, by the name of the convention that counted them.
        latency_ms: median of one forward.
        latency_iqr_ms: distance between its quartiles.
        epoch_seconds: wall time of one training epoch, evaluation apart.
        eval_seconds: wall time of one evaluation.
        size_bytes: of the saved weights.
    """

    name: str
    accuracy: float | None = None
    metric: str = "accuracy"
    params: int | None = None
    flops: dict[str, float] = field(default_factory=dict)
    latency_ms: float | None = None
    latency_iqr_ms: float | None = None
    epoch_seconds: float | None = None
    eval_seconds: float | None = None
    size_bytes: int | None = None


@dataclass(frozen=True)
class EpochRecord:
    """One epoch of fine-tuning; `elapsed_seconds` counts from when pruning began."""

    epoch: int
    train_seconds: float
    eval_seconds: float
    elapsed_seconds: float
    accuracy: float | None = None


@dataclass(frozen=True)
class OrderTiming:
    """Fine-tuning in order "A" (before reconstruction) or "B" (after it), epoch by epoch."""

    order: str
    epochs: tuple[EpochRecord, ...] = ()

    def __post_init__(self) -> None:
        if self.order not in FINE_TUNED:
            raise PruningError(f"the order must be 'A' or 'B', got {self.order!r}")

    @property
    def epoch_seconds(self) -> float | None:
        """Median wall time of one training epoch, evaluation apart."""
        return median(record.train_seconds for record in self.epochs) if self.epochs else None


@dataclass(frozen=True)
class KeptChannels:
    """Channels of one layer in the dense and in the reconstructed model, and the group it belongs to.

    Attributes:
        layer: module path.
        dense: how many it had.
        kept: how many are left.
        group: names of its groups.
        keep: the old numbers of those that are left, in their new order; empty if only their count is known.
    """

    layer: str
    dense: int
    kept: int
    group: str = ""
    keep: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.kept <= self.dense:
            raise PruningError(f"{self.layer}: cannot have kept {self.kept} of {self.dense} channels")
        keep = self.keep
        if keep and (len(keep) != self.kept or list(keep) != sorted({*keep}) or keep[0] < 0 or keep[-1] >= self.dense):
            raise PruningError(
                f"{self.layer}: the kept channels are not {self.kept} ascending numbers below {self.dense}"
            )


@dataclass(frozen=True)
class Predictions:
    """What one state of the model finds on a few images, drawn on them.

    Attributes:
        name: of the stage, or "truth".
        images: JPEG files in base64, the same images in the same order for all.
    """

    name: str
    images: tuple[str, ...] = ()


@dataclass(frozen=True)
class PruneReport:
    """All that a pruning run has to tell.

    Ratios compare with the stage "dense"; they are `None` where one side was not measured.

    Attributes:
        title: one line.
        settings: criterion, ratio, coupling, seed, versions, threads, machine; reduced to plain data.
        stages: in the order in which they are shown.
        timings: order A and order B.
        layers: in the order of the network.
        losslessness: masked against reconstructed.
        notes: sentences for the reader.
        convention: which of the stages' FLOPs are shown.
        device: what the latency was measured on.
        predictions: drawn on images of the test part.
        dense_validation: the dense model's metric on the validation part, as the epochs of the timings have it.
        changed_predictions: how many differ between masked and reconstructed, and how many were compared.

    Raises:
        PruningError: two stages of one name, or stages whose FLOPs lack the convention.

    Example:
        >>> stages = StageResult("dense", params=400), StageResult("reconstructed", params=100)
        >>> report = PruneReport("demo", stages=stages)
        >>> report.params_cut
        4.0
        >>> report.to_dict()["stages"][1]["params"]
        100
    """

    title: str
    settings: dict[str, Any] = field(default_factory=dict)
    stages: tuple[StageResult, ...] = ()
    timings: tuple[OrderTiming, ...] = ()
    layers: tuple[KeptChannels, ...] = ()
    losslessness: LosslessReport | None = None
    notes: tuple[str, ...] = ()
    convention: str = "flops2"
    device: str = "CPU"
    predictions: tuple[Predictions, ...] = ()
    dense_validation: float | None = None
    changed_predictions: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", plain(self.settings))
        for what, names in (("stage", [s.name for s in self.stages]), ("order", [t.order for t in self.timings])):
            if len(set(names)) < len(names):
                raise PruningError(f"every {what} can be reported once, got {', '.join(names)}")
        for stage in self.stages:
            if stage.flops and self.convention not in stage.flops:
                raise PruningError(
                    f"{stage.name} has no FLOPs by the convention {self.convention!r}, only by {', '.join(stage.flops)}"
                )

    @property
    def metric(self) -> str:
        """What the stages' `accuracy` is."""
        return " / ".join(dict.fromkeys(stage.metric for stage in self.stages)) or "accuracy"

    def stage(self, name: str) -> StageResult:
        """The stage of that name; one without measurements where it is missing."""
        return next((stage for stage in self.stages if stage.name == name), StageResult(name))

    def flops(self, stage: StageResult) -> float | None:
        """FLOPs of a stage by the convention of this report."""
        return stage.flops.get(self.convention)

    @property
    def epoch_speedup(self) -> float | None:
        """How many times faster an epoch is in order B than in order A."""
        return ratio(self.stage(FINE_TUNED["A"]).epoch_seconds, self.stage(FINE_TUNED["B"]).epoch_seconds)

    @property
    def params_cut(self) -> float | None:
        """How many times fewer parameters the reconstructed model has."""
        return ratio(self.stage(DENSE).params, self.stage(RECONSTRUCTED).params)

    @property
    def flops_cut(self) -> float | None:
        """How many times fewer FLOPs the reconstructed model needs."""
        return ratio(self.flops(self.stage(DENSE)), self.flops(self.stage(RECONSTRUCTED)))

    @property
    def latency_gain(self) -> float | None:
        """How many times faster a forward of the reconstructed model is."""
        return ratio(self.stage(DENSE).latency_ms, self.stage(RECONSTRUCTED).latency_ms)

    @property
    def accuracy_change(self) -> float | None:
        """Points of accuracy (per cent) won by pruning and fine-tuning in order B, else in order A."""
        before, (a, b) = self.stage(DENSE).accuracy, (self.stage(name).accuracy for name in FINE_TUNED.values())
        after = a if b is None else b
        return None if before is None or after is None else 100 * (after - before)

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists, numbers and text, ready for strict JSON."""
        data, found = dataclasses.asdict(self), self.losslessness
        changed, total = data.pop("changed_predictions")
        if found is not None:
            errors = {name: getattr(found, name) for name in ("max_abs_error", "max_rel_error", "dtype", "passed")}
            data["losslessness"] = {**errors, "changed": changed, "total": total}
        return dict(plain(data))


def ratio(before: float | None, after: float | None) -> float | None:
    """`before / after`, or `None` where one is missing or nothing remains."""
    return before / after if before is not None and after else None
