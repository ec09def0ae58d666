"""What the README and docs/tasks.md show runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", ROOT.joinpath(page).read_text("utf-8"), re.DOTALL)


BLOCKS = blocks("README.md")


def test_there_are_examples() -> None:
    assert len(BLOCKS) == 2


@pytest.mark.parametrize("block", BLOCKS, ids=["lightning", "functions"])
def test_example_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), namespace)
    if "prune" in namespace:
        assert "max_rel_error" in capsys.readouterr().out
        assert namespace["prune"].reconstruction.lossless.passed
    else:
        assert sum(p.numel() for p in namespace["fresh"].parameters()) < 6e6


@pytest.mark.parametrize("block", blocks("docs/tasks.md"), ids=["segmentation", "detection", "voc"])
def test_an_example_of_the_tasks_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    exec(compile(block, "docs/tasks.md", "exec"), namespace)
    if "prune" in namespace:
        assert namespace["prune"].reconstruction.lossless.passed
    if "save_darknet_weights" in namespace:
        assert 0 < Path("pruned.weights").stat().st_size < 0.5 * Path("tiny.weights").stat().st_size
    if "VOCDetection" in namespace:
        assert namespace["images"].shape == (2, 3, 64, 64)
