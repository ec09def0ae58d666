"""What a results file says, as Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from statistics import median
from typing import Any

from benchmarks.zoo.families import SUITES, TIMM_KINDS
from benchmarks.zoo.users import LIBRARIES

Row = dict[str, Any]
HEADER = (
    "model", "kind", "params (M)", "removed", "FLOPs (G)", "groups", "prunable", "error", "checked on", "forward",
    "trace", "plan", "rec.", "verify", "checks", "Torch-Pruning", "time ratio", "outcome",
)  # fmt: skip
ALL_SUITES = (*SUITES, *LIBRARIES)
#: Attention somewhere: hybrids and transformers.
KINDS = {"cnn": ("cnn",), "hybrid": ("hybrid",), "transformer": ("transformer",), "mlp": ("mlp",), "other": ("other",),
         "hybrid or transformer": ("hybrid", "transformer")}  # fmt: skip
LITTLE = 0.35  # share of the parameters at ratio 0.5, below which a model is named with its reasons
CHECKS = {"no_trace_left": "trace left", "copies": "copies", "train_step": "train", "export": "export"}
VACUOUS = 1e-8  # an error of 1e-10 says nothing if pruning half of all channels changes the output by less


def report(rows: Iterable[Row]) -> str:
    """Tables per suite, totals, comparison with the peer, refusals."""
    rows = sorted(rows, key=lambda row: (ALL_SUITES.index(row["suite"]), row["name"]))
    parts = ["# Zoo", totals(rows), removed(rows), sizes(rows), peer_summary(rows), problems(rows), little(rows)]
    parts += [reasons(rows), LEGEND]
    for suite in ALL_SUITES:
        of_suite = [row for row in rows if row["suite"] == suite]
        if of_suite:
            parts += [f"## {suite}", table(HEADER, [_cells(row) for row in of_suite])]
    return "\n\n".join(part for part in parts if part) + "\n"


LEGEND = (
    "How to read the tables below. Params, and FLOPs (multiply-accumulates of one image): before > after. Removed: "
    "share of the parameters. Prunable: share of the channels. Error: masked against reconstructed in float64, the "
    "largest over the inputs it was checked on (batch and size; the first was traced). Forward (two images), trace, "
    "plan (scores and selection), rec(onstruct) and verify in seconds. Checks: nothing left by the trace, copies, "
    "train step, export; what failed is named. Time ratio: trace + plan + reconstruct against Torch-Pruning's build + "
    "step."
)


def verdict(row: Row) -> str:
    """pruned, refused, wrong or error."""
    return row["outcome"].split(":")[0]


def failed_checks(row: Row) -> list[str]:
    """Checks that ran and failed."""
    return [label for name, label in CHECKS.items() if row.get(name) is not None and row[name] is not True]


def handled(row: Row) -> bool:
    """Whether the peer handles the model."""
    return (row.get("peer") or {}).get("outcome") == "handles"


def time_ratio(row: Row) -> float | None:
    """Our seconds over the peer's, where both got to the end."""
    peer = row.get("peer") or {}
    if peer.get("ours_seconds") and peer.get("seconds") and handled(row) and verdict(row) == "pruned":
        return peer["ours_seconds"] / peer["seconds"]
    return None


def totals(rows: list[Row]) -> str:
    """One line per suite, and the share of timm's families by kind."""
    parts = {suite: [row for row in rows if row["suite"] == suite] for suite in ALL_SUITES}
    parts |= {f"timm: {kind}": [row for row in parts["timm"] if row["kind"] == kind] for kind in TIMM_KINDS}
    lines = [_total(name, chosen) for name, chosen in {**parts, "all": rows}.items() if chosen]
    head = ("suite", "models", "pruned", "all checks pass", "refused", "wrong", "error", "worst error", "families")
    families = "Families: timm's model files of which every model tried was pruned and passed all checks."
    return "\n\n".join(["## Totals", table(head, lines), *([families] if parts["timm"] else [])])


