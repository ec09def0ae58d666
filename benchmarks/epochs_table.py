"""The table of `benchmarks.epochs`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]

SAME = ("device", "torch", "precision", "max_pool", "round_to")  # of a table
HEADERS = (
    "net", "batch", "engine", "model", "images/s", "ms a step", "dense / it", "FLOPs dense / it", "operators",
    "kernels", "GPU busy", "launch-bound",
)  # fmt: skip
LAUNCH_BOUND = 0.25  # of what the batch grows by, the time grows by less than this


def render(rows: Iterable[Row]) -> str:
    """Markdown; of rows measured twice the later one counts."""
    known = {_key(row): row for row in rows}
    tables: dict[tuple[Any, ...], list[Row]] = {}
    for row in known.values():
        tables.setdefault(tuple(row[name] for name in SAME), []).append(row)
    parts = [
        "# Epochs of dense, masked and reconstructed ResNets\n\n"
        "Made by `python -m benchmarks.epochs`, whose help says how it measures. Dense / it: how many times faster than"
        " the dense model on the same engine. Launch-bound: from the next smaller batch (the smallest: to the next "
        f"larger) time grows by less than {LAUNCH_BOUND:.0%} of what the batch grows by, so fewer FLOPs make nothing "
        "faster.\n"
    ]
    for (device, torch, precision, max_pool, round_to), table in tables.items():
        stem = "" if max_pool else ", no pooling after the stem"
        multiples = "" if round_to == 1 else f", channels in multiples of {round_to}"
        parts.append(f"\n## {device}, {precision}{stem}{multiples}\n\ntorch {torch}.\n\n{_line(HEADERS)}")
        parts.append(_line(["---"] * 4 + ["---:"] * (len(HEADERS) - 4)))
        parts += [_line(_cells(row, known)) for row in sorted(table, key=_order)]
    return "".join(parts)


def launch_bound(row: Row, rows: Iterable[Row]) -> bool | None:
    """Whether time hardly grows with the batch; None if no other batch size of the same model was measured."""
    times = {other["batch"]: other["step_ms"] for other in rows if "step_ms" in other and _alike(row, other)}
    smaller = [batch for batch in times if batch < row["batch"]]
    larger = [batch for batch in times if batch > row["batch"]]
    if row["batch"] not in times or not (smaller or larger):
        return None
    low, high = (max(smaller), row["batch"]) if smaller else (row["batch"], min(larger))
    return times[high] / times[low] - 1 < LAUNCH_BOUND * (high / low - 1)


def _cells(row: Row, known: dict[tuple[Any, ...], Row]) -> list[str]:
    ratio = f" {row['ratio']:g}" if row["ratio"] else ""
    names = [row["net"], str(row["batch"]), row["engine"], f"{row['model']}{ratio}"]
    if "error" in row:
        return [*names, row["error"].replace("|", "\\|"), *[""] * (len(HEADERS) - 5)]
    dense = known.get(_key({**row, "model": "dense", "ratio": 0.0}), {})
    faster = f"{dense['step_ms'] / row['step_ms']:.2f}" if "step_ms" in dense else ""
    flops = f"{dense['flops'] / row['flops']:.2f}" if "flops" in dense else ""
    bound = {None: "", True: "yes", False: "no"}[launch_bound(row, known.values())]
    busy = f"{row['busy']:.0%}" if "busy" in row else ""
    counts = [str(row.get(name, "")) for name in ("operators", "kernels")]
    return [*names, f"{row['images_per_second']:,.0f}", f"{row['step_ms']:.2f}", faster, flops, *counts, busy, bound]


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in (*SAME, "net", "batch", "engine", "model", "ratio"))


def _alike(row: Row, other: Row) -> bool:
    return _key({**row, "batch": 0}) == _key({**other, "batch": 0})


def _order(row: Row) -> tuple[Any, ...]:
    models = ("dense", "masked", "reconstructed")
    return row["net"], row["engine"] != "eager", row["engine"], row["batch"], models.index(row["model"]), row["ratio"]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |\n"
