"""How well a latency table foretells whole networks: measured time over the sum of the table's layers.

Run from the repository's root on an idle machine: ``python -m benchmarks.table_fidelity``. Tables are made anew, for
every network and engine; then the dense network and some pruned ones, of even and of odd widths, take turns. The sum
leaves out what lies between the layers, so that the ratio need not be 1; what counts is that it is the same at all
widths: its spread is what a selection by table can be off after one measurement of the dense network. Networks are
timed as the table is: the lower decile over the rounds.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import numpy as np
import torch
from torch import nn
from torchvision import models as zoo

import lightning_prune as lp
from lightning_prune.measure import Latency, LatencyTable, compare_latency, layer_calls, make_table, thread_count

# (share of channels removed, what widths are multiples of)
CUTS = ((0.2, 1), (0.3, 8), (0.4, 16), (0.5, 1), (0.5, 4), (0.6, 2), (0.7, 1), (0.7, 8), (0.8, 8))


def main(argv: list[str] | None = None) -> None:
    """Make tables, prune, time, print."""
    options = _options(argv)
    found = []
    for name in options.models:
        torch.manual_seed(0)
        images = torch.randn(1, 3, options.size, options.size)
        dense = zoo.get_model(name, weights=None).eval()
        nets = pruned(dense, images)
        for engine in options.engines:
            started = time.perf_counter()
            table = make_table(dense, images, engine=engine, threads=options.threads, graph=lp.trace(dense, images))
            seconds = time.perf_counter() - started
            points = sum(each.milliseconds.size for of in table.layers.values() for each in of.surfaces)
            print(f"\n{name}, {engine}, {options.threads} threads: {points} points in {seconds:.0f} s")
            with thread_count(options.threads):
                timed = {key: (net, images) for key, net in nets.items()}
                latency = compare_latency(timed, engine=engine, repeats=options.repeats)
            rows = {key: (_decile(latency[key]), summed(table, net, images)) for key, net in nets.items()}
            ratios = [measured / total for measured, total in rows.values()]
            for key, (measured, total) in rows.items():
                print(f"  {key:24} measured {measured:8.3f} ms   table {total:8.3f} ms   ratio {measured / total:.3f}")
            spread = pstdev(ratios) / mean(ratios)
            print(f"  ratio {mean(ratios):.3f}, spread {100 * spread:.1f} %, {min(ratios):.3f} to {max(ratios):.3f}")
            row = {"model": name, "engine": engine, "seconds": seconds, "points": points, "ratios": ratios}
            found.append({**row, "spread": spread, "machine": dict(table.machine), "versions": dict(table.versions)})
    if options.out:
        options.out.write_text(json.dumps(found, indent=1), encoding="utf-8")


def _decile(latency: Latency) -> float:
    return float(np.percentile(latency.samples, 10))


def pruned(dense: nn.Module, images: Any) -> dict[str, nn.Module]:
    """The dense network and pruned ones, by random scores: alike in every layer, and most uneven."""
    graph = lp.trace(dense, images)
    nets = {"dense": dense}
    for number, (share, multiple) in enumerate(CUTS):
        for how, selection in (("even", lp.LayerRatio), ("uneven", lp.GlobalRatio)):
            random = torch.Generator().manual_seed(number)
            # Some groups score higher as a whole, and so keep more of their channels.
            scores = {
                group.name: torch.rand(group.size, generator=random) * (0.5 + torch.rand(1, generator=random))
                for group in graph.groups
            }
            plan = selection(share, round_to=multiple, min_channels=4).select(graph, scores)
            nets[f"{share} {how}, round to {multiple}"] = lp.reconstruct(dense, graph, plan)
    return nets


def summed(table: LatencyTable, net: nn.Module, images: Any) -> float:
    """Milliseconds of all layers, by the table."""
    return sum(float(table.time(call.kind, *call.channels)) for call in layer_calls(net, images))


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=["resnet18", "resnet50", "mobilenet_v2"])
    parser.add_argument("--engines", nargs="+", default=["onnxruntime", "openvino"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
