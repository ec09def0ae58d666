"""Lines of a results file, of one set-up: written as soon as they are known, found again after a kill."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Rows:
    """The lines of a file that have this set-up."""

    def __init__(self, path: Path, setup: Row) -> None:
        self.path, self.setup = path, setup
        self.reread()

    def reread(self) -> None:
        """Know what others have written, too."""
        lines = read_rows(self.path) if self.path.is_file() else []
        self.rows: list[Row] = [row for row in lines if row["setup"] == self.setup]

    def find(self, **known: Any) -> Row | None:
        """The row of which this is known."""
        return next((row for row in self.rows if all(row.get(key) == value for key, value in known.items())), None)

    def add(self, **content: Any) -> Row:
        """One line more."""
        row = {"setup": self.setup, **content}
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
        return row


def read_rows(path: Path) -> list[Row]:
    """All lines of a file but those that a kill has cut off."""
    found = []
    for line in path.read_text("utf-8").splitlines():
        try:
            found.append(dict(json.loads(line)))
        except json.JSONDecodeError:
            continue
    return found


def cpu_name() -> str:
    """What /proc says, or Python."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.is_file() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
