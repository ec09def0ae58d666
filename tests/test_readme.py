"""What the README shows runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

BLOCKS = re.findall(
    r"```python\n(.*?)```", Path(__file__).parents[1].joinpath("README.md").read_text("utf-8"), re.DOTALL
)


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
