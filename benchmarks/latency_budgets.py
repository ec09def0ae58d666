r"""Budgets of latency by a table: are they met, what do they save, and the ordinary search at the same time beside it.

Run from the repository's root on an idle machine, about an hour on two cores:

    python -m benchmarks.latency_budgets --models resnet50,mobilenet_v2,yolov3_tiny,yolov8_like \\
        --engines onnxruntime,openvino --budgets .75,.5,.35 --out results
    python -m benchmarks.latency_budgets --render --out results > benchmarks/results/latency_budgets.md

A latency table per model and engine goes to ``OUT``, a row per budget to ``OUT/latency_budgets.jsonl`` as soon as it is
there; what is there is not done again. Weights are random, scores are L1: times do not depend on them. Measured: the
median of three comparisons with the dense model in turns, after the selection, times the dense model's milliseconds as
the selection read them at its start; what the selection itself measured of smaller models does not count. Efficiency:
(speed-up - 1) / (FLOPs ratio - 1). Ordinary: ``Budget(latency_ms=...)`` without a table, the weakest channels over the
network.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

import lightning_prune as lp
from benchmarks.c2f_net import C2fNet
from lightning_prune.errors import PlanError
from lightning_prune.measure import LatencyTable, make_table
from lightning_prune.models import YoloV3Tiny
from lightning_prune.report.table import TIMES
from lightning_prune.selection.stopwatch import Stopwatch

MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (lambda: torchvision.models.resnet18(weights=None), 224),
    "resnet50": (lambda: torchvision.models.resnet50(weights=None), 224),
    "mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(weights=None), 224),
    "densenet121": (lambda: torchvision.models.densenet121(weights=None), 224),
    "yolov3_tiny": (lambda: YoloV3Tiny(80), 416),
    "yolov8_like": (C2fNet, 320),
}
EFFICIENCY, WITHIN = 0.6, 0.05  # to reach, of ResNet-50 the first
MEASURED = 3
Row = dict[str, Any]


def main(argv: list[str] | None = None) -> None:
    """Make tables, select, measure, write rows; or render them."""
    options = _options(argv)
    path = options.out / "latency_budgets.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
    if options.render:
        print(rendered(rows))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    done = {_key(row) for row in rows}
    with lp.measure.thread_count(options.threads) as threads:
        for name in options.models.split(","):
            for engine in options.engines.split(","):
                wanted = [float(share) for share in options.budgets.split(",")]
                size = options.size or MODELS[name][1]
                base = {"model": name, "engine": engine, "size": size, "threads": threads}
                left = [share for share in wanted if _key({**base, "share": share}) not in done]
                if left:
                    for row in _rows(base, left, options):
                        with path.open("a", encoding="utf-8") as stream:
                            stream.write(json.dumps(row) + "\n")
                        print(rendered([row]).splitlines()[-1], file=sys.stderr)


def _rows(base: Row, shares: list[float], options: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    model, images = MODELS[base["model"]][0]().eval(), torch.rand(1, 3, base["size"], base["size"])
    graph = lp.trace(model, images)
    scores = lp.score(model, graph, "l1")
    engine = base["engine"]
    table, seconds = _table(model, images, base, options.out)
    for share in shares:
        dense = Stopwatch(engine, model, images, options.repeats).dense
        row = {**base, "share": share, "dense_ms": dense, "target_ms": share * dense, "table_s": seconds}
        row["versions"] = {"torch": torch.__version__, **table.versions}
        row["load"] = os.getloadavg()[0]
        given = {"latency_ms": share * dense, "engine": engine, "repeats": options.repeats}
        about = {"model": model, "example_inputs": images}
        started = time.perf_counter()
        try:
            found = lp.Budget(**given, table=table).by_table(graph, scores, **about)
        except PlanError as error:
            yield {**row, "refused": str(error)}
            continue
        row |= {"seconds": time.perf_counter() - started, "models": found.models, "gap": found.gap}
        row["dense_ms"] = found.dense_ms  # as the selection read it: all milliseconds are relative to that
        whole = sum(float(values.clamp(min=0).sum()) for name, values in scores.items() if name in found.kept)
        row |= {"score": found.value / whole, **_costs(model, images, graph, found.plan, row, options)}
        if not options.no_ordinary:
            started = time.perf_counter()
            try:
                plan = lp.Budget(**given).select(graph, scores, **about)
            except PlanError as error:
                row["ordinary"] = {"refused": str(error)}
            else:
                spent = time.perf_counter() - started
                kept = sum(float(scores[name][list(group.keep)].sum()) for name, group in plan.groups.items())
                costs = _costs(model, images, graph, plan, row, options)
                row["ordinary"] = {"seconds": spent, "score": kept / whole, **costs}
        yield row


def _table(model: nn.Module, images: Tensor, base: Row, folder: Path) -> tuple[LatencyTable, float]:
    path = folder / f"{base['model']}_{base['size']}_{base['engine']}_{base['threads']}.table.json"
    taken = path.with_suffix(".seconds")
    if not path.exists():
        started = time.perf_counter()
        make_table(model, images, engine=base["engine"], graph=lp.trace(model, images)).save(path)
        taken.write_text(str(time.perf_counter() - started), "utf-8")
    return LatencyTable.load(path), float(taken.read_text("utf-8"))


def _costs(
    model: nn.Module, images: Tensor, graph: lp.ChannelGraph, plan: lp.Plan, row: Row, options: argparse.Namespace
) -> Row:
    """Of the reconstructed model, timed in turns with the dense one."""
    small = lp.reconstruct(model, graph, plan, example_inputs=images)
    ratios = []
    for _ in range(MEASURED):
        models = {"dense": (model, images), "small": (small, images)}
        found = lp.measure.compare_latency(models, engine=row["engine"], repeats=options.repeats)
        ratios.append(found["small"].median / found["dense"].median)
    ratio = statistics.median(ratios)
    flops = lp.measure.count_flops(model, images) / lp.measure.count_flops(small, images)
    efficiency = (1 / ratio - 1) / (flops - 1) if flops > 1 else None
    per_target = row["dense_ms"] / row["target_ms"]
    measured = {"measured_ms": ratio * row["dense_ms"], "of_target": [r * per_target for r in ratios]}
    return {**measured, "flops_ratio": flops, "speed_up": 1 / ratio, "efficiency": efficiency}


def rendered(rows: list[Row]) -> str:
    """A page."""
    lines = [
        "# Budgets of latency, met by a table",
        "",
        "`python -m benchmarks.latency_budgets` says what the columns mean. Batch 1, random weights, L1 scores.",
        "",
        "| model | engine | threads | dense (ms) | budget | target (ms) | measured (ms) | of the target | within 5 % | "
        "FLOPs | speed-up | efficiency | score kept | gap | models | time (s) | ordinary: of the target | speed-up | "
        "efficiency | score kept |",
        "| --- | --- | --: | --: | --: | --: | --: | --: | --- | --: | --: | --: | --: | --: | --: | --: | --: | --: | "
        "--: | --: |",
    ]
    return "\n".join([*lines, *map(_line, rows)])


def _line(row: Row) -> str:
    head = [row["model"], row["engine"], row["threads"], f"{row['dense_ms']:.2f}", row["share"]]
    head.append(f"{row['target_ms']:.2f}")
    if "refused" in row:
        return _cells([*head, "refused", *[""] * 13])
    of_target = statistics.median(row["of_target"])
    cells = [*head, f"{row['measured_ms']:.2f}", f"{100 * of_target:.1f} %"]
    cells.append("yes" if abs(of_target - 1) <= WITHIN else "**no**")
    cells += [*_ratios(row), f"{100 * row['score']:.1f} %", f"{100 * row['gap']:.1f} %", row["models"]]
    cells.append(f"{row['seconds']:.0f}")
    ordinary = row.get("ordinary", {})
    if "of_target" in ordinary:
        _, speed_up, efficiency = _ratios(ordinary)
        cells += [f"{100 * statistics.median(ordinary['of_target']):.1f} %", speed_up, efficiency]
        cells.append(f"{100 * ordinary['score']:.1f} %")
    else:
        cells += ["refused" if ordinary else "", "", "", ""]
    return _cells(cells)


def _ratios(row: Row) -> list[str]:
    efficiency = "" if row["efficiency"] is None else f"{row['efficiency']:.2f}"
    return [*(f"{row[name]:.2f}{TIMES}" for name in ("flops_ratio", "speed_up")), efficiency]


def _cells(cells: list[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("model", "engine", "size", "threads", "share"))


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", default="resnet50,mobilenet_v2,yolov3_tiny,yolov8_like", help="of: " + ", ".join(MODELS)
    )
    parser.add_argument("--engines", default="onnxruntime,openvino")
    parser.add_argument("--budgets", default=".75,.5,.35", help="shares of the dense model's time")
    parser.add_argument("--size", type=int, help="side of the images; default: the model's own")
    parser.add_argument("--threads", type=int, help="default: as torch is set")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--no-ordinary", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--render", action="store_true")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
