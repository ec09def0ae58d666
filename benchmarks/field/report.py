"""What the rows say: a page and a picture."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from benchmarks.field.methods import ALL, Method
from benchmarks.zoo.report import table

Row = dict[str, Any]
COLORS = {"none": "#222222", "lightning-prune": "#b2182b", "Torch-Pruning": "#2166ac"}
# ResNet-56 on the original images: accuracy before and after, times fewer MACs
PUBLISHED = (
    ("DepGraph, sparse learning", 93.53, 93.77, 2.13),
    ("DepGraph, without", 93.53, 93.46, 2.11),
    ("ResRep", 93.71, 93.71, 2.12),
    ("DepGraph, sparse learning", 93.53, 93.64, 2.57),
    ("DepGraph, without", 93.53, 93.36, 2.51),
)


class Line(NamedTuple):
    """A method at a speed-up, over its seeds."""

    name: str
    method: Method
    speed_up: float
    rows: list[Row]

    def mean(self, name: str) -> float:
        """Over the seeds."""
        return fmean(row[name] for row in self.rows)

    @property
    def deviation(self) -> float | None:
        """Of the accuracy, over the seeds."""
        return stdev(row["accuracy"] for row in self.rows) if len(self.rows) > 1 else None

    @property
    def minutes(self) -> float:
        """All that a run took of the processor, but for testing."""
        return fmean(sum(row["seconds"].values()) for row in self.rows) / 60


def render(rows: list[Row], picture: Path) -> str:
    """The page of the last set-up in the rows; the picture is written beside it."""
    if not rows:
        raise SystemExit("the file holds no rows")
    setup = rows[-1]["setup"]
    rows = [row for row in rows if row["setup"] == setup]
    controls = {line.name: line for line in _lines(rows, 1.0)}
    parts = [f"# The field's benchmark: {setup['model']} on CIFAR-10 (JPEG copies)", _intro(setup)]
    speed_ups = sorted({row["speed_up"] for row in rows} - {1.0})
    if controls and speed_ups:
        _draw(rows, controls, speed_ups, picture, setup)
        parts.append(f"![Test accuracy of every method, with its deviation over seeds]({picture.name})")
    for speed_up in speed_ups:
        lines = sorted(_lines(rows, speed_up), key=lambda line: -line.mean("accuracy"))
        parts += [f"## {speed_up:g} times fewer MACs", _table([*controls.values(), *lines], controls)]
        parts.append(_verdict(lines, controls))
    parts += [_legend(), _published(setup), _errors(rows)]
    return "\n\n".join(part for part in parts if part) + "\n"


def control_of(method: Method, controls: dict[str, Line]) -> Line | None:
    """The dense network with as many epochs and the same teacher."""
    for line in controls.values():
        if (line.method.sparse_epochs, line.method.distilled) == (method.sparse_epochs, method.distilled):
            return line
    return None


def _lines(rows: list[Row], speed_up: float) -> list[Line]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["speed_up"] == speed_up and "error" not in row:
            found.setdefault(row["method"], []).append(row)
    return [Line(name, ALL[name], speed_up, of) for name, of in found.items()]


def _intro(setup: Row) -> str:
    dense, threads = setup["dense"], setup["threads"]
    return (
        f"Dense: {dense['of']}, trained on the copies ({dense['settings']}): {dense['accuracy']:.2f} % (before: "
        f"{dense['before']:.2f} %). Then {_amount(setup)} for all alike, SGD with momentum at {setup['lr']} and a "
        f"cosine, batch {setup['batch']}{', bf16' * setup['bf16']}. Scores: {128 * setup['score_batches']} "
        f"training images. {setup['cpu']}, {threads} thread{'s' * (threads > 1)}, torch {setup['torch']}."
    )


def _amount(setup: Row) -> str:
    return f"{setup['epochs']} epochs of {setup['images'] or 50_000:,} images"


def _table(lines: list[Line], controls: dict[str, Line]) -> str:
    head = ("method", "library", "MACs", "parameters", "before", "after", "deviation", "seeds", "against its control")
    cells = []
    for line in lines:
        control = control_of(line.method, controls)
        against = ""
        if line.method.library != "none" and control is not None:
            against = f"{line.mean('accuracy') - control.mean('accuracy'):+.2f}"
        deviation = "" if line.deviation is None else f"{line.deviation:.2f}"
        library = "" if line.method.library == "none" else line.method.library
        numbers = [f"{line.mean(name):.3f}" for name in ("macs", "params")]
        numbers += [f"{line.mean(name):.2f}" for name in ("before", "accuracy")]
        cells.append([line.name, library, *numbers, deviation, str(len(line.rows)), against, f"{line.minutes:.1f}"])
    return table((*head, "minutes"), cells)


def _legend() -> str:
    return (
        "MACs and parameters: share of the dense network's. Before: accuracy once pruned, before fine-tuning. Against "
        "its control: points to the dense network with as many epochs, and the same teacher where one teaches. Sparse "
        "learning comes on top of the fine-tuning. Minutes: the processor's, of scoring, pruning and training."
    )


def _verdict(lines: list[Line], controls: dict[str, Line]) -> str:
    """The best of both libraries, with a teacher and without; of methods with several seeds, if there are any."""
    several = [line for line in lines if line.deviation is not None] or lines
    found = []
    for distilled in (False, True):
        best: dict[str, tuple[float, Line]] = {}
        for line in several:
            control = control_of(line.method, controls)
            if control is not None and line.method.distilled == distilled:
                lost = control.mean("accuracy") - line.mean("accuracy")
                best[line.method.library] = min((lost, line), best.get(line.method.library, (lost, line)), key=_first)
        if len(best) == 2:
            found.append(_compared(best, "With the dense network as teacher" if distilled else "Without a teacher"))
    return " ".join(found)


def _first(pair: tuple[float, Line]) -> float:
    return pair[0]


def _compared(best: dict[str, tuple[float, Line]], how: str) -> str:
    (ours, our), (theirs, their) = best["lightning-prune"], best["Torch-Pruning"]
    spread = max((of.deviation or 0.0) for of in (our, their))
    gain = theirs - ours
    beyond = f"{'more' if abs(gain) > spread else 'no more'} than the larger deviation ({spread:.2f})"
    beyond = beyond if spread else "of one seed each, whose spread is not known"
    return (
        f"{how} the best of lightning-prune ({our.name}) loses {ours:.2f} points to its dense control, the best of "
        f"Torch-Pruning ({their.name}) {theirs:.2f}: a difference of {gain:+.2f}, {beyond}."
    )


def _published(setup: Row) -> str:
    if setup["model"] != "resnet56":
        return ""
    cells = [
        [name, f"{of:g}", f"{before:.2f}", f"{after:.2f}", f"{after - before:+.2f}"]
        for name, before, after, of in PUBLISHED
    ]
    text = (
        "Published for ResNet-56 on the original images, with 100 epochs of fine-tuning and more (Fang et al., CVPR "
        "2023; Ding et al., ICCV 2021). None of them has a fine-tuned dense network beside it."
    )
    return f"{text}\n\n{table(('method', 'times fewer MACs', 'dense', 'pruned', 'difference'), cells)}"


def _errors(rows: list[Row]) -> str:
    found = {(row["method"], row["error"]): None for row in rows if "error" in row}
    return "\n".join(["Not done:", "", *(f"- {name}: {error}" for name, error in found)]) if found else ""


def _draw(rows: list[Row], controls: dict[str, Line], speed_ups: list[float], path: Path, setup: Row) -> None:
    from matplotlib.figure import Figure

    sets = [sorted(_lines(rows, of), key=lambda line: line.mean("accuracy")) for of in speed_ups]
    height = 1.6 + 0.24 * max(map(len, sets))
    figure = Figure(figsize=(6.2 * len(sets), height), layout="constrained")
    for axes, lines, speed_up in zip(figure.subplots(1, len(sets), squeeze=False)[0], sets, speed_ups, strict=True):
        for place, line in enumerate(lines):
            axes.errorbar(
                line.mean("accuracy"), place, xerr=line.deviation or 0.0, fmt="o", ms=5, capsize=3, lw=1.4,
                color=COLORS[line.method.library],
            )  # fmt: skip
        for line, style in zip(controls.values(), ("-", ":", "--", "-."), strict=False):
            axes.axvline(line.mean("accuracy"), color="#222222", lw=0.9, ls=style, label=line.name)
        axes.set_yticks(range(len(lines)), [line.name for line in lines], fontsize=8)
        axes.set_xlabel(f"test accuracy (%) after {_amount(setup)}")
        axes.set_title(f"{setup['model']}, {speed_up:g} times fewer MACs", fontsize=10)
        axes.grid(axis="x", alpha=0.3, lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        dots = [("lightning-prune", COLORS["lightning-prune"]), ("Torch-Pruning", COLORS["Torch-Pruning"])]
        for name, color in dots:
            axes.plot([], [], "o", color=color, label=name)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=7, frameon=False, loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=130)
