"""What the rows say, as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import linear_regression, median

from benchmarks.zoo.report import handled, table, time_ratio, verdict
from benchmarks.zoo.runner import Row

MEDIAN, WORST, OWN_STEPS, HEAVY = 1.0, 1.5, 1.3, 12.0  # to reach
STAGES = ("trace", "score", "select", "reconstruct")
STEPS = ("trace", "score", "select", "mask", "compare")


def report(rows: list[Row], operators: list[Row]) -> str:
    """Every part of which there are rows."""
    models = sorted((row for row in rows if row["suite"] != "command"), key=lambda row: row["key"])
    commands = [row for row in rows if row["suite"] == "command"]
    revisions = ", ".join(sorted({row["revision"] for row in (*rows, *operators)}))
    parts = [
        "# Speed of the library",
        f"Measured at {revisions}; `python -m benchmarks.library_speed --help` says how.",
    ]
    parts += [_beside_peer(models), _own_steps(models), _commands(commands), _by_operators(operators)]
    return "\n\n".join(part for part in parts if part) + "\n"


def ratios(rows: Iterable[Row]) -> dict[str, float]:
    """Our seconds over the peer's, by model, where both get to the end; least first."""
    found = {row["key"]: ratio for row in rows if (ratio := time_ratio(row)) is not None}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _beside_peer(rows: list[Row]) -> str:
    found = ratios(rows)
    if not found:
        return ""
    values, above = list(found.values()), [f"{key} {ratio:.2f}" for key, ratio in found.items() if ratio > WORST]
    summary = [
        ("median", f"{median(values):.2f}", f"{MEDIAN:.1f}"),
        ("worst", f"{values[-1]:.2f}", f"{WORST:.1f}"),
        ("least", f"{values[0]:.2f}", ""),
    ]
    lines = [
        "## Beside Torch-Pruning 1.6.1",
        "![Seconds over the peer's, by model](library_speed.png)",
        f"Seconds of trace, L1 scores, selection and reconstruction over those of the peer's build and step, on the "
        f"{len(found)} models of torchvision on which the peer gets to the end.",
        table(("ratio", "found", "at most"), summary),
        f"Above {WORST}: {', '.join(above) or 'none'}.",
        _without_peer(rows),
        table(
            ("model", *STAGES, "together", "Torch-Pruning", "ratio"),
            [_peer_cells(row, found.get(row["key"])) for row in rows if verdict(row) == "pruned"],
        ),
    ]
    return "\n\n".join(line for line in lines if line)


def _without_peer(rows: list[Row]) -> str:
    failed = [row["key"] for row in rows if verdict(row) == "pruned" and not handled(row)]
    ours = [f"{row['key']} ({row['outcome']})" for row in rows if verdict(row) != "pruned"]
    text = f"Torch-Pruning does not get to the end on {', '.join(failed)}." if failed else ""
    return f"{text} This library does not on {', '.join(ours)}." if ours else text


def _peer_cells(row: Row, ratio: float | None) -> tuple[str, ...]:
    peer = row["peer"]
    stages, seconds = peer.get("ours_stages", {}), [peer.get("ours_seconds"), peer.get("seconds")]
    return row["key"], *(_seconds(stages.get(name)) for name in STAGES), *map(_seconds, seconds), _ratio(ratio)


def _own_steps(rows: list[Row]) -> str:
    found = {row["key"]: row["prune"] for row in rows if "prune" in row}
    if not found:
        return ""
    worst = max(found, key=lambda key: found[key]["ratio"])
    middle = median(pruned["ratio"] for pruned in found.values())
    cells = [
        (
            key,
            *(_seconds(pruned["steps"][name]) for name in STEPS),
            _seconds(pruned["seconds"]),
            _ratio(pruned["ratio"]),
        )
        for key, pruned in found.items()
    ]
    return "\n\n".join(
        [
            "## `prune()` beside its own steps",
            "Compare: reconstruct, and compare with the masked model in float64, at another batch and size too. "
            f"Median {middle:.2f}, worst {found[worst]['ratio']:.2f} ({worst}); at most {OWN_STEPS}.",
            table(("model", *STEPS, "prune()", "ratio"), cells),
        ]
    )


def _commands(rows: list[Row]) -> str:
    if not rows:
        return ""
    cells = [
        (f"`{row['name']}`", _seconds(row["seconds"]), "" if row["target"] is None else f"{row['target']:g}")
        for row in rows
    ]
    head = ("import, or words after lightning-prune", "seconds", "at most")
    return f"## The command line\n\n{table(head, cells)}"


def fitted(rows: list[Row]) -> tuple[float, float]:
    """Exponent, and seconds at one operator, of the line through the logarithms."""
    slope, start = linear_regression(
        [math.log(row["operators"]) for row in rows], [math.log(row["trace"]) for row in rows]
    )
    return slope, math.exp(start)


def _by_kind(rows: list[Row]) -> str:
    kinds = {row["kind"]: [other for other in rows if other["kind"] == row["kind"]] for row in rows}
    return ", ".join(
        f"{kind} {fitted(found)[0]:.2f} and {median(1e3 * row['trace'] / row['operators'] for row in found):.2f}"
        for kind, found in sorted(kinds.items())
        if len({row["operators"] for row in found}) > 1
    )


def _by_operators(rows: list[Row]) -> str:
    traced = sorted((row for row in rows if row["outcome"] == "traced"), key=lambda row: -row["trace"])
    if len(traced) < 2:
        return ""
    heavy = [f"{row['key']} {row['trace']:.1f} s" for row in traced if row["trace"] > HEAVY]
    others = [f"{row['key']}: {row['outcome'][:120]}" for row in rows if row["outcome"] != "traced"]
    cells = [
        (
            row["key"],
            row["kind"],
            str(row["operators"]),
            f"{row['trace']:.2f}",
            f"{1e3 * row['trace'] / row['operators']:.2f}",
        )
        for row in traced[:30]
    ]
    typical = median(1e3 * row["trace"] / row["operators"] for row in traced)
    return "\n\n".join(
        [
            "## A trace, by the operators of a forward",
            "![Seconds of a trace against operators](library_speed_operators.png)",
            f"{len(traced)} models; fitted exponent {fitted(traced)[0]:.2f} (1: linear), median {typical:.2f} ms an "
            f"operator; by kind {_by_kind(traced)}.",
            f"Above {HEAVY:g} s: {', '.join(heavy) or 'none'}.",
            f"Not traced: {'; '.join(others) or 'none'}.",
            "The slowest:",
            table(("model", "kind", "operators", "trace (s)", "ms an operator"), cells),
        ]
    )


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