def _total(name: str, rows: list[Row]) -> tuple[str, ...]:
    count = Counter(verdict(row) for row in rows)
    clean = [row for row in rows if verdict(row) == "pruned" and not failed_checks(row)]
    errors = [row["max_rel_error"] for row in rows if verdict(row) == "pruned"]
    worst = f"{max(errors):.1e}" if errors else ""
    return (
        name, str(len(rows)), str(count["pruned"]), str(len(clean)), str(count["refused"]), str(count["wrong"]),
        str(count["error"]), worst, family_share(rows) if "timm" in name else "",
    )  # fmt: skip


def family_share(rows: list[Row]) -> str:
    """Families all of whose models were pruned and passed the checks, of all families."""
    families: dict[str, bool] = {}
    for row in rows:
        fine = verdict(row) == "pruned" and not failed_checks(row)
        families[row["family"]] = families.get(row["family"], True) and fine
    return f"{sum(families.values())} / {len(families)} = {sum(families.values()) / len(families):.1%}"


def _share(row: Row) -> float:
    """Share of the parameters that went; none where the model was not pruned."""
    return row.get("removed", 0.0) if verdict(row) == "pruned" else 0.0


def removed(rows: list[Row]) -> str:
    """Share of the parameters that went, by kind."""
    lines = []
    for name, kinds in KINDS.items():
        shares = sorted(_share(row) for row in rows if row["kind"] in kinds)
        if shares:
            lines.append((name, str(len(shares)), *(f"{x:.2f}" for x in (median(shares), shares[len(shares) // 4])),
                          f"{shares[0]:.2f}", str(sum(share < LITTLE for share in shares))))  # fmt: skip
    head = ("kind", "models", "median", "lower quartile", "least", f"below {LITTLE}")
    note = "Models that were not pruned count as 0."
    return f"## Share of parameters removed\n\n{table(head, lines)}\n\n{note}" if lines else ""


def sizes(rows: list[Row]) -> str:
    """On how many inputs the models were compared."""
    checked = [row for row in rows if row["suite"] in LIBRARIES and "checked" in row]
    if not checked:
        return ""
    count = Counter(len(row["checked"]) for row in checked)
    return (
        f"## Sizes\n\nOf {len(checked)} models compared, {count[3]} take another batch and another size than was "
        f"traced, {count[2]} only one of them, {count[1]} neither. Each was compared on all that it takes; "
        f"{sum('dtype' in row for row in checked)} in float32, since the dense model does not run in float64."
    )


def little(rows: list[Row]) -> str:
    """Models that lost little, and which reasons hold how much of their parameters."""
    found = sorted((row for row in rows if verdict(row) == "pruned" and row.get("removed", 1.0) < LITTLE), key=_share)
    lines = [
        f"- {row['key']} ({row['kind']}) {row['removed']:.2f}: "
        + "; ".join(f"{share:.0%} {reason}" for reason, share in row.get("kept_by_reason", {}).items() if share >= 0.05)
        for row in found
    ]
    head = f"## Losing less than {LITTLE} of the parameters, with the share that each reason holds"
    return "\n\n".join([head, "\n".join(lines)]) if lines else ""


def peer_summary(rows: list[Row]) -> str:
    """Who handles what, and the ratio of times."""
    compared = [row for row in rows if row.get("peer")]
    if not compared:
        return ""
    mine = {row["key"] for row in compared if verdict(row) == "pruned"}
    theirs = {row["key"] for row in compared if handled(row)}
    lines = ["## Beside Torch-Pruning 1.6.1", ""]
    trained = [row["key"] for row in compared if handled(row) and row["peer"].get("train_step") is True]
    lines.append(
        f"Of {len(compared)} models this library prunes {len(mine)} without loss, Torch-Pruning handles {len(theirs)} "
        f"(the forward runs and something is gone; a train step runs too in {len(trained)})."
    )
    lines.append(f"\nOnly Torch-Pruning ({len(theirs - mine)}): {', '.join(sorted(theirs - mine)) or 'none'}")
    lines.append(f"\nOnly this library ({len(mine - theirs)}): {', '.join(sorted(mine - theirs)) or 'none'}")
    groups = {"torchvision (all three suites)": SUITES[:-1], **{suite: (suite,) for suite in SUITES}}
    ratios = []
    for name, suites in groups.items():
        found = [ratio for row in compared if row["suite"] in suites and (ratio := time_ratio(row)) is not None]
        if found:
            values = median(found), min(found), max(found)
            ratios.append((name, str(len(found)), *(f"{value:.2f}" for value in values)))
    heading = "\nSeconds of trace + plan + reconstruct over Torch-Pruning's build + step, where both finish:\n"
    return "\n".join([*lines, heading, table(("suite", "models", "median", "least", "most"), ratios)])


def problems(rows: list[Row]) -> str:
    """Models that were not pruned, checks that failed, tests without teeth."""
    lines = [
        f"- {row['key']} ({row['kind']}): {row['outcome']}" + (f"; prune(): {row['prune']}" if "prune" in row else "")
        for name in ("wrong", "error", "refused")
        for row in rows
        if verdict(row) == name
    ]
    for row in rows:
        lines += [
            f"- {row['key']}: {name} = {row[name]}" for name, label in CHECKS.items() if label in failed_checks(row)
        ]
        if verdict(row) == "pruned" and row.get("effect", 1.0) < VACUOUS:
            lines.append(f"- {row['key']}: vacuous, pruning changes the output by only {row['effect']:.1e}")
    return "## Not pruned, or a check failed\n\n" + ("\n".join(lines) or "none")


def reasons(rows: list[Row]) -> str:
    """Reasons for which groups are refused in models that can be pruned or not, most frequent first."""
    groups: Counter[str] = Counter()
    models: Counter[str] = Counter()
    for row in rows:
        for reason, count in row.get("reasons", {}).items():
            groups[reason] += count
            models[reason] += 1
    lines = [(reason, str(count), str(models[reason])) for reason, count in groups.most_common(40)]
    return "## Groups that stay, by reason\n\n" + table(("reason", "groups", "models"), lines) if lines else ""


def table(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A Markdown table, padded so that it reads as plain text too."""
    cells = [[" ".join(str(cell).replace("|", "/").split()) for cell in line] for line in (head, *lines)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    padded = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in cells]
    return "\n".join([padded[0], "| " + " | ".join("-" * max(3, width) for width in widths) + " |", *padded[1:]])


def _cells(row: Row) -> tuple[str, ...]:
    seconds, peer, ratio = row.get("seconds", {}), row.get("peer") or {}, time_ratio(row)
    flops = row.get("flops") if isinstance(row.get("flops"), list) else None
    plan = [seconds[name] for name in ("score", "select") if name in seconds]
    error = row.get("max_rel_error")
    return (
        row["name"],
        row["kind"],
        _before_after((row["params"], row["params_after"]), 1e6) if "params_after" in row else "",
        f"{row['removed']:.2f}" if "removed" in row else "",
        _before_after(flops, 1e9) if flops else "",
        f"{row['prunable_groups']}/{row['groups']}" if "groups" in row else "",
        f"{row['prunable_share']:.0%}" if "prunable_share" in row else "",
        "" if error is None else f"{error:.0e}",
        ", ".join(row.get("checked", ())),
        *(f"{seconds[name]:.2f}" if name in seconds else "" for name in ("forward", "trace")),
        f"{sum(plan):.2f}" if plan else "",
        *(f"{seconds[name]:.2f}" if name in seconds else "" for name in ("reconstruct", "verify")),
        ", ".join(failed_checks(row)) or ("ok" if "copies" in row else ""),
        str(peer.get("outcome", ""))[:40],
        "" if ratio is None else f"{ratio:.2f}",
        row["outcome"][:80],
    )


def _before_after(values: Iterable[float], unit: float) -> str:
    return " > ".join(f"{value / unit:.3g}" for value in values)
