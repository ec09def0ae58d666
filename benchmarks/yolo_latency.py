"""CPU latency of YOLOv3, dense and pruned, in one run, with the ratio of FLOPs beside it; YOLOv3-tiny next to it.

Run from the repository's root on an idle machine: ``python -m benchmarks.yolo_latency``. All models take turns, so that
whatever else the machine does falls on all of them alike; the medians are compared. With onnxruntime installed (``pip
install onnx onnxscript onnxruntime``) every model is exported, checked against itself, and timed there too.

Channels are chosen by random scores, ratio by ratio in every layer, groups jointly; the two last convolutions of every
head stay whole, as in Lee et al., Sensors 23(4):2102, unless ``--all-layers`` is given.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.export import load_exported
from lightning_prune.measure import Latency
from lightning_prune.models import YoloV3, YoloV3Tiny

PUBLISHED = {0.5: 3.2, 0.7: 4.3, 0.9: 8.2}  # speed-ups of the paper's Raspberry Pi
SHARE = 0.8  # of the FLOPs ratio that the speed-up should reach


def main(argv: list[str] | None = None) -> None:
    """Build, measure, print."""
    options = _options(argv)
    torch.manual_seed(0)
    images = torch.rand(1, 3, options.size, options.size)
    models = build(options)
    costs = {
        name: (lp.measure.count_params(net), lp.measure.count_flops(net, images, "paper"))
        for name, net in models.items()
    }
    timed: dict[str, tuple[nn.Module, Any]] = {name: (net, images) for name, net in models.items()}
    engines = {"torch": timed}
    if options.channels_last:
        last = {"memory_format": torch.channels_last}
        engines["torch, last"] = {
            name: (copy.deepcopy(net).to(**last), images.to(**last)) for name, net in models.items()
        }
    if not options.no_onnx and importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnxscript"):
        engines["onnxruntime"] = {
            name: (exported(net, images, options.threads), images) for name, net in models.items()
        }
    rows = []
    for engine, entries in engines.items():
        with lp.measure.thread_count(options.threads):
            latencies = lp.measure.compare_latency(entries, repeats=options.repeats)
        rows += _rows(engine, latencies, costs)
    _show(rows, options)
    if options.out:
        Path(options.out).write_text(json.dumps({"options": vars(options), "rows": rows}, indent=1), "utf-8")


def build(options: argparse.Namespace) -> dict[str, nn.Module]:
    """Dense YOLOv3, pruned at every ratio, and YOLOv3-tiny; 20 classes."""
    dense = YoloV3(20, width=options.width).eval()
    graph = lp.trace(dense, torch.rand(1, 3, 64, 64))
    scores = lp.score(dense, graph, lp.criteria.Random(seed=0) if options.criterion == "random" else lp.L1())
    ignored = () if options.all_layers else dense.predictors
    models: dict[str, nn.Module] = {"yolov3": dense}
    for ratio in options.ratios:
        selection = lp.LayerRatio(ratio, round_to=options.round_to, ignore=ignored)
        models[f"yolov3 -{ratio:.0%}"] = lp.reconstruct(dense, graph, selection.select(graph, scores))
    models["yolov3-tiny"] = YoloV3Tiny(20, width=options.width).eval()
    return models


def exported(model: nn.Module, images: Tensor, threads: int | None) -> nn.Module:
    """The model in ONNX Runtime, once the file is seen to compute the same, behind the interface of a module."""
    with tempfile.TemporaryDirectory() as folder, lp.measure.thread_count(threads):
        return load_exported(lp.export(model, images, f"{folder}/net.onnx", tolerance=1e-3, repeats=1).path)


def _rows(engine: str, latencies: dict[str, Latency], costs: dict[str, tuple[int, int]]) -> list[dict[str, Any]]:
    dense_time, dense_flops = latencies["yolov3"].median, costs["yolov3"][1]
    return [
        {
            "engine": engine,
            "model": name,
            "params": costs[name][0],
            "flops": costs[name][1],
            "ms": latency.median,
            "iqr": latency.iqr,
            "speed_up": dense_time / latency.median,
            "flops_ratio": dense_flops / costs[name][1],
        }
        for name, latency in latencies.items()
    ]


def _show(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    threads = options.threads or torch.get_num_threads()
    print(f"{options.size} pixels, batch 1, {threads} threads, {options.repeats} rounds, {options.criterion} scores")
    print("engine       model            params (M)  FLOPs (G)        ms   ± IQR/2   faster   FLOPs   share  paper")
    for row in rows:
        ratio = next((r for r in options.ratios if row["model"].endswith(f"-{r:.0%}")), None)
        share = row["speed_up"] / row["flops_ratio"]
        paper = f"{PUBLISHED[ratio]:5.1f}x" if ratio in PUBLISHED else "      "
        print(
            f"{row['engine']:<12} {row['model']:<15} {row['params'] / 1e6:11.3f} {row['flops'] / 1e9:10.3f} "
            f"{row['ms']:9.1f} {row['iqr'] / 2:9.1f} {row['speed_up']:7.2f}x {row['flops_ratio']:6.2f}x "
            f"{share:7.0%} {paper}"
        )
    print(f"share: of the FLOPs ratio that the speed-up reaches; wanted: {SHARE:.0%} and the paper's speed-up")


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=416, help="side of the images in pixels")
    parser.add_argument("--width", type=float, default=1.0, help="factor on all channel counts")
    parser.add_argument("--ratios", type=float, nargs="*", default=list(PUBLISHED))
    parser.add_argument("--criterion", choices=("random", "l1"), default="random")
    parser.add_argument("--round-to", type=int, default=1, help="keep multiples of this many channels")
    parser.add_argument("--all-layers", action="store_true", help="prune the heads' 3x3 convolutions too")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--channels-last", action="store_true", help="time PyTorch in that memory format too")
    parser.add_argument("--no-onnx", action="store_true")
    parser.add_argument("--out", help="JSON file for the figures")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
