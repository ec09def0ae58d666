"""What a file of a latency table holds: plain data, read by `lightning_prune.measure.LatencyTable`."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

FORMAT, VERSION = "lightning-prune latency table", 1


def table_data(
    layers: list[dict[str, Any]],
    engine: str,
    settings: str,
    machine: dict[str, Any],
    threads: int,
    versions: dict[str, str],
    whole_ms: float | None = None,
) -> dict[str, Any]:
    """A table made now."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "engine": engine,
        "settings": settings,
        "machine": machine,
        "threads": threads,
        "versions": versions,
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "whole_ms": whole_ms,
        "layers": layers,
    }
