"""darknet's .weights files: a short header, then the numbers of every convolution in the order of the cfg.

Little-endian. Three int32 (major, minor, revision), then the images seen in training: 64 bits from version 0.2 on, 32
before. Then for every convolution: with batch norm beta, gamma, running mean and variance, else the bias; then the
weights (out, in, height, width); all float32. Other layers leave nothing. Names and shapes are not stored, so it is the
size that tells whether a file belongs to a network.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightning_prune.errors import WeightsError
from lightning_prune.models.yolo_parts import BOXES_PER_CELL, Convolution, YoloNetwork

FLOAT = 4


@dataclass(frozen=True)
class DarknetFile:
    """What a .weights file said of itself, and what was taken from it.

    Attributes:
        version: major, minor, revision of darknet.
        seen: images seen in training.
        loaded: numbers of the layers that were loaded, in darknet's counting.
        skipped: numbers of the convolutions that kept their own weights.
    """

    version: tuple[int, int, int]
    seen: int
    loaded: tuple[int, ...]
    skipped: tuple[int, ...]


def load_darknet_weights(model: YoloNetwork, path: str | Path, *, other_classes: bool = False) -> DarknetFile:
    """Load a complete .weights file, or a pretrained backbone (darknet53.conv.74, yolov3-tiny.conv.15).

    Args:
        model: whose convolutions give the sizes; a reconstructed, narrower one too.
        path: of the file.
        other_classes: take a file of the same network with another number of classes, all but the detection
            convolutions.

    Raises:
        WeightsError: no such file, not a darknet file, truncated, too long, of another network, or with numbers that
            no network has; the message gives the offset in bytes, and the model is as it was.

    Example:
        >>> import tempfile
        >>> from lightning_prune.models import YoloV3Tiny
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_darknet_weights(YoloV3Tiny(80, width=0.25), f"{folder}/coco.weights", seen=32_013_312)
        ...     file = load_darknet_weights(YoloV3Tiny(3, width=0.25), f"{folder}/coco.weights", other_classes=True)
        >>> file.seen, file.skipped
        (32013312, (15, 22))
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}") from error
    version, seen, start = _header(content, path)
    layers = model.darknet_layers()
    present, skipped = _contents(model, layers, len(content), start, path, other_classes)
    staged: list[tuple[Tensor, Tensor]] = []
    offset = start
    for number, shapes in present:
        for name, tensor, shape in shapes:
            count = int(np.prod(shape))
            values = np.frombuffer(content, "<f4", count, offset)
            _check(values, name, number, offset, path)
            if number not in skipped:
                staged.append((tensor, torch.from_numpy(values.astype(np.float32)).view(shape)))
            offset += count * FLOAT
    with torch.no_grad():
        for tensor, loaded in staged:
            tensor.copy_(loaded)
    taken = tuple(number for number, _ in present if number not in skipped)
    return DarknetFile(version, seen, taken, tuple(number for number, *_ in layers if number not in taken))


def save_darknet_weights(
    model: YoloNetwork,
    path: str | Path,
    *,
    seen: int = 0,
    version: tuple[int, int, int] = (0, 2, 0),
    upto: int | None = None,
) -> None:
    """Write a .weights file that darknet, or `load_darknet_weights`, reads.

    Args:
        model: whose weights to write, as float32.
        path: of the file; written as a whole or not at all.
        seen: images seen in training.
        version: of the format; before 0.2 ``seen`` has 32 bits.
        upto: number of the last layer to write, in darknet's counting; None: all. 74 makes a darknet53.conv.74.
    """
    path = Path(path)
    parts = [struct.pack("<3i", *version), struct.pack("<Q" if _wide(version) else "<i", seen)]
    for layer in model.darknet_layers():
        if upto is None or layer[0] <= upto:
            parts += [tensor.detach().cpu().float().numpy().astype("<f4").tobytes() for _, tensor in _tensors(layer)]
    draft = path.with_name(f"{path.name}.tmp")
    try:
        draft.write_bytes(b"".join(parts))
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _wide(version: tuple[int, int, int]) -> bool:
    return version[0] * 10 + version[1] >= 2


