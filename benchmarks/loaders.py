"""Images per second that the data modules deliver, now and image by image as they did before, and that models take.

Run from the repository's root on an idle machine: ``python -m benchmarks.loaders``; about ten minutes. Before: every
image decoded or rendered when it is asked for and transformed by torchvision, in two worker processes or in none,
whichever is faster. Now: the recipe's data module as it is, in its first pass (scenes are rendered then) and in later
ones. Model: forward and backward of the recipe's training step. Rounds go through all of these in turn, each gives its
images per second, and the table has their medians. Modules of files work as before and have no figure of that name
(COCO's goes the way of VOC's boxes); their models are timed once, on two images.

CIFAR-10 is 50,000 images of random pixels in its own format, or what ``--data`` holds: ``cifar-10-batches-py``, or
``index.npz`` and ``jpegs.bin.xz`` (JPEG copies). VOC's images are scenes of 416 x 416 pixels.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import json
import lzma
import os
import pickle
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from pytorch_lightning import LightningModule
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate
from torchvision.datasets import CIFAR10
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as transform

from lightning_prune.cli.training import build_task
from lightning_prune.data import Scenes, write_voc
from lightning_prune.data.cifar10 import MEAN, STD
from lightning_prune.data.digits import random_affine, split_digits
from lightning_prune.data.modules import PartsDataModule, detection_batch, segmentation_batch
from lightning_prune.data.samples import Samples, detection_sample, segmentation_sample, target_of
from lightning_prune.data.transforms import detection_evaluation, segmentation_evaluation

SECONDS = 3.0  # of loading, at most, for one figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with CIFAR-10; none: random pixels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="", help="rows whose name holds this")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="You are trying to `self.log")
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, models on {name}\n")
    print("| loader | before | first pass | now | now / before | model | now / model |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder, mock.patch.multiple(CIFAR10, **_cifar10(Path(folder), options.data)):
        write_voc(Scenes("train", 320, size=416), folder, "train")
        write_voc(Scenes("val", 16, size=416), folder, "val")
        for row, (recipe, settings, before, model_batch) in _rows(folder).items():
            if options.only in row:
                arguments = ["--config", f"task/{recipe}", *settings]
                print(_line(row, arguments, before, model_batch, options.rounds, options.device), flush=True)


_FCN = {
    "num_classes": 11,
    "model": {
        "class_path": "torchvision.models.segmentation.fcn_resnet101",
        "init_args": {"weights": None, "weights_backbone": None, "num_classes": 11, "aux_loss": True},
    },
}
Before = Callable[[PartsDataModule, int], DataLoader[Any]]  # of the module and a number of workers


def _rows(root: str) -> dict[str, tuple[str, list[str], Before | None, int | None]]:
    """Recipe, its settings, the loader of before, and images in a model's step if the batch would not fit a CPU."""
    cifar = [f"--data.root={root}"]
    voc = [f"--data.root={root}", "--data.classes=" + str([str(digit) for digit in range(10)])]
    untrained = Path(root) / "untrained.yaml"
    untrained.write_text(
        json.dumps({"model": {"class_path": "lightning_prune.tasks.SegmentationTask", "init_args": _FCN}})
    )
    no_download = "--data.download=false"
    ten = ["--model.num_classes=10", "--model.model.num_classes=10"]
    return {
        "CIFAR-10, ResNet-18": ("resnet18_cifar10", cifar, _cifar10_before, None),
        "CIFAR-10, VGG-16": ("vgg16_cifar10", cifar, _cifar10_before, None),
        "digits, ResNet-18": ("resnet18_digits", [], _digits_before, None),
        "scenes, YOLOv3-tiny": ("yolov3_tiny_scenes", [], partial(_scenes_before, _detection, detection_batch), None),
        "scenes, FCN-ResNet50": (
            "fcn_resnet50_scenes", [], partial(_scenes_before, _segmentation, segmentation_batch), None
        ),
        "VOC boxes, YOLOv3": ("yolov3_voc", [*voc, *ten], None, 2),
        "VOC masks, FCN-ResNet101": ("fcn_resnet101_voc", [f"--config={untrained}", *voc, no_download], None, 2),
    }  # fmt: skip


def _line(
    row: str, arguments: Sequence[str], before: Before | None, model_batch: int | None, rounds: int, device: str
) -> str:
    task, data, *_ = build_task(arguments, "benchmarks.loaders")
    assert isinstance(data, PartsDataModule)
    data.prepare_data()
    data.setup()
    loader = data.train_dataloader()
    first = _rate(loader)
    for _ in loader:  # whatever is kept is kept now
        pass
    sources = {"now": partial(_rate, loader)}
    if before is not None:
        old = {f"before, {workers}": before(data, workers) for workers in (0, 2)}
        for of in old.values():
            _rate(of)  # workers have started
        sources |= {name: partial(_rate, of) for name, of in old.items()}
    sources["model"] = _training(task, _cut(next(iter(loader)), model_batch), device)
    if model_batch is None:
        sources["model"]()  # warms up
    found = {name: [] for name in sources}
    for number, (name, source) in itertools.product(range(rounds), sources.items()):
        if name != "model" or not number or model_batch is None:
            found[name].append(source())
    middle = {name: statistics.median(rates) for name, rates in found.items()}
    old_rate = max((rate for name, rate in middle.items() if name.startswith("before")), default=None)
    now, model = middle["now"], middle["model"]
    ratio = None if old_rate is None else now / old_rate
    return f"| {row} | " + " | ".join(map(_figure, (old_rate, first, now, ratio, model, now / model))) + " |"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def _rate(loader: DataLoader[Any]) -> float:
    """Images per second of a pass, cut short; the first batch, before which workers fill their queues, is left out."""
    batches, count = iter(loader), 0
    next(batches)
    started = time.perf_counter()
    for images, _ in batches:
        count += len(images)
        if time.perf_counter() - started > SECONDS:
            break
    return count / (time.perf_counter() - started)


