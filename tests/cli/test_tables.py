"""Tables of the commands: what gives way where the terminal is narrow."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from lightning_prune.cli.tables import Head, print_table

HEADS = [Head("layer"), Head("kind", optional=True), Head("dense\nms"), Head("pruned\nms")]
ROWS = [
    ["backbone.stages.0.1.widen.conv", "Conv2d", "8.2", "1.3"],
    ["stem", "Conv2d", "1.0", "2.0"],
    ["205 other layers of the network", "", "3.0", "4.0"],
]


def printed(width: int, encoding: str = "utf-8") -> list[str]:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    print_table(Console(file=stream, width=width), HEADS, ROWS)
    stream.flush()
    return stream.buffer.getvalue().decode(encoding).splitlines()


def test_a_wide_terminal_shows_everything():
    lines = printed(80)
    assert "kind" in lines[0] + lines[1]
    assert any(line.startswith("backbone.stages.0.1.widen.conv") for line in lines)


@pytest.mark.parametrize(("encoding", "dots"), [("utf-8", "…"), ("ascii", "...")])
def test_a_narrow_one_loses_optional_columns_and_then_the_beginnings_of_paths(encoding, dots):
    lines = printed(34, encoding)
    assert max(map(len, lines)) <= 34
    assert "Conv2d" not in "\n".join(lines)
    (path,) = [line for line in lines if "widen.conv" in line]
    assert path.startswith(f"{dots}")
    assert path.split() == [path.split()[0], "8.2", "1.3"]  # in one line, with its numbers
    assert any(line.startswith("205 other") for line in lines)