def _header(content: bytes, path: Path) -> tuple[tuple[int, int, int], int, int]:
    """Version, images seen, and where the numbers start."""
    if len(content) < 12:
        raise WeightsError(f"{path} ends at byte {len(content)}, inside the header of 16 or 20 bytes")
    version = struct.unpack_from("<3i", content)
    if not all(0 <= number < 1000 for number in version):
        raise WeightsError(
            f"{path} is not a darknet file: bytes 0 to 11 should hold its version and read "
            f"{'.'.join(map(str, version))}"
        )
    layout = "<Q" if _wide(version) else "<i"
    start = 12 + struct.calcsize(layout)
    if len(content) < start:
        raise WeightsError(f"{path} ends at byte {len(content)}, inside the header of {start} bytes")
    return version, struct.unpack_from(layout, content, 12)[0], start


Shapes = list[tuple[str, Tensor, tuple[int, ...]]]


def _contents(
    model: YoloNetwork, layers: list[Convolution], size: int, start: int, path: Path, other_classes: bool
) -> tuple[list[tuple[int, Shapes]], set[int]]:
    """The layers that the file holds with the shapes of their arrays, and the numbers of those to skip."""
    own = [(layer[0], [(name, tensor, tuple(tensor.shape)) for name, tensor in _tensors(layer)]) for layer in layers]
    ends = np.cumsum([start, *(FLOAT * sum(tensor.numel() for _, tensor, _ in shapes) for _, shapes in own)])
    backbone = sum(number <= model.backbone_end for number, _ in own)
    if size == ends[-1]:
        return own, set()
    if size == ends[backbone]:
        return own[:backbone], set()
    detectors = {number: conv for number, conv, norm in layers if norm is None}
    per_class = FLOAT * BOXES_PER_CELL * sum(1 + conv.weight[0].numel() for conv in detectors.values())
    difference = size - int(ends[-1])
    classes = model.num_classes + difference // per_class
    if difference % per_class or classes < 1:
        place = int(np.searchsorted(ends, size, side="right")) - 1
        where = (
            f"{size - ends[-1]} bytes after this network's last layer"
            if place == len(own)
            else f"inside layer {own[place][0]}, which takes bytes {ends[place]} to {ends[place + 1]}"
        )
        raise WeightsError(
            f"{path} ends at byte {size}, {where}: it is truncated or belongs to another network. Complete files of "
            f"this {type(model).__name__} have {ends[-1]} bytes, those of its backbone {ends[backbone]}"
        )
    if not other_classes:
        raise WeightsError(
            f"{path} has {size} bytes, which is this {type(model).__name__} with {classes} classes, and the model has "
            f"{model.num_classes}; pass other_classes=True to load all but the detection convolutions"
        )
    outputs = BOXES_PER_CELL * (5 + classes)
    there = [
        (number, [(name, t, (outputs, *shape[1:])) for name, t, shape in shapes] if number in detectors else shapes)
        for number, shapes in own
    ]
    return there, set(detectors)


def _tensors(layer: Convolution) -> list[tuple[str, Tensor]]:
    """What a convolution leaves in the file, in order."""
    _, conv, norm = layer
    if norm is None:
        assert conv.bias is not None
        return [("bias", conv.bias), ("weights", conv.weight)]
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return [
        ("beta", norm.bias),
        ("gamma", norm.weight),
        ("running mean", norm.running_mean),
        ("running variance", norm.running_var),
        ("weights", conv.weight),
    ]


def _check(values: np.ndarray, name: str, number: int, offset: int, path: Path) -> None:
    """Numbers that no trained network has show a foreign file of the right size."""
    wrong = ~np.isfinite(values)
    if name == "running variance":
        wrong |= values < 0
    if wrong.any():
        place = int(wrong.argmax())
        raise WeightsError(
            f"{path} is damaged or not a darknet file: byte {offset + place * FLOAT}, {name} of layer {number}, "
            f"reads {values[place]}"
        )
