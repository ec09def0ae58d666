"""Two processes measure segmentation and detection as one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.scripts.task_processes import main

ROOT = Path(__file__).parents[2]


def test_two_processes_measure_as_one(tmp_path):
    command = [sys.executable, "-m", "tests.scripts.task_processes", str(tmp_path), "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads((tmp_path / "2.json").read_text())
    for name, one in main(tmp_path, 1).items():
        assert two[name] == pytest.approx(one, nan_ok=True), name
        assert len({round(value, 6) for value in one.values()}) > 3, name
