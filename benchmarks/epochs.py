"""Epochs of dense, masked and reconstructed ResNets for 32x32 images, eager, compiled, and as CUDA graphs.

Run from the repository's root on an idle machine. With a GPU, as long as it is lent, then without; then the table::

    python -m benchmarks.epochs --out rows.jsonl --minutes 9
    python -m benchmarks.epochs --device cpu --images 256 --batch 64 --only resnet18 --out rows.jsonl
    python -m benchmarks.epochs --render rows.jsonl > benchmarks/results/epochs.md

An epoch is forward, backward and optimizer step on batches that lie on the device already, so it is the least that
training can take: batch norms in train mode (checked), channels last, fused SGD with momentum; under bf16 autocast on a
GPU, in float32 on a CPU. L1 norms choose the channels, the ratio of every layer, groups jointly. All models of a net at
one batch size take turns, epoch by epoch, after a warm-up that compiles, captures and picks kernels; medians count.

Engines: ``eager``; ``compile``: torch.compile of the model; ``graph``: the whole step, optimizer included, captured as
one CUDA graph; ``compile+graph``: torch.compile(mode="reduce-overhead"). What fails is a row too, with the error. What
says most comes first, and every block is written as soon as it is measured, so that a run may be cut off.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_prune as lp
from benchmarks import Operators
from benchmarks.epochs_table import render
from lightning_prune import models

NETS = ("resnet18", "resnet34", "resnet50")
ENGINES = ("eager", "graph", "compile", "compile+graph")
BATCHES = (512, 128, 2048, 1024, 256)  # the first three say where launches set the pace and where they do not
FIRST = 3
WARM_UP = 3  # steps
EXAMPLE = torch.zeros(1, 3, 32, 32)

Step = Callable[[Tensor, Tensor], Tensor]


class Block(NamedTuple):
    """What takes turns."""

    net: str
    batch: int
    engine: str
    kinds: tuple[tuple[str, float], ...]  # (dense, masked or reconstructed; ratio)


class Subject(NamedTuple):
    """A model in training."""

    row: dict[str, Any]
    model: nn.Module
    step: Step


def main(argv: list[str] | None = None) -> None:
    """Measure block by block, or render what was measured."""
    options = _options(argv)
    if options.render:
        rows = [json.loads(line) for line in Path(options.render).read_text("utf-8").splitlines()]
        print(render(rows), end="")
        return
    started = time.monotonic()
    torch.backends.cudnn.benchmark = options.device.startswith("cuda")
    for block in blocks(options):
        if time.monotonic() - started > 60 * options.minutes:
            print(f"{options.minutes} minutes are over")
            break
        for row in measure(block, options):
            found = row.get("error") or f"{row['step_ms']:.2f} ms a step"
            print(block.net, block.batch, block.engine, row["model"], row["ratio"], found, flush=True)
            if options.out:
                with Path(options.out).open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(row) + "\n")


def blocks(options: argparse.Namespace) -> Iterator[Block]:
    """Everything that is asked for, what says most first."""
    dense, masked, small = (
        (("dense", 0.0),),
        *(tuple((kind, ratio) for ratio in options.ratios) for kind in ("masked", "reconstructed")),
    )
    for batches in (options.batch[:FIRST], options.batch[FIRST:]):
        for engine, batch, net in itertools.product(options.engines, batches, options.only):
            yield Block(net, batch, engine, (*dense, *small, *masked) if engine == "eager" else (*dense, *small))
    # Whether masks can be captured and compiled at all; a failed capture may take what comes after it along.
    for engine in options.engines:
        for net in options.only if engine != "eager" else ():
            yield Block(net, options.batch[0], engine, masked)


def measure(block: Block, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each model of a block."""
    if block.engine.startswith("compile"):
        torch._dynamo.reset()  # it gives up on code that it has compiled for too many models
    device = torch.device(options.device)
    torch.manual_seed(0)
    count = max(1, options.images // block.batch)
    images = torch.randn(count * block.batch, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (len(images),), device=device)
    batches = list(zip(images.split(block.batch), labels.split(block.batch), strict=True))
    rows, subjects = [], []
    for kind, ratio in block.kinds:
        row = _described(block, kind, ratio, options, count)
        rows.append(row)
        try:
            subject = _prepared(row, block, options, batches[0])
            _epoch(subject, batches[:1])
        except Exception as error:  # noqa: BLE001  # whatever compiling or capturing raises
            row["error"] = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        else:
            subjects.append(subject)
    for _ in range(options.repeats):
        for subject in subjects:
            subject.row["seconds"].append(_epoch(subject, batches))
    for subject in subjects:
        median = statistics.median(subject.row["seconds"])
        subject.row.update(step_ms=1000 * median / count, images_per_second=count * block.batch / median)
        subject.row.update(_kernels(subject, batches[0], median / count))
    return rows


def _described(block: Block, kind: str, ratio: float, options: argparse.Namespace, count: int) -> dict[str, Any]:
    cuda = options.device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "precision": options.precision,
        "max_pool": not options.no_max_pool,
        "round_to": options.round_to,
        "net": block.net,
        "batch": block.batch,
        "engine": block.engine,
        "model": kind,
        "ratio": ratio,
        "steps": count,
        "seconds": [],
    }


