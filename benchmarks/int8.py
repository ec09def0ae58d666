"""Dense and pruned, in float32 and in 8 bits: accuracy on a real task, and latency at 224 pixels.

Run from the repository's root on an idle machine: ``python -m benchmarks.int8``; about five minutes. ``--task scenes``
trains YOLOv3-tiny instead of ResNet-18 on digits, about ten. Writes ``benchmarks/results/int8.md``.

Accuracy: the recipe's network is trained, half of every layer is pruned in one shot by L1, fine-tuned and quantized;
the four files run in ONNX Runtime, and the task's own test step judges their outputs. Latency: torchvision's networks
with random weights, half of every layer pruned, ranges calibrated on random numbers, which time does not depend on;
the same files in ONNX Runtime and in OpenVINO, all in turns.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision
from pytorch_lightning import seed_everything

import lightning_prune as lp
from lightning_prune import LayerRatio, PruneCallback
from lightning_prune.cli.training import build_task
from lightning_prune.engines import OnnxEngine, OnnxRuntime, OpenVINO
from lightning_prune.engines.onnx_file import onnx_bytes
from lightning_prune.experiments.quantized import QuantizationSettings, compare_quantized
from lightning_prune.experiments.runner import Runner, quiet
from lightning_prune.measure import compare_programs, thread_count
from lightning_prune.model_state.copying import copied
from lightning_prune.quantization import quantize
from lightning_prune.report.table import TIMES, Column, Entry, Table

NETWORKS = ("resnet18", "resnet50", "mobilenet_v2")
ENGINES: tuple[OnnxEngine, ...] = (OnnxRuntime(), OpenVINO())


class Recipe(NamedTuple):
    """A task of the package and how long it is trained here; ``ignored``: sets of layers left in float, in turn."""

    config: str
    metric: str
    epochs: int
    fine_tuning: int
    lr: float
    ignored: tuple[tuple[str, ...], ...]


TASKS = {
    "digits": Recipe("task/resnet18_digits.yaml", "acc", 8, 5, 0.02, ((),)),
    "scenes": Recipe("task/yolov3_tiny_scenes.yaml", "map", 20, 8, 0.001, ((), ("*.predict",))),
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="digits")
    parser.add_argument("--epochs", type=int, help="of training; default: the task's")
    parser.add_argument("--size", type=int, default=224, help="pixels of the images that are timed")
    parser.add_argument("--networks", nargs="*", default=NETWORKS, help="that are timed")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1, help="of the engines")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/int8.md"))
    options = parser.parse_args(argv)
    started = time.perf_counter()
    versions = {name: version for engine in ENGINES for name, version in engine.versions.items()}
    about = ", ".join(f"{name} {version}" for name, version in versions.items())
    parts = [f"# 8 bits\n\n`python -m benchmarks.int8 --task {options.task}`; {about}; {options.threads} thread(s)."]
    parts += [accuracy(options), latency(options)]
    options.out.write_text("\n\n".join(parts) + "\n", "utf-8")
    print("\n\n".join(parts))
    print(f"\n{time.perf_counter() - started:.0f} s")


def accuracy(options: argparse.Namespace) -> str:
    recipe = TASKS[options.task]
    task, data, *_ = build_task(["--config", recipe.config], "benchmarks.int8")
    runner = Runner(data, recipe.metric)
    epochs = options.epochs or recipe.epochs
    with quiet():
        seed_everything(0, verbose=False)
        runner.fit(task, epochs)
        small = copied(task)
        prune = PruneCallback("l1", selection=LayerRatio(0.5), reconstruct="before")
        runner.fit(small, options.epochs or recipe.fine_tuning, [prune], recipe.lr)
    text = f"{recipe.config}, {epochs} epochs; half of every layer pruned by L1, fine-tuned; one seed, test data:"
    with tempfile.TemporaryDirectory() as folder, thread_count(options.threads):
        for ignore in recipe.ignored:
            settings = QuantizationSettings(metric=recipe.metric, ignore=ignore, repeats=options.repeats)
            study = compare_quantized({"dense": task, "pruned": small}, data, f"{folder}/net.onnx", settings)
            kept = f"{', '.join(ignore)} left in float" if ignore else "every layer in 8 bits"
            text += f"\n\n{study.table().markdown()}\n\n{kept}; calibrated on {study.files[1].report.samples} samples"
    return text


def latency(options: argparse.Namespace) -> str:
    images = torch.rand(1, 3, options.size, options.size, generator=torch.Generator().manual_seed(0))
    rows = []
    with tempfile.TemporaryDirectory() as folder, thread_count(options.threads):
        for name in options.networks:
            torch.manual_seed(0)
            dense = torchvision.models.get_model(name, weights=None).eval()
            result = lp.prune(dense, images, criterion="l1", selection=LayerRatio(0.5))
            files = {}
            for state, model in (("dense", dense), ("pruned", result.model)):
                path = Path(folder) / "net.onnx"
                report = quantize(model, images, [images, torch.rand_like(images)], path)
                left = ", ".join(f"{count} {operator}" for operator, count in report.float_operators.items())
                files[f"{state}, fp32"] = onnx_bytes(model, images), ""
                files[f"{state}, int8"] = path.read_bytes(), left or "nothing"
            programs = {
                (file, engine.name): (engine.load(content), images)
                for engine in ENGINES
                for file, (content, _) in files.items()
            }
            keys = {f"{file} {engine}": (file, engine) for file, engine in programs}
            found = compare_programs({key: programs[of] for key, of in keys.items()}, repeats=options.repeats)
            times = {of: found[key] for key, of in keys.items()}
            for file, (content, left) in files.items():
                entries = []
                for engine in ENGINES:
                    here = times[file, engine.name]
                    gain = times["dense, fp32", engine.name].median / here.median
                    entries.append(Entry(f"{here.median:.2f}", f"{here.iqr / 2:.2f}", f"{gain:.2f}{TIMES}"))
                rows.append((f"{name}, {file}", *entries, f"{len(content) / 1e6:.2f}", left))
    columns = (Column("file"), *(Column(engine.name, "ms") for engine in ENGINES), Column("size", "MB"))
    table = Table((*columns, Column("left in float", left=True)), tuple(rows))
    return f"{options.size} pixels, batch 1, random weights, times faster than dense fp32:\n\n{table.markdown()}"


if __name__ == "__main__":
    main()
