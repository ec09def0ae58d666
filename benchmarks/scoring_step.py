"""One scoring step against one plain forward and backward, and NextLayerTaylor's memory against its chunk.

Run from the repository's root on an idle machine: ``python -m benchmarks.scoring_step``; about ten minutes. ResNet-18
for 32x32 images, batch 64. A pair is a plain step and a scoring step, one after the other; the ratio is taken pair by
pair, so that whatever else the machine does falls on both. Memory: peak resident size of a process per chunk.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import lightning_prune as lp
from benchmarks import seconds
from lightning_prune.models import resnet18

CHUNKS = (1, 8, 64, 512)
TARGET = 1.15
SLOW = {"NextLayerTaylor": 2}  # pairs that are enough for what takes many times as long


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()
    steps = _steps(options.batch)
    plain = steps.pop("plain")
    print(f"ResNet-18, batch {options.batch}, {torch.get_num_threads()} threads, {options.pairs} pairs")
    print("step                          ms (plain)   ms (scoring)   ratio: median (quartiles)")
    for name, step in steps.items():
        count = 1 + SLOW.get(name, options.pairs)  # the first one warms up
        pairs = [(seconds(plain), seconds(step)) for _ in range(count)][1:]
        low, middle, high = statistics.quantiles([scored / bare for bare, scored in pairs], n=4)
        medians = [1000 * statistics.median(times) for times in zip(*pairs, strict=True)]
        print(f"{name:<28} {medians[0]:11.1f} {medians[1]:14.1f}   {middle:.3f} ({low:.3f} to {high:.3f})")
    print(f"to reach: JRE at most {TARGET}")

    print("\nNextLayerTaylor          peak memory, MiB   above a plain step")
    base = _peak(options.batch, None)
    for chunk in CHUNKS:
        peak = _peak(options.batch, chunk)
        print(f"chunk={chunk:<18} {peak / 2**20:16.0f} {(peak - base) / 2**20:+20.0f}")


def _subject(batch: int) -> tuple[nn.Module, lp.ChannelGraph, Callable[[], torch.Tensor]]:
    torch.manual_seed(0)
    model = resnet18(max_pool=False).eval()
    images, labels = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    return model, lp.trace(model, images[:1]), lambda: F.cross_entropy(model(images), labels)


def _steps(batch: int) -> dict[str, Callable[[], object]]:
    model, graph, loss = _subject(batch)

    def plain() -> None:
        model.zero_grad()
        loss().backward()

    def scoring(criterion: lp.criteria.Criterion) -> Callable[[], object]:
        return functools.partial(lp.criteria.Scorer(model, graph, criterion).update, loss)

    def training(criterion: lp.criteria.Criterion) -> Callable[[], object]:
        scorer = lp.criteria.Scorer(model, graph, criterion)

        def step() -> None:
            scorer.begin_batch()
            plain()
            scorer.end_batch()

        return step

    return {
        "plain": plain,
        "JRE": scoring(lp.JRE()),
        "JRE while training": training(lp.JRE()),
        "LRE": scoring(lp.criteria.LRE()),
        "GRE": scoring(lp.criteria.GRE()),
        "Taylor": scoring(lp.Taylor()),
        "NextLayerTaylor": scoring(lp.criteria.NextLayerTaylor()),
    }


def _peak(batch: int, chunk: int | None) -> int:
    """Peak resident bytes of a fresh process that takes one step; None: a plain one."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak_here, batch, chunk).result()


def _peak_here(batch: int, chunk: int | None) -> int:
    model, graph, loss = _subject(batch)
    if chunk is None:
        loss().backward()
    else:
        lp.criteria.Scorer(model, graph, lp.criteria.NextLayerTaylor(chunk=chunk)).update(loss)
    # Linux's own count: getrusage would start from the parent's peak.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status["VmHWM"].split()[0])


if __name__ == "__main__":
    main()
