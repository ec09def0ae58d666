"""Whether a file under its final name is a whole one."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image

from lightning_prune.errors import CheckpointError, first_line
from lightning_prune.model_state.digest import digest_of
from lightning_prune.tensor_files import read_tensors


def halves(folder: Path) -> list[str]:
    """The files that are not whole, each with what is wrong; hidden drafts do not count."""
    found = []
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden and path.suffix in READERS:
            try:
                READERS[path.suffix](path)
            except Exception as error:  # noqa: BLE001  # of whatever reader
                found.append(f"{path.relative_to(folder)}: {first_line(error)}")
    return found


def drafts(folder: Path) -> int:
    """Files that an interruption has left under hidden names."""
    return sum(path.is_file() and path.name.startswith(".") for path in folder.rglob("*"))


def plain(value: Any) -> Any:
    """Tensors as their digest, so that contents can be compared and kept as JSON."""
    if isinstance(value, torch.Tensor):
        return digest_of({"": value})
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value if isinstance(value, (int, float, str, type(None))) else str(value)


def name_of(value: Any) -> str:
    """A digest of plain data."""
    return hashlib.sha256(json.dumps(plain(value), sort_keys=True).encode()).hexdigest()[:16]


def _html(path: Path) -> None:
    if not path.read_text("utf-8").rstrip().endswith("</html>"):
        raise ValueError("the page does not end")


def _picture(path: Path) -> None:
    with Image.open(path) as image:
        image.load()


def _onnx(path: Path) -> None:
    import onnx

    onnx.checker.check_model(onnx.load(path))


def _lines(path: Path) -> None:
    """A journal: a last line that is cut short is what its format allows for, others are not."""
    for line in path.read_text("utf-8").split("\n")[:-1]:
        json.loads(line)


def _table(path: Path) -> None:
    """Every row has as many fields as the first; the last one may be growing."""
    text = path.read_text("utf-8")
    rows = list(csv.reader(text.splitlines()))
    rows = rows if text.endswith("\n") else rows[:-1]
    if rows and {len(row) for row in rows} != {len(rows[0])}:
        raise ValueError("rows of different lengths")


def _not_empty(path: Path) -> None:
    if not path.read_text("utf-8").strip():
        raise ValueError("nothing is in it")


def _yaml(path: Path) -> None:
    if not isinstance(yaml.safe_load(path.read_text("utf-8")), dict):
        raise ValueError("no settings are in it")


READERS: dict[str, Callable[[Path], Any]] = {
    ".ckpt": lambda path: read_tensors(path, CheckpointError),
    ".pt": lambda path: read_tensors(path, CheckpointError),
    ".json": lambda path: json.loads(path.read_text("utf-8")),
    ".jsonl": _lines,
    ".yaml": _yaml,
    ".html": _html,
    ".png": _picture,
    ".svg": _not_empty,
    ".md": _not_empty,
    ".csv": _table,
    ".onnx": _onnx,
}
