"""The points of a measurement in a file, each as soon as it is known, so that nothing is measured twice."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_prune.errors import SensitivityError, first_line
from lightning_prune.files import append_line, write_text

FORMAT = "lightning-prune-sensitivity/1"
DENSE = ""  # the name that no group has
Key = tuple[str, int]  # a group, and how many of its channels are masked


class Journal:
    """A line of settings, then a line per value, of JSON; what a killed run left of its last line does not count.

    Args:
        path: file; made if it is not there. None: nothing is kept.
        settings: plain data that the values depend on; a file of others is refused.

    Attributes:
        values: those known so far; NaN where a metric was no finite number.

    Raises:
        SensitivityError: the file is damaged, or of other settings.
        PruningError: it cannot be written.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.values: dict[Key, float] = {}
        if path is None:
            return
        if path.exists():
            self._read(path, json.loads(json.dumps(settings)))
            return
        write_text(path, f"{json.dumps({'format': FORMAT, 'settings': settings})}\n")

    def add(self, key: Key, value: float) -> float:
        """Keep a value, which is returned."""
        value = float(value) if math.isfinite(value) else math.nan
        self.values[key] = value
        if self.path is not None:
            group, removed = key
            kept = None if math.isnan(value) else value
            append_line(self.path, json.dumps({"group": group, "removed": removed, "value": kept}))
        return value

    def _read(self, path: Path, settings: Mapping[str, Any]) -> None:
        remedy = "name another file, or delete it to measure anew"
        try:
            header, *lines = path.read_bytes().decode().split("\n")[:-1]  # behind the last line break: a part of a line
            found = json.loads(header)
            if found["format"] != FORMAT:
                raise ValueError(f"format {found['format']!r}, not {FORMAT!r}")
            known = found["settings"]
            for line in lines:
                row = json.loads(line)
                self.values[str(row["group"]), int(row["removed"])] = _value(row["value"])
        except OSError as error:
            raise SensitivityError(f"cannot read {path}: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise SensitivityError(
                f"{path} holds no sensitivities, or is damaged ({first_line(error)}); {remedy}"
            ) from error
        others = sorted(name for name in {*known, *settings} if known.get(name) != settings.get(name))
        if others:
            raise SensitivityError(f"{path} was measured with other settings ({', '.join(others)}); {remedy}")


def _value(kept: Any) -> float:
    if kept is None:
        return math.nan
    if isinstance(kept, bool) or not isinstance(kept, (int, float)) or not math.isfinite(kept):
        raise ValueError(f"{kept!r} is no value of a metric")
    return float(kept)
