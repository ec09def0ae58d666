"""Coloured rectangles as a tiny tree of files in YOLO's format; ultralytics kept off the network."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# Read when ultralytics is imported.
os.environ.setdefault("YOLO_OFFLINE", "1")
os.environ.setdefault("YOLO_AUTOINSTALL", "false")
os.environ.setdefault("YOLO_CONFIG_DIR", str(Path(tempfile.gettempdir()) / "lightning-prune-ultralytics"))

SIDE, NAMES = 64, ("red", "green", "blue")
TRAINING: dict[str, Any] = {
    "epochs": 1,
    "imgsz": SIDE,
    "batch": 4,
    "device": "cpu",
    "workers": 0,
    "plots": False,
    "verbose": False,
    "exist_ok": True,
    "optimizer": "SGD",
    "lr0": 0.01,
    "nbs": 4,  # a step after every batch
    "warmup_epochs": 0.0,
}


def make_tree(folder: Path, task: str, images: int = 8) -> str:
    """What to give as ``data``: a YAML file, or for classification the folder."""
    generator = np.random.default_rng(0)
    for part in ("train", "val"):
        for number in range(images):
            pixels = generator.integers(0, 60, (SIDE, SIDE, 3), dtype=np.uint8)
            lines = []
            for place in range(1 if task == "classify" else 2):
                kind = number % 3 if task == "classify" else int(generator.integers(3))
                width, height = generator.integers(16, 28, 2)
                left, top = 32 * place + generator.integers(0, 4), generator.integers(0, SIDE - height)
                pixels[top : top + height, left : left + width] = 255 * (np.arange(3) == kind)
                lines.append(_label(task, kind, *(np.array([left, top, width, height]) / SIDE)))
            if task == "classify":
                path = folder / part / NAMES[kind] / f"{number}.png"
            else:
                path = folder / "images" / part / f"{number}.png"
                label = folder / "labels" / part / f"{number}.txt"
                label.parent.mkdir(parents=True, exist_ok=True)
                label.write_text("\n".join(lines), "ascii")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    if task == "classify":
        return str(folder)
    names = "".join(f"\n  {number}: {name}" for number, name in enumerate(NAMES))
    points = "kpt_shape: [4, 3]\n" if task == "pose" else ""
    text = f"path: {folder}\ntrain: images/train\nval: images/val\n{points}names:{names}\n"
    (folder / "data.yaml").write_text(text, "utf-8")
    return str(folder / "data.yaml")


def _label(task: str, kind: int, left: float, top: float, width: float, height: float) -> str:
    right, bottom = left + width, top + height
    corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
    box = [left + width / 2, top + height / 2, width, height]
    numbers = {
        "detect": box,
        "segment": [x for corner in corners for x in corner],
        "obb": [x for corner in corners for x in corner],
        "pose": [*box, *(x for corner in corners for x in (*corner, 2))],
        "classify": [],
    }[task]
    return " ".join(map(str, [kind, *numbers]))
