"""What the rows say: a page and a picture."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from benchmarks.accuracy_at_latency.selections import TITLES
from benchmarks.zoo.report import table

Row = dict[str, Any]
Case = tuple[str, float]  # selection and budget
COLORS = {"table": "#b2182b", "flops": "#2166ac", "flops_8": "#67a9cf", "layers": "#666666", "layers_8": "#aaaaaa"}
MARKERS = {"table": "o", "flops": "s", "flops_8": "s", "layers": "^", "layers_8": "^"}


def render(rows: list[Row], picture: Path) -> str:
    """The page of the last set-up in the rows; the picture is written beside it."""
    if not rows:
        raise SystemExit("the file holds no rows")
    setup = rows[-1]["setup"]
    rows = [row for row in rows if row["setup"] == setup]
    times = _times(rows)
    plans = {(row["selection"], row["budget"]): row for row in rows if row["part"] == "plan" and "plan" in row}
    found: dict[Case, list[float]] = {}
    for row in sorted((row for row in rows if row["part"] == "run"), key=lambda row: row["seed"]):
        found.setdefault((row["selection"], row["budget"]), []).append(row["accuracy"])
    seeds = sorted({row["seed"] for row in rows if row["part"] == "run"})
    cases = sorted(times, key=lambda case: (-case[1], list(TITLES).index(case[0])))
    _draw(times, found, picture, setup)
    head = ("budget", "selection", "setting", "latency, ms", "+-", "of dense", "FLOPs", "parameters")
    head += ("before", *(f"seed {seed}" for seed in seeds), "mean", "deviation", "against control")
    control = found.get(("dense", 1.0), [])
    lines = [_cells(case, times, plans.get(case), found.get(case, []), control, len(seeds)) for case in cases]
    finished = sum(map(len, found.values()))
    parts = [
        f"# Accuracy at equal measured latency: {setup['model']}",
        _intro(setup),
        f"![Test accuracy against latency, a line for each selection]({picture.name})",
        table(head, lines),
        f"Runs finished: {finished} of {len(cases) * len(seeds)}. Before: accuracy once pruned, before fine-tuning. "
        "Deviation: of the seeds, the sample's. Against control: mean less that of the dense network after the same "
        "fine-tuning, in points.",
        _verdict(times, found),
        "\n".join(
            f"{TITLES[row['selection']]} at {row['budget']:g}: {row['refused']}." for row in rows if "refused" in row
        ),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _intro(setup: Row) -> str:
    dense, versions = setup["dense"], ", ".join(f"{name} {of}" for name, of in setup["versions"].items())
    count = setup["images"] or 50_000
    return (
        f"CIFAR-10 as JPEG copies. Dense: the public weights {dense['of']} ({dense['before']:.2f} % of the copies' "
        f"test images as they are), adapted to the copies ({dense['settings']}): {dense['accuracy']:.2f} %. Channels "
        f"chosen by {setup['criterion']} on {128 * setup['score_batches']} training images. Then "
        f"{setup['epochs']} epochs of "
        f"{count} images, SGD with momentum at {setup['lr']} and a cosine, batch 128, for the pruned and for the dense "
        f"network alike. Accuracy: all 10,000 test images.\n\nLatency: {setup['engine']}, batch {setup['batch']}, "
        f"{setup['threads']} threads, {setup['cpu']}; {versions}. Medians over five"
        " preparations of the medians of passes in turns, all models together, and half their range. The "
        "settings of `Budget(flops)` and `LayerRatio` (share of FLOPs, share of channels, that stays) were found by "
        "bisection on measured latency, to lie at the budget or within 5 % below."
    )


def _times(rows: list[Row]) -> dict[Case, tuple[float, float]]:
    """Median and half the range in milliseconds, of the last timing of all models together."""
    timed = [row for row in rows if row["part"] == "latency"]
    if not timed:
        raise SystemExit("nothing was timed yet: run the benchmark to the end of its selections")
    last = timed[-1]
    pairs = zip(last["models"], last["milliseconds"], strict=True)
    return {(kind, budget): (median, iqr) for (kind, budget), (median, iqr) in pairs}


def _cells(
    case: Case,
    times: dict[Case, tuple[float, float]],
    plan: Row | None,
    runs: list[float],
    control: list[float],
    seeds: int,
) -> list[str]:
    median, iqr = times[case]
    share = median / times["dense", 1.0][0]
    chosen = [f"{plan[name]:.3f}" for name in ("flops", "params")] if plan else ["1", "1"]
    mean = f"{fmean(runs):.2f}" if runs else ""
    deviation = f"{stdev(runs):.2f}" if len(runs) > 1 else ""
    gap = f"{fmean(runs) - fmean(control):+.2f}" if runs and control and case[0] != "dense" else ""
    single = [f"{value:.2f}" for value in runs] + [""] * (seeds - len(runs))
    setting = f"{plan['setting']:.3f}" if plan else ""
    setting += " ms" if case[0] == "table" else ""
    before = f"{plan['before']:.2f}" if plan else ""
    budget = f"{case[1]:g}"
    times_ = [f"{median:.3f}", f"{iqr:.3f}", f"{share:.3f}"]
    return [budget, TITLES[case[0]], setting, *times_, *chosen, before, *single, mean, deviation, gap]


def _verdict(times: dict[Case, tuple[float, float]], found: dict[Case, list[float]]) -> str:
    """Per budget, what the table gains over the best of the others, beside the spread."""
    said = []
    for budget in sorted({budget for _, budget in times if budget < 1}, reverse=True):
        runs = {kind: found.get((kind, budget), []) for kind, of in times if of == budget}
        if not all(len(values) > 1 for values in runs.values()) or "table" not in runs or len(runs) < 2:
            continue
        other = max((kind for kind in runs if kind != "table"), key=lambda kind: fmean(runs[kind]))
        gain = fmean(runs["table"]) - fmean(runs[other])
        spread = max(stdev(runs["table"]), stdev(runs[other]))
        beyond = "more" if abs(gain) > spread else "no more"
        said.append(
            f"At {budget:g} of the latency the table's selection ({times['table', budget][0]:.2f} ms) has {gain:+.2f} "
            f"points against {TITLES[other]} ({times[other, budget][0]:.2f} ms), the better of the others: {beyond} "
            f"than the larger deviation ({spread:.2f})."
        )
    return "\n".join(said)


def _draw(times: dict[Case, tuple[float, float]], found: dict[Case, list[float]], path: Path, setup: Row) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for kind in TITLES:
        points = sorted((times[case][0], found[case]) for case in found if case[0] == kind and case in times)
        if not points:
            continue
        means = [fmean(values) for _, values in points]
        bars = [stdev(values) if len(values) > 1 else 0.0 for _, values in points]
        label = f"{TITLES[kind]}, the same fine-tuning" if kind == "dense" else TITLES[kind]
        where = [latency for latency, _ in points]
        line = {"color": COLORS.get(kind, "black"), "marker": MARKERS.get(kind, "D"), "ms": 5, "lw": 1.6, "capsize": 3}
        axes.errorbar(where, means, yerr=bars, label=label, **line)
        if kind == "dense":
            axes.axhline(means[0], color="black", lw=0.7, ls=":")
    axes.set_xlabel(
        f"milliseconds per pass of {setup['batch']} image{'s' * (setup['batch'] > 1)}, {setup['engine']}, "
        f"{setup['threads']} threads"
    )
    axes.set_ylabel("test accuracy (%)")
    axes.set_title(f"{setup['model']} on CIFAR-10 (JPEG copies); bars: deviation over seeds", fontsize=10)
    axes.grid(alpha=0.3, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if found:
        axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