def _prepared(row: dict[str, Any], block: Block, options: argparse.Namespace, batch: tuple[Tensor, Tensor]) -> Subject:
    """A model of the kind, its training step on the engine, warmed up; what is counted once goes into the row."""
    kind, ratio, variant = row["model"], row["ratio"], (block.net, not options.no_max_pool)
    row["parameters"], row["flops"] = _costs(*variant, ratio if kind == "reconstructed" else 0.0, options.round_to)
    model = copy.deepcopy(_dense(*variant)).to(options.device, memory_format=torch.channels_last)
    if kind != "dense":
        graph, plan = _plan(*variant, ratio, options.round_to)
        if kind == "reconstructed":
            model = lp.reconstruct(model, graph, plan)
        else:
            lp.mask_(model, graph, plan, undoable=False)
    step = _step(model, block.engine, options)
    if block.engine == "eager":
        step(*batch)  # makes the momentum, once
        with Operators() as operators:
            step(*batch)
        row["operators"] = operators.count
    if block.engine == "graph":
        step = _captured(step, *batch)
    for _ in range(WARM_UP):
        loss = step(*batch)
    if not loss.isfinite():
        raise ArithmeticError("the loss is not finite")
    return Subject(row, model, step)


@functools.cache
def _dense(net: str, max_pool: bool) -> nn.Module:
    torch.manual_seed(0)
    return getattr(models, net)(max_pool=max_pool).train()


@functools.cache
def _plan(net: str, max_pool: bool, ratio: float, round_to: int) -> tuple[lp.ChannelGraph, lp.Plan]:
    model = _dense(net, max_pool)
    graph = lp.trace(model, EXAMPLE)
    return graph, lp.LayerRatio(ratio, round_to=round_to).select(graph, lp.score(model, graph, lp.L1()))


@functools.cache
def _costs(net: str, max_pool: bool, ratio: float, round_to: int) -> tuple[int, int]:
    """Parameters and FLOPs of an image, of the dense model (ratio 0) or of a reconstructed one."""
    model = _dense(net, max_pool)
    small = lp.reconstruct(model, *_plan(net, max_pool, ratio, round_to)) if ratio else model
    return lp.measure.count_params(small), lp.measure.count_flops(small, EXAMPLE)


def _step(model: nn.Module, engine: str, options: argparse.Namespace) -> Step:
    settings = {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}
    optimizer = torch.optim.SGD(model.parameters(), **settings, fused=True)
    run: Any = model
    if engine.startswith("compile"):
        mode = "reduce-overhead" if engine == "compile+graph" else None
        run = torch.compile(model, mode=mode, dynamic=False, fullgraph=True)  # no part stays eager unnoticed
    half = options.precision == "bf16"
    kind = torch.device(options.device).type
    cache = engine != "graph"  # a captured step must cast the weights anew whenever it is replayed

    def step(images: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(kind, torch.bfloat16, enabled=half, cache_enabled=cache):
            loss = F.cross_entropy(run(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def _captured(step: Step, images: Tensor, labels: Tensor) -> Step:
    """The whole step as one CUDA graph, see https://pytorch.org/docs/stable/notes/cuda.html#whole-network-capture."""
    images, labels = images.clone(), labels.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step(images, labels)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(images, labels)

    def replay(new_images: Tensor, new_labels: Tensor) -> Tensor:
        images.copy_(new_images)
        labels.copy_(new_labels)
        graph.replay()
        return loss

    return replay


def _epoch(subject: Subject, batches: list[tuple[Tensor, Tensor]]) -> float:
    """Seconds; every batch norm must have seen every batch."""
    norms = [module for module in subject.model.modules() if isinstance(module, nn.BatchNorm2d)]
    seen = [int(norm.num_batches_tracked) for norm in norms]
    _wait(batches[0][0].device)
    started = time.perf_counter()
    for batch in batches:
        subject.step(*batch)
    _wait(batches[0][0].device)
    seconds = time.perf_counter() - started
    if [int(norm.num_batches_tracked) for norm in norms] != [before + len(batches) for before in seen]:
        raise AssertionError("a batch norm was not in train mode")
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _kernels(subject: Subject, batch: tuple[Tensor, Tensor], seconds: float) -> dict[str, Any]:
    """Kernels and copies of one step on a GPU, and the share of the step's time in which they keep it busy."""
    if batch[0].device.type != "cuda":
        return {}
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            subject.step(*batch)
            torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001  # a machine may not let itself be profiled
        print(f"no profile: {error}")
        return {}
    kernels = [
        event
        for event in profile.events() or ()
        if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    return {"kernels": len(kernels), "busy": sum(event.time_range.elapsed_us() for event in kernels) / 1e6 / seconds}


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", nargs="+", choices=NETS, default=list(NETS), help="nets")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.5, 0.8])
    parser.add_argument("--batch", nargs="+", type=int, default=list(BATCHES), help="sizes, the most telling first")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, help="default: all on a GPU, eager on a CPU")
    parser.add_argument("--images", type=int, default=25_600, help="of an epoch")
    parser.add_argument("--repeats", type=int, default=3, help="epochs of every model")
    parser.add_argument("--precision", choices=("bf16", "float32"), help="default: bf16 on a GPU, float32 on a CPU")
    parser.add_argument("--round-to", type=int, default=1, help="keep multiples of this many channels")
    parser.add_argument("--no-max-pool", action="store_true", help="the nets' variant without pooling after the stem")
    parser.add_argument("--minutes", type=float, default=60.0, help="begin nothing after them")
    parser.add_argument("--out", help="JSON lines are added to this file")
    parser.add_argument("--render", help="print the table of such a file, and measure nothing")
    options = parser.parse_args(argv)
    cuda = options.device.startswith("cuda")
    options.engines = options.engines or (ENGINES if cuda else ("eager",))
    options.precision = options.precision or ("bf16" if cuda else "float32")
    return options


if __name__ == "__main__":
    main()
