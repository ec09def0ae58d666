"""Accuracy at equal measured latency: a network for CIFAR, three selections, the same fine-tuning for all.

Run from the repository's root on an idle machine; the data and the public weights lie in ../shared/data, whose README
says how to unpack them::

    python -m benchmarks.accuracy_at_latency --data /work/data --weights ../shared/data/resnet_cifar10 \
        --model resnet20 --engine onnxruntime --budgets 0.7 0.5 --seeds 0 1 2 --epochs 2 --out rows.jsonl
    python -m benchmarks.accuracy_at_latency --render rows.jsonl

The public weights are adapted to the JPEG copies first (kept beside --data, and used again). Scores of one criterion
choose the channels; per budget, a share of the dense latency as measured on the engine, every selection is brought to
that latency, from below: the latency table's (`Budget(latency_ms=, table=)`), the weakest over the network under a
budget of FLOPs, and the same ratio of every layer; the settings of the last two are found by bisection on measured
latency. ``flops_8`` and ``layers_8`` keep multiples of 8 channels, as who knows engines like these would ask for. Then
all models are timed in turns, and each is fine-tuned on the same images in the same order, and so is the dense network,
the control. Accuracies are of all 10,000 test images, which choose nothing.

Every finished part is a line of --out; the same command goes on after a kill. An idle machine of two cores takes about
38 seconds for an epoch of the dense ResNet-20 (12 of them adapt it).
"""

from __future__ import annotations

import argparse
import copy
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch

import lightning_prune as lp
from benchmarks.accuracy_at_latency.report import render
from benchmarks.accuracy_at_latency.selections import SELECTIONS, Bench
from benchmarks.cifar_training import (
    PUBLIC,
    Settings,
    accuracy,
    adapted,
    images,
    public_network,
    scoring_batches,
    train,
)
from benchmarks.rows import Row, Rows, cpu_name, read_rows
from lightning_prune.engines import engine_from

PREPARED = 5  # times that all models are prepared and timed


def main(argv: list[str] | None = None) -> None:
    """Measure what is missing, or render what was measured."""
    options = _options(argv)
    if options.render:
        rows = read_rows(options.render)
        page = options.page or options.render.with_suffix(".md")
        page.write_text(render(rows, page.with_suffix(".png")), encoding="utf-8")
        print(page)
        return
    torch.set_num_threads(options.threads)
    data = images(options.data)
    path = options.adapted or options.data / f"adapted_{options.model}.pt"
    start = partial(public_network, options.model, options.weights)
    made = adapted(PUBLIC[options.model], start, data, Settings(options.adapt_epochs, 0.05), path)
    dense = getattr(lp.models, options.model)()
    dense.load_state_dict(made["state_dict"])
    rows = Rows(options.out, _setup(options, made["made"]))
    bench = Bench.of(
        dense,
        scoring_batches(data, options.score_batches),
        options.criterion,
        size=options.batch,
        engine=options.engine,
        repeats=options.repeats,
    )
    table = options.table or options.out.with_name(
        f"table_{options.model}_{options.engine}_{options.batch}_{options.threads}.json"
    )
    cases = [(budget, kind) for budget in options.budgets for kind in options.selections]
    for budget, kind in cases:
        if rows.find(part="plan", budget=budget, selection=kind) is None:
            try:
                found = bench.chosen(kind, budget, table)
            except lp.PruningError as error:
                rows.add(part="plan", budget=budget, selection=kind, refused=str(error))
                print(f"{kind} {budget}: {error}", flush=True)
                continue
            before = accuracy(bench.small(lp.Plan.from_dict(found["plan"])), data)
            row = rows.add(part="plan", budget=budget, selection=kind, before=before, **found)
            print(_said(row, "share", "flops", "params", "before", "seconds"), flush=True)
    plans = {case: plan for case in cases if (plan := _plan(rows, *case)) is not None}
    _time(rows, bench, plans)
    if options.no_training:
        return
    settings = Settings(options.epochs, options.lr, images=options.images)
    for seed in options.seeds:
        for budget, kind in [(1.0, "dense"), *plans]:
            if rows.find(part="run", budget=budget, selection=kind, seed=seed) is None:
                model = copy.deepcopy(dense) if kind == "dense" else bench.small(plans[budget, kind])
                started = time.perf_counter()
                losses = [said["loss"] for said in train(model, data, settings, seed)]
                after, seconds = accuracy(model, data), time.perf_counter() - started
                run = {"seed": seed, "accuracy": after, "losses": losses, "seconds": seconds}
                row = rows.add(part="run", budget=budget, selection=kind, **run)
                print(_said(row, "seed", "accuracy", "seconds"), flush=True)


