"""What layer norms leave to be pruned, family by family; what pruning under them costs on a real task.

Run from the repository's root: ``python -m benchmarks.layer_norm families`` (three minutes; timm and transformers where
they are installed), ``python -m benchmarks.layer_norm accuracy --data runs/data/letters`` (fifteen minutes on one
thread). Rows that ``--rows`` holds already are not measured again, but with ``--redo``; ``--out`` is written from all.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks.layer_norm.accuracy import BUDGETS, CRITERIA, Letters, network, pruned
from benchmarks.layer_norm.families import FAMILIES, Row, family
from lightning_prune.measure import count_params
from lightning_prune.report.table import MISSING, Table


class Rows:
    """Rows by key, the last one of each; on disk as soon as they are measured."""

    def __init__(self, path: Path, *, redo: bool = False) -> None:
        self.path, self.redo = path, redo
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        self.found: dict[str, Row] = {row["key"]: row for row in map(json.loads, lines)}

    def measure(self, key: str, function: Callable[[], Row]) -> None:
        """Unless the row is there."""
        if self.redo or key not in self.found:
            self.found[key] = {"key": key, **function()}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(self.found[key]) + "\n")
            print(json.dumps(self.found[key]), flush=True)


def measure_families(rows: Rows, only: str) -> None:
    """One row per family whose library is installed."""
    for name, build in FAMILIES.items():
        if only in name:
            try:
                rows.measure(f"family {name}", lambda build=build: family(build))
            except ImportError as error:
                print(f"{name}: {error}")


def measure_accuracy(rows: Rows, options: argparse.Namespace) -> None:
    """The dense network's row and one per criterion, budget and way."""
    letters, dense = Letters.read(options.data), network()
    weights = options.weights
    if weights.exists():
        dense.load_state_dict(torch.load(weights, weights_only=True))
    else:
        letters.fit_(dense, options.epochs, 3e-3, seed=0)
        weights.parent.mkdir(parents=True, exist_ok=True)
        torch.save(dense.state_dict(), weights)

    def tune(model: nn.Module) -> list[float]:
        copies = [copy.deepcopy(model) for _ in range(options.seeds)]
        return [letters.accuracy(letters.fit_(one, options.tune_epochs, 1e-3, 1 + n)) for n, one in enumerate(copies)]

    shown = {"train": len(letters.train[0]), "test": len(letters.test[0]), "params": count_params(dense)}
    shown |= {"epochs": options.epochs, "tune_epochs": options.tune_epochs, "seeds": options.seeds}
    rows.measure("dense", lambda: {**shown, "pruned": letters.accuracy(dense), "tuned": tune(dense)})
    for criterion in options.criteria:
        for flops in options.budgets:
            for way, lossy in (("exact", False), ("statistics", True)):
                what = {"criterion": criterion, "budget": flops, "way": way}
                rows.measure(
                    f"accuracy {criterion} {flops} {way}",
                    lambda what=what, lossy=lossy: (
                        what | pruned(letters, dense, tune, what["criterion"], what["budget"], lossy=lossy)
                    ),
                )


def page(found: dict[str, Row]) -> str:
    """Both tables as Markdown."""
    parts = ["# Layer norm over the residual width"]
    families = {key.removeprefix("family "): row for key, row in found.items() if key.startswith("family ")}
    if families:
        parts += [FAMILIES_TEXT, family_table(families).markdown()]
    if "dense" in found:
        dense, others = found["dense"], [row for key, row in found.items() if key.startswith("accuracy ")]
        parts += [ACCURACY_TEXT.format(**dense), accuracy_table(dense, others).markdown()]
    return "\n\n".join(parts) + "\n"


