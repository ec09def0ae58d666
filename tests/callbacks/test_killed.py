"""A run that is killed again and again ends as the one that never was."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


def test_killed_at_every_moment_the_run_ends_with_the_same_weights_bit_for_bit(tmp_path: Path) -> None:
    """While scoring, masking, reconstructing, writing a checkpoint and fine-tuning; see tests/scripts/killed.py."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.scripts.killed", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    whole, broken = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("whole", "broken"))
    assert list(whole) == list(broken)
    assert all(torch.equal(value, broken[name]) for name, value in whole.items())
