"""How much goes of ultralytics' models, and how exactly: ``python -m benchmarks.ultralytics_yolo``; about ten minutes.

Needs ``pip install ultralytics`` (AGPL-3.0). Every model is built from its YAML with random weights, perturbed so that
no error hides, and pruned by L1 with LayerRatio(0.5) and with Budget(flops=0.5). Parameters and FLOPs are those left;
the error is the largest of any output of the masked and the reconstructed model in float64, at two sizes and in eval
and train mode; seconds are those of the processor (a laden machine hardly changes them) at 128 pixels.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import time
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

import lightning_prune as lp
from benchmarks.zoo.models import randomise_
from lightning_prune.graph.running import tensors_in

os.environ |= {"YOLO_OFFLINE": "1", "YOLO_AUTOINSTALL": "false", "YOLO_VERBOSE": "false"}
SIDE = 128  # RT-DETR takes 300 queries of at least as many positions
TASKS = ("", "-seg", "-pose", "-obb", "-cls")
NAMES = [
    *("yolov3-tiny", "yolov5n", "yolov6n"),
    *(f"yolov8n{task}" for task in TASKS),
    *("yolov8n-ghost", "yolov8n-p2", "yolov8n-world", "yolov9t", "yolov9c-seg", "yolov10n"),
    *(f"yolo11n{task}" for task in TASKS),
    *(f"yolo12n{task}" for task in TASKS),
    *(f"yolo26n{task}" for task in (*TASKS, "-sem", "-depth")),
    *("yolov8n-rtdetr", "rtdetr-resnet50", "rtdetr-l"),
]
HEAD = [
    "| model | parameters (M) | channels that can go | left at LayerRatio(0.5): parameters | FLOPs "
    "| left at Budget(flops=0.5): parameters | FLOPs | trace (s) | worst relative error |",
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=NAMES, help="names of YAML files")
    parser.add_argument("--out", type=Path, help="a Markdown file")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    lines = list(HEAD)
    for name in options.only:
        lines.append(row(name))
        print(lines[-1], flush=True)
        if options.out:
            options.out.write_text("\n".join(lines) + "\n", "utf-8")


def row(name: str) -> str:
    """One line of the table."""
    import ultralytics

    torch.manual_seed(0)
    kind = ultralytics.RTDETR if "rtdetr" in name else ultralytics.YOLO
    model, images = kind(f"{name}.yaml").model, torch.rand(2, 3, SIDE, SIDE)
    randomise_(model, images)
    started = time.process_time()
    graph = lp.trace(model, images)
    seconds = time.process_time() - started
    scores = lp.score(model, graph, lp.L1())
    free = sum(group.size for group in graph.prunable_groups) / sum(group.size for group in graph.groups)
    cells, worst = [], 0.0
    for selection in (lp.LayerRatio(0.5), lp.Budget(flops=0.5)):
        try:
            plan = selection.select(graph, scores, model=model, example_inputs=images)
        except lp.PruningError as error:
            print(f"{name}, {selection}: {error}", file=sys.stderr)
            cells += ["not reached", "not reached"]
            continue
        small, masked = lp.reconstruct(model, graph, plan), copy.deepcopy(model)
        for count in (lambda m: lp.measure.count_params(m, trainable=False), lambda m: flops(m, images)):
            cells.append(f"{count(small) / count(model):.1%}".replace("%", " %"))
        lp.mask_(masked, graph, plan)
        worst = max(worst, difference(masked, small))
    parameters = lp.measure.count_params(model, trainable=False) / 1e6
    return f"| {name} | {parameters:.2f} | {free:.0%} | {' | '.join(cells)} | {seconds:.1f} | {worst:.0e} |"


def flops(model: nn.Module, images: Tensor) -> float:
    """Of the forward in eval mode."""
    return lp.measure.count_flops(model.eval(), images)


def difference(masked: nn.Module, small: nn.Module) -> float:
    """The largest relative error of any output."""
    worst = 0.0
    for size, training in (((1, SIDE, SIDE), False), ((3, 96, 160), False), ((3, 96, 160), True)):
        images = torch.rand(size[0], 3, *size[1:], dtype=torch.float64)
        outputs = []
        for model in (masked.double(), small.double()):
            torch.manual_seed(0)
            with torch.no_grad():
                outputs.append(tensors_in(model.train(training)(images)))
        pairs = [(a, b) for a, b in zip(*outputs, strict=True) if a.is_floating_point()]
        worst = max(worst, *(float((a - b).abs().max() / a.abs().max()) for a, b in pairs))
    return worst


if __name__ == "__main__":
    main()
