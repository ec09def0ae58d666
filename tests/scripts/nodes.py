"""`lightning-prune` as a process of several, which may be killed at a given moment; run by tests/cli/test_nodes.py.

DIES=RANK:MOMENT python -m tests.scripts.nodes ARGUMENTS
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import lightning_prune.criteria.scoring
import lightning_prune.reconstruction.small_model
from lightning_prune.cli import main
from lightning_prune.tasks import ClassificationTask
from tests.scripts.killed import at_call

MOMENTS: dict[str, Callable[[], None]] = {
    "scoring": lambda: at_call(lightning_prune.criteria.scoring.Scorer, "update", 2),
    "reconstruction": lambda: at_call(lightning_prune.reconstruction.small_model, "cut_", 1),
    "fine-tuning": lambda: at_call(ClassificationTask, "training_step", int(os.environ.get("STEP", "6"))),
}


def arm(dies: str) -> None:
    """Once; a run that is started anew goes through."""
    rank, _, moment = dies.partition(":")
    own = os.environ.get("RANK") or os.environ.get("SLURM_PROCID")
    mark = Path(f"died-{moment}")
    if own == rank and not mark.exists():
        mark.touch()
        MOMENTS[moment]()


if __name__ == "__main__":
    if "DIES" in os.environ:
        arm(os.environ["DIES"])
    sys.exit(main(sys.argv[1:]))