def _plan(rows: Rows, budget: float, kind: str) -> lp.Plan | None:
    """None for a selection that cannot come down to the budget."""
    row = rows.find(part="plan", budget=budget, selection=kind)
    assert row is not None
    return lp.Plan.from_dict(row["plan"]) if "plan" in row else None


def _time(rows: Rows, bench: Bench, plans: dict[tuple[float, str], lp.Plan]) -> None:
    """All models together, in turns, prepared anew several times: where its memory lies makes a small one faster."""
    names = [["dense", 1.0], *([kind, budget] for budget, kind in plans)]
    if rows.find(part="latency", models=names) is None:
        small = {f"{kind} {budget}": bench.small(plan) for (budget, kind), plan in plans.items()}
        found = [bench.compare({"dense 1.0": bench.dense, **small}) for _ in range(PREPARED)]
        times = {name: [of[name].median for of in found] for name in found[0]}
        milliseconds = [[median(of), (max(of) - min(of)) / 2] for of in times.values()]
        rows.add(part="latency", models=names, milliseconds=milliseconds)
        print(*(f"{name}: {median(of):.3f} ms of {of}" for name, of in times.items()), sep="\n", flush=True)


def _setup(options: argparse.Namespace, made: Row) -> Row:
    """What all rows of a page have in common."""
    names = ("model", "engine", "batch", "threads", "criterion", "epochs", "lr", "images", "score_batches")
    return {
        **{name: getattr(options, name) for name in names},
        "dense": made,
        "cpu": cpu_name(),
        "versions": {"torch": torch.__version__, **engine_from(options.engine).versions},
    }


def _said(row: Row, *names: str) -> str:
    return f"{row['selection']} {row['budget']}: " + ", ".join(f"{name} {row[name]:.4g}" for name in names)


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/data"), help="the folder that holds cifar10")
    parser.add_argument("--weights", type=Path, default=Path("../shared/data/resnet_cifar10"), help="folder or file")
    parser.add_argument("--adapted", type=Path, help="adapted weights; default: adapted_MODEL.pt in --data")
    parser.add_argument("--adapt-epochs", type=int, default=12)
    parser.add_argument("--model", choices=sorted(PUBLIC), default="resnet20")
    parser.add_argument("--engine", default="onnxruntime")
    parser.add_argument("--batch", type=int, default=1, help="images of the pass that is timed")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU, for the passes and for training")
    parser.add_argument("--repeats", type=int, default=100, help="passes timed, of each model")
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.7, 0.5], help="shares of the dense latency")
    parser.add_argument("--selections", nargs="+", choices=SELECTIONS, default=["table", "flops", "flops_8", "layers"])
    parser.add_argument("--criterion", default="taylor_fo")
    parser.add_argument("--score-batches", type=int, default=16, help="of 128 training images")
    parser.add_argument("--table", type=Path, help="the latency table; default: beside --out, made where it is missing")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=2, help="of fine-tuning")
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--images", type=int, default=0, help="of an epoch of fine-tuning; 0: all")
    parser.add_argument("--no-training", action="store_true", help="stop after the timing")
    parser.add_argument("--out", type=Path, default=Path("runs/accuracy_at_latency.jsonl"))
    parser.add_argument("--render", type=Path, metavar="ROWS", help="write the page of such a file; measure nothing")
    parser.add_argument("--page", type=Path, help="of --render; default: beside the rows")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
