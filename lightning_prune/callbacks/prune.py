"""Scoring, masking and reconstruction in one callback."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Literal, get_args

from pytorch_lightning import Callback, LightningModule, Trainer

from lightning_prune.callbacks.masking import MaskingCallback
from lightning_prune.callbacks.random_state import RandomStateCallback
from lightning_prune.callbacks.reconstruction import ReconstructionCallback
from lightning_prune.callbacks.scoring import ScoringCallback, Start
from lightning_prune.callbacks.scoring_pass import Amount
from lightning_prune.callbacks.tracking import TrackingCallback
from lightning_prune.criteria import Criterion
from lightning_prune.criteria.scoring import Scores
from lightning_prune.errors import CallbackError
from lightning_prune.plan import Coupling
from lightning_prune.schedule import Schedule
from lightning_prune.selection import GlobalRatio, Selection

Reconstruct = Literal["before", "during", "after", "never"]


class PruneCallback(Callback):
    """Prunes a model inside ``Trainer.fit``: score, mask, reconstruct, fine-tune.

    It is a `TrackingCallback`, a `ScoringCallback`, a `MaskingCallback`, a `ReconstructionCallback` and a
    `RandomStateCallback` in one; use those for anything finer. Checkpoints carry all that is needed to resume.

    Args:
        criterion: an instance, or a name such as "jre".
        ratio: share of channels removed over the network, in [0, 1); ignored if ``selection`` is given.
        selection: for example ``Budget(flops=0.5, round_to=8)``.
        coupling: ``joint``, ``union`` or ``intersection``, see `Selection.select`.
        batch_norm: mask batch norms with their filters; False is lossy.
        schedule: remove some channels, fine-tune, score again (`Rounds`, `Gradual`, `Soft`); None: all at once.
        start: when to begin: an epoch (0: before training), or ``end``: when training is over.
        reconstruct: ``before`` fine-tuning (order B: every epoch is cheaper; after the last step of a schedule),
            ``during`` it (after every step of a schedule), ``after`` it (order A), or ``never``.
        scores: see `ScoringCallback`.
        score_batches: see `ScoringCallback`.
        score_epochs: see `ScoringCallback`.
        update_weights: see `ScoringCallback`.
        bn_mode: see `ScoringCallback`.
        example_inputs: what to trace with; None: the module's ``example_input_array``.
        statistics: see `ScoringCallback`.
        monitor: metric recorded with every epoch's wall time.
        track: log to the Trainer's loggers, see `TrackingCallback`; without loggers it does nothing.

    Attributes:
        scoring: holds ``graph`` and ``scores``.
        masking: holds ``plan``.
        reconstruction: holds ``lossless`` and ``records``; None for ``never``.

    Example:
        >>> PruneCallback("l1", ratio=0.3).masking.selection.ratio
        0.3
    """

    def __init__(
        self,
        criterion: Criterion | str = "jre",
        ratio: float = 0.5,
        selection: Selection | None = None,
        *,
        coupling: Coupling = "joint",
        batch_norm: bool = True,
        schedule: Schedule | None = None,
        start: Start = 0,
        reconstruct: Reconstruct = "before",
        scores: Scores | str | os.PathLike[str] | None = None,
        score_batches: Amount = None,
        score_epochs: int = 1,
        update_weights: bool = False,
        bn_mode: Literal["eval", "train"] = "eval",
        example_inputs: Any = None,
        statistics: bool = False,
        monitor: str | None = None,
        track: bool = True,
    ) -> None:
        if reconstruct not in get_args(Reconstruct):
            raise CallbackError(f"reconstruct must be one of {', '.join(get_args(Reconstruct))}, got {reconstruct!r}")
        self.scoring = ScoringCallback(
            criterion,
            score_batches=score_batches,
            score_epochs=score_epochs,
            update_weights=update_weights,
            bn_mode=bn_mode,
            start=start,
            scores=scores,
            example_inputs=example_inputs,
            statistics=statistics,
        )
        self.masking = MaskingCallback(
            selection if selection is not None else GlobalRatio(ratio),
            coupling=coupling,
            batch_norm=batch_norm,
            schedule=schedule,
        )
        self.reconstruction = None if reconstruct == "never" else ReconstructionCallback(reconstruct, monitor=monitor)

        self.random_state = RandomStateCallback()
        self.tracking = TrackingCallback() if track else None

    @property
    def parts(self) -> dict[str, Callback]:
        """The callbacks it is made of, in the order they run."""
        names = ("tracking", "scoring", "masking", "reconstruction", "random_state")
        return {name: part for name in names if (part := getattr(self, name)) is not None}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(other, TrackingCallback) for other in callbacks):
            self.tracking = None  # the user's own
        for part in self.parts.values():
            part.setup(trainer, pl_module, stage)

    def state_dict(self) -> dict[str, Any]:
        """The states of its parts."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        for name, part in self.parts.items():
            if state_dict.get(name):
                part.load_state_dict(state_dict[name])


def _hand_on(hook: str) -> Callable[..., None]:
    def to_every_part(self: PruneCallback, *args: Any, **named: Any) -> None:
        for part in self.parts.values():
            getattr(part, hook)(*args, **named)

    return to_every_part


for _hook in vars(Callback):
    if _hook == "teardown" or _hook.startswith("on_"):
        setattr(PruneCallback, _hook, _hand_on(_hook))
