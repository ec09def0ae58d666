"""Scoring, masking and reconstruction in one callback."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from pytorch_lightning import Callback, LightningModule, Trainer

from lightning_prune.callbacks.masking import MaskingCallback
from lightning_prune.callbacks.random_state import RandomStateCallback
from lightning_prune.callbacks.reconstruction import ReconstructionCallback
from lightning_prune.callbacks.run import twice
from lightning_prune.callbacks.scoring import ScoringCallback
from lightning_prune.callbacks.tracking import TrackingCallback
from lightning_prune.callbacks.whole_checkpoints import write_whole
from lightning_prune.criteria import Criterion
from lightning_prune.errors import CallbackError, check_choice
from lightning_prune.plan import Coupling, Plan
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
        selection: for example ``Budget(flops=0.5, round_to=8)``; or a plan of the dense model, to carry it out.
        coupling: ``joint``, ``union`` or ``intersection``, see `Selection.select`.
        batch_norm: mask batch norms with their filters; False is lossy.
        schedule: remove some channels, fine-tune, score again (`Rounds`, `Gradual`, `Soft`); None: all at once.
        reconstruct: ``before`` fine-tuning (order B: every epoch is cheaper; after the last step of a schedule),
            ``during`` it (after every step of a schedule), ``after`` it (order A), or ``never``.
        monitor: metric recorded with every epoch's wall time.
        track: log to the Trainer's loggers, see `TrackingCallback`; without loggers it does nothing.
        scoring: what else a `ScoringCallback` takes: ``start``, ``scores``, ``score_batches``, ``score_epochs``,
            ``update_weights``, ``bn_mode``, ``example_inputs``, ``statistics``, ``baseline``.

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
        selection: Selection | Plan | None = None,
        *,
        coupling: Coupling = "joint",
        batch_norm: bool = True,
        schedule: Schedule | None = None,
        reconstruct: Reconstruct = "before",
        monitor: str | None = None,
        track: bool = True,
        **scoring: Any,
    ) -> None:
        check_choice("reconstruct", reconstruct, Reconstruct, CallbackError)
        self.tracking = TrackingCallback() if track else None
        self.scoring = ScoringCallback(criterion, **scoring)
        self.masking = MaskingCallback(
            GlobalRatio(ratio) if selection is None else selection,
            coupling=coupling,
            batch_norm=batch_norm,
            schedule=schedule,
        )
        self.reconstruction = None if reconstruct == "never" else ReconstructionCallback(reconstruct, monitor=monitor)
        self.random_state = RandomStateCallback()

    @property
    def parts(self) -> dict[str, Callback]:
        """The callbacks it is made of, in the order they run."""
        names = ("tracking", "scoring", "masking", "reconstruction", "random_state")
        return {name: part for name in names if (part := getattr(self, name)) is not None}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if sum(isinstance(other, PruneCallback) for other in callbacks) > 1:
            raise CallbackError(twice(self))
        if any(isinstance(other, TrackingCallback) for other in callbacks):
            self.tracking = None  # the user's own
        write_whole(trainer)
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
        parts = list(self.parts.values())
        if hook == "on_fit_end":  # where the last step may be taken, see `PruningRun.at_last`; then it is told of
            parts.sort(key=lambda part: part is self.tracking)
        for part in parts:
            getattr(part, hook)(*args, **named)

    return to_every_part


for _hook in vars(Callback):
    if _hook == "teardown" or _hook.startswith("on_"):
        setattr(PruneCallback, _hook, _hand_on(_hook))