def _training(task: LightningModule, batch: Any, device: str) -> Callable[[], float]:
    """Images per second of a forward and backward of the task's training step."""
    task = task.to(device).train()
    moved = tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), batch)

    def rate() -> float:
        started, steps = time.perf_counter(), 0
        while steps == 0 or time.perf_counter() - started < SECONDS / 2:
            task.zero_grad()
            task.training_step(moved, steps).backward()
            steps += 1
            if device == "cuda":
                torch.cuda.synchronize()
        return steps * len(batch[0]) / (time.perf_counter() - started)

    return rate


def _cut(batch: Any, count: int | None) -> Any:
    return tuple(part[:count] for part in batch)


class _EachCIFAR10(Dataset[Any]):
    """As torchvision's: one image at a time through PIL and the transforms."""

    def __init__(self, images: np.ndarray, labels: list[int]) -> None:
        self.images, self.labels = images, labels
        standardised = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
        self.transforms = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), *standardised])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transforms(Image.fromarray(self.images[index])), self.labels[index]


def _loader(
    data: PartsDataModule, dataset: Dataset[Any], collate: Callable[[Any], Any], workers: int
) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        data.batch_size,
        shuffle=True,
        drop_last=data.drop_last,
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


def _cifar10_before(data: PartsDataModule, workers: int) -> DataLoader[Any]:
    images, labels = data.parts["train"].tensors
    pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
    return _loader(data, _EachCIFAR10(pixels, labels.tolist()), default_collate, workers)


def _digits_before(data: PartsDataModule, workers: int) -> DataLoader[Any]:
    def augmented(samples: Any) -> Any:
        images, labels = default_collate(samples)
        return random_affine(images), labels

    return _loader(data, TensorDataset(*split_digits()["train"].tensors), augmented, workers)


def _scenes_before(
    sample: Callable[[Scenes, int], Any], collate: Callable[[Any], Any], data: Any, workers: int
) -> DataLoader[Any]:
    scenes = data.scenes["train"]
    return _loader(data, Samples(range(len(scenes)), partial(sample, scenes)), collate, workers)


def _segmentation(scenes: Scenes, index: int) -> Any:
    scene = scenes[index]
    return segmentation_sample(transform.to_image(scene.image), scene.mask, segmentation_evaluation(None))


def _detection(scenes: Scenes, index: int) -> Any:
    scene = scenes[index]
    target = target_of(scene.mask.shape, scene.boxes, scene.labels, index, area=scene.pixels)
    return detection_sample(transform.to_image(scene.image), target, detection_evaluation(None))


def _cifar10(folder: Path, data: Path | None) -> dict[str, Any]:
    """What torchvision's class has to believe of the files, which are written to the folder, or linked to."""
    if data is not None and (data / CIFAR10.base_folder).is_dir():
        (folder / CIFAR10.base_folder).symlink_to((data / CIFAR10.base_folder).resolve())
        return {"train_list": CIFAR10.train_list}  # as it is
    if data is None:
        draw = np.random.default_rng(0)
        pixels = draw.integers(256, size=(60_000, 3072), dtype=np.uint8)
        labels, test = draw.integers(10, size=60_000), np.arange(60_000) >= 50_000
    elif (data / "index.npz").is_file():
        pixels, labels, test = _jpeg_copies(data)
    else:
        sys.exit(
            f"{data.resolve()} holds neither {CIFAR10.base_folder} nor index.npz; leave --data out for random pixels"
        )
    (folder / CIFAR10.base_folder).mkdir()
    parts = {f"data_batch_{k + 1}": rows for k, rows in enumerate(np.split(np.flatnonzero(~test), 5))}
    parts["test_batch"] = np.flatnonzero(test)
    contents: dict[str, Any] = {
        name: {"data": pixels[rows], "labels": labels[rows].tolist()} for name, rows in parts.items()
    }
    contents["batches.meta"] = {"label_names": [str(number) for number in range(10)]}
    digests = {}
    for name, content in contents.items():
        raw = pickle.dumps(content)
        (folder / CIFAR10.base_folder / name).write_bytes(raw)
        digests[name] = hashlib.md5(raw).hexdigest()
    meta = {**CIFAR10.meta, "filename": "batches.meta", "md5": digests.pop("batches.meta")}
    train = [[name, digest] for name, digest in digests.items() if name != "test_batch"]
    return {"train_list": train, "test_list": [["test_batch", digests["test_batch"]]], "meta": meta}


def _jpeg_copies(data: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    index = np.load(data / "index.npz")
    raw, ends = lzma.decompress((data / "jpegs.bin.xz").read_bytes()), np.cumsum(index["lens"])
    files = (raw[end - length : end] for end, length in zip(ends, index["lens"], strict=True))
    pixels = [np.asarray(Image.open(io.BytesIO(file)).convert("RGB")).transpose(2, 0, 1).ravel() for file in files]
    return np.stack(pixels), index["labels"], index["test"].astype(bool)


if __name__ == "__main__":
    main()