FAMILIES_TEXT = """\
`python -m benchmarks.layer_norm families`: random weights, one image of 224 pixels. Percent of parameters / FLOPs that
go when every prunable group loses half of its channels, and at the most (one channel of each is left): exactly and with
`statistics=True`. Error: with half removed, in float64, to the masked model; with `statistics=True` to the masked model
whose norms count the remaining channels only, so that nothing else has changed (\u2013: another statistic is given up
too, or nothing goes). Whole: with `statistics=True`, why the largest group that cannot be pruned cannot."""
ACCURACY_TEXT = """\
`python -m benchmarks.layer_norm accuracy --data runs/data/letters`: a ConvNeXt of torchvision (widths 24, 48, 96;
{params:,} parameters) and {train:,} handwritten letters of EMNIST, 26 classes, {epochs} epochs; `lp.Budget(flops=...)`.
Percent of {test:,} test letters; tuned: {tune_epochs} more epochs, mean and standard deviation of {seeds} seeds, those
same of all rows. Widths: what remains of 24, 48, 96. Error: reconstructed against masked in float64."""


def family_table(families: dict[str, Row]) -> Table:
    """Shares that go."""
    titles = "family;M params;exactly: half;most;error;statistics=True: half;most;error;whole".split(";")
    rows = []
    for name, row in families.items():
        cells = []
        for way in ("exact", "statistics"):
            cells += [_shares(row[f"{way} half"]), _shares(row[f"{way} most"]), _error(row.get(f"{way} error"))]
        rows.append(
            (name, f"{row['params'] / 1e6:.1f}", *cells, re.sub(r" (at|around) '.*", "", row["whole"]) or MISSING)
        )
    return Table.of(titles, rows)


def accuracy_table(dense: Row, others: list[Row]) -> Table:
    """Before and after fine-tuning."""
    titles = "pruned;criterion;FLOPs left;parameters left;widths;error;masked;reconstructed;tuned".split(";")
    nothing = [MISSING] * 2
    rows = [("dense", MISSING, "1.00", "1.00", "24, 48, 96", *nothing, f"{dense['pruned']:.2f}", _spread(dense))]
    for row in others:
        way = "exactly" if row["way"] == "exact" else "`statistics=True`"
        if "refused" in row:
            rows.append((way, row["criterion"], f"{row['budget']:.2f}: cannot be met", *nothing * 3))
            continue
        shares = (f"{row[name]:.2f}" for name in ("flops", "params"))
        accuracies = (f"{row[name]:.2f}" for name in ("masked", "pruned"))
        widths = ", ".join(map(str, row["widths"]))
        rows.append((way, row["criterion"], *shares, widths, _error(row["error"]), *accuracies, _spread(row)))
    return Table.of(titles, rows)


def _shares(pair: list[float]) -> str:
    return " / ".join(f"{100 * share:.0f}" if share < 0.995 else "> 99" for share in pair)


def _error(value: float | None) -> str:
    if value is None:
        return MISSING
    return f"{value:.0e}" if value < 1e-3 else f"{value:.2f}"


def _spread(row: Row) -> str:
    tuned = row["tuned"]
    return f"{statistics.fmean(tuned):.2f}" + (f" ± {statistics.stdev(tuned):.2f}" if len(tuned) > 1 else "")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("families", "accuracy", "page"))
    parser.add_argument("--rows", type=Path, default=Path("benchmarks/results/layer_norm.jsonl"))
    parser.add_argument("--redo", action="store_true")
    parser.add_argument("--weights", type=Path, default=Path("runs/layer_norm_dense.pt"), help="of the dense network")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/layer_norm.md"))
    parser.add_argument("--only", default="", help="families whose name contains this")
    parser.add_argument("--data", type=Path, default=Path("runs/data/letters"), help="EMNIST Letters as four IDX files")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--tune-epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3, help="of fine-tuning")
    parser.add_argument(
        "--budgets", type=float, nargs="*", default=list(BUDGETS), help="shares of the FLOPs that remain"
    )
    parser.add_argument("--criteria", nargs="*", default=list(CRITERIA))
    options = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    rows = Rows(options.rows, redo=options.redo)
    if options.part == "families":
        measure_families(rows, options.only)
    elif options.part == "accuracy":
        measure_accuracy(rows, options)
    options.out.write_text(page(rows.found), "utf-8")


if __name__ == "__main__":
    main()
