"""A small file of every kind that is read, with its reader."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import lightning_prune as lp
from benchmarks.reliability import networks
from benchmarks.reliability.networks import Classifier
from benchmarks.reliability.wholeness import name_of
from lightning_prune.criteria import Scores
from lightning_prune.data import COCODetection, ImageFolderDataModule, YOLODetection
from lightning_prune.data.idx_files import read_idx
from lightning_prune.data.samples import image_size, read_image
from lightning_prune.data.voc_files import read_annotation, read_classes
from lightning_prune.errors import CheckpointError
from lightning_prune.experiments.comparison.cells import Cell, read_cell, write_kept
from lightning_prune.experiments.reproduce.recipe import read_recipe
from lightning_prune.export.loading import load_exported
from lightning_prune.export.metadata import read_metadata
from lightning_prune.files import read_yaml
from lightning_prune.measure import LatencyTable
from lightning_prune.measure.latency_table import LayerTimes, Surface
from lightning_prune.models import YoloV3Tiny, load_darknet_weights, save_darknet_weights
from lightning_prune.plan import Plan
from lightning_prune.reconstruction.checkpoint import load_dense
from lightning_prune.selection import LayerRatio
from lightning_prune.sensitivity.journal import Journal

SETTINGS = {"criterion": "L1()", "ratios": [0.5]}


@dataclass(frozen=True)
class Specimen:
    """One kind of file.

    Attributes:
        file: its name in its folder; what a refusal must name.
        make: writes it, and what else its reader needs, into an empty folder.
        read: plain data that are equal if the same was read.
        summed: there are check sums in it, so that no damage may pass but that of somebody who makes them anew.
        forked: its reader is native code of others, which may die; read in a process of its own.
    """

    name: str
    file: str
    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    summed: bool = False
    forked: bool = False


class ChangedError(AssertionError):
    """A refused file has changed the model."""


def _into(load: Callable[[Path, Any], Any], build: Callable[[], torch.nn.Module] = Classifier) -> Callable[[Path], Any]:
    """Load into a fresh model, which a refusal must leave as it was."""

    def read(path: Path) -> Any:
        torch.manual_seed(1)
        model = build()
        before = name_of(model.state_dict())
        try:
            load(path, model)
        except Exception:
            if name_of(model.state_dict()) != before:
                raise ChangedError(f"{path} was refused and has changed the model") from None
            raise
        return name_of(model.state_dict())

    return read


def _model() -> Classifier:
    torch.manual_seed(0)
    return Classifier()


def _pruned(path: Path) -> None:
    result = lp.prune(_model(), torch.zeros(1, 3, 8, 8), criterion="l1", ratio=0.5)
    lp.save(path / "small.pt", result.model, result.plan, accuracy=0.9)


def _lightning(folder: Path) -> None:
    from pytorch_lightning import Trainer

    from lightning_prune.tasks import ClassificationTask

    task = ClassificationTask(_model(), num_classes=10, input_size=(3, 8, 8))
    trainer = Trainer(
        max_epochs=0, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu"
    )
    trainer.strategy.connect(task)
    trainer.save_checkpoint(folder / "last.ckpt")


def _resume(path: Path) -> Any:
    from pytorch_lightning import Trainer

    from lightning_prune.cli.resuming import judge
    from lightning_prune.tasks import ClassificationTask

    task = ClassificationTask(_model(), num_classes=10, input_size=(3, 8, 8))
    trainer = Trainer(
        max_epochs=0, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu"
    )
    return name_of(judge(path, task, trainer, training=True))


def _graph() -> Any:
    return lp.trace(_model(), torch.zeros(1, 3, 8, 8))


def _scores(folder: Path) -> None:
    graph = _graph()
    lp.score(_model(), graph, "l1").save(folder / "scores.pt")


def _plan(folder: Path) -> None:
    graph = _graph()
    lp.GlobalRatio(0.5).select(graph, lp.score(_model(), graph, "l1")).save(folder / "plan.json")


def _table(folder: Path) -> None:
    from lightning_prune.measure.latency_table import LayerKind

    surface = Surface(((4, 64), (16, 64)), np.array([[1.0, 4.0], [16.0, 64.0]]), (4, 16), (4, 1))
    kind = LayerKind("linear", batch=1)
    LatencyTable({kind: LayerTimes((64, 64), (surface,))}, engine="eager", threads=1, made="2026-01-01").save(
        folder / "table.json"
    )


def _journal(folder: Path) -> None:
    journal = Journal(folder / "points.jsonl", SETTINGS)
    for number in range(6):
        journal.add(("layer", number), 0.9 - number / 10)


def _cell(folder: Path) -> None:
    write_kept(folder / "cell.json", Cell("l1", 0.5, 0, 0.5, 0.9, 1000, 100, 0.5), {"a": 1})


def _exported(suffix: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        kind = "onnx" if suffix == ".onnx" else "torch_export"
        lp.export(_model().eval(), torch.zeros(1, 3, 8, 8), folder / f"net{suffix}", format=kind)

    return make


def _open_exported(path: Path) -> Any:
    about = read_metadata(path)
    images = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return name_of([about, load_exported(path)(images)])


def _annotation(folder: Path) -> None:
    box = "<bndbox><xmin>2</xmin><ymin>3</ymin><xmax>9</xmax><ymax>8</ymax></bndbox>"
    item = f"<object><name>dog</name><difficult>0</difficult>{box}</object>"
    text = f"<annotation><size><width>16</width><height>12</height></size>{item}{item}</annotation>"
    (folder / "1.xml").write_text(text, "utf-8")


def _pixels(mode: str = "RGB") -> Image.Image:
    draw = np.random.default_rng(0)
    shape = (12, 16, 3) if mode == "RGB" else (12, 16)
    return Image.fromarray(draw.integers(0, 256 if mode == "RGB" else 3, shape, dtype=np.uint8), mode)


def _image(name: str, mode: str = "RGB") -> Callable[[Path], None]:
    return lambda folder: _pixels(mode).save(folder / name)


def _read_image(path: Path) -> Any:
    return name_of([image_size(path, upright=True), read_image(path, upright=True)])


def _coco(folder: Path) -> None:
    (folder / "train2017").mkdir()
    (folder / "annotations").mkdir()
    _pixels().save(folder / "train2017" / "1.png")
    content = {
        "images": [{"id": 1, "file_name": "1.png", "width": 16, "height": 12}],
        "categories": [{"id": 3, "name": "dog"}, {"id": 7, "name": "cat"}],
        "annotations": [
            {"id": n, "image_id": 1, "category_id": 3, "bbox": [2.0, 3.0, 7.0, 5.0], "area": 30.5, "iscrowd": 0}
            for n in (1, 2)
        ],
    }
    (folder / "annotations/instances_train2017.json").write_text(json.dumps(content), "utf-8")


def _read_coco(path: Path) -> Any:
    sets = {"train_on": "train2017", "evaluate_on": "train2017", "test_on": "train2017"}
    data = COCODetection(str(path.parent.parent), batch_size=1, size=None, num_workers=0, augment="none", **sets)
    data.setup("fit")
    return name_of([data.class_names, next(iter(data.val_dataloader()))])


def _yolo(folder: Path) -> None:
    for name in ("images", "labels"):
        (folder / name).mkdir()
    _pixels().save(folder / "images/1.png")
    (folder / "labels/1.txt").write_text("1 0.5 0.5 0.25 0.5\n0 0.4 0.6 0.2 0.3\n", "utf-8")
    (folder / "data.yaml").write_text("train: images\nval: images\nnames: [cat, dog]\n", "utf-8")


def _read_yolo(root: Path) -> Any:
    data = YOLODetection(str(root), batch_size=1, size=None, num_workers=0)
    data.setup("fit")
    return name_of([data.class_names, next(iter(data.val_dataloader()))])


def _idx(folder: Path) -> None:
    content = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (4, 8, 8)) + bytes(range(256))
    (folder / "images.idx3.gz").write_bytes(gzip.compress(content, mtime=0))


def _plain_idx(folder: Path) -> None:
    content = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (4, 8, 8)) + bytes(range(256))
    (folder / "images.idx3").write_bytes(content)


def _listed(folder: Path) -> None:
    for name in ("cat", "dog"):
        (folder / name).mkdir()
        for number in (1, 2):
            _pixels().save(folder / name / f"{number}.png")
    (folder / "train.txt").write_text("cat/1.png\ndog/1.png\n", "utf-8")
    (folder / "val.txt").write_text("cat/2.png\ndog/2.png\n", "utf-8")


def _read_listed(path: Path) -> Any:
    lists = {"train": str(path), "val": str(path.with_name("val.txt"))}
    data = ImageFolderDataModule(str(path.parent), batch_size=1, size=8, lists=lists, num_workers=0, augment="none")
    data.setup("fit")
    return name_of([*data.val_dataloader(), len(data.train_dataloader())])


def _yolo_model() -> torch.nn.Module:
    return YoloV3Tiny(10, width=0.0625)


def _darknet(folder: Path) -> None:
    torch.manual_seed(0)
    save_darknet_weights(YoloV3Tiny(10, width=0.0625), folder / "net.weights")


def _safetensors(folder: Path) -> None:
    from safetensors.torch import save_file

    save_file(_model().state_dict(), folder / "net.safetensors")


def _weights(name: str, **options: Any) -> Callable[[Path], None]:
    return lambda folder: torch.save(_model().state_dict(), folder / name, **options)


def _configuration(folder: Path) -> None:
    networks.write_configuration(folder / "task.yaml", networks.TASKS["classification"])


def _recipe(folder: Path) -> None:
    networks.write_configuration(folder / "tiny.yaml", networks.RECIPE)


def _read_configuration(path: Path) -> Any:
    from lightning_prune.errors import ConfigurationError

    return read_yaml(path, ConfigurationError, "configuration")


SPECIMENS = {
    specimen.name: specimen
    for specimen in (
        Specimen("pruned checkpoint", "small.pt", _pruned, _into(lp.load), summed=True),
        Specimen("Lightning checkpoint", "last.ckpt", _lightning, _resume, summed=True),
        Specimen("state dict", "dense.pt", _weights("dense.pt"), _into(load_dense), summed=True),
        Specimen(
            "state dict, torch's old form",
            "old.pth",
            _weights("old.pth", _use_new_zipfile_serialization=False),
            _into(load_dense),
        ),
        Specimen("safetensors", "net.safetensors", _safetensors, _into(load_dense)),
        Specimen(
            "darknet weights", "net.weights", _darknet, _into(lambda p, m: load_darknet_weights(m, p), _yolo_model)
        ),
        Specimen("scores", "scores.pt", _scores, lambda p: name_of(dict(Scores.load(p, _graph()))), summed=True),
        Specimen("plan", "plan.json", _plan, lambda p: Plan.load(p).to_dict()),
        Specimen(
            "layer ratios",
            "ratios.json",
            lambda f: LayerRatio(0.5, overrides={"stem": 0.25, "inner": 0.75}).save(f / "ratios.json"),
            lambda p: repr(LayerRatio.load(p)),
        ),
        Specimen("latency table", "table.json", _table, lambda p: LatencyTable.load(p).data()),
        Specimen("sensitivities", "points.jsonl", _journal, lambda p: str(Journal(p, SETTINGS).values)),
        Specimen("cell of a comparison", "cell.json", _cell, lambda p: repr(read_cell(p))),
        Specimen("configuration", "task.yaml", _configuration, _read_configuration),
        Specimen("recipe of reproduce", "tiny.yaml", _recipe, lambda p: repr(read_recipe(str(p)))),
        Specimen("ONNX", "net.onnx", _exported(".onnx"), _open_exported, forked=True),
        Specimen("torch.export", "net.pt2", _exported(".pt2"), _open_exported, summed=True, forked=True),
        Specimen("VOC annotation", "1.xml", _annotation, lambda p: name_of(read_annotation(p, ("cat", "dog")))),
        Specimen("image, PNG", "1.png", _image("1.png"), _read_image),
        Specimen("image, JPEG", "1.jpg", _image("1.jpg"), _read_image),
        Specimen("image, WebP", "1.webp", _image("1.webp"), _read_image),
        Specimen("image, TIFF", "1.tif", _image("1.tif"), _read_image),
        Specimen("mask", "m.png", _image("m.png", "L"), lambda p: read_classes(p).tolist()),
        Specimen("COCO annotations", "annotations/instances_train2017.json", _coco, _read_coco),
        Specimen("YOLO description", "data.yaml", _yolo, lambda p: _read_yolo(p.parent)),
        Specimen("YOLO labels", "labels/1.txt", _yolo, lambda p: _read_yolo(p.parent.parent)),
        Specimen("list of images", "train.txt", _listed, _read_listed),
        Specimen("IDX", "images.idx3", _plain_idx, lambda p: name_of(read_idx(p, 3).tolist())),
        Specimen("IDX, gzip", "images.idx3.gz", _idx, lambda p: name_of(read_idx(p, 3).tolist()), summed=True),
    )
}

__all__ = ["SPECIMENS", "CheckpointError", "Specimen"]
