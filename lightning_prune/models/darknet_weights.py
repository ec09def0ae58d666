"""darknet's .weights files: a short header, then the numbers of every convolution in the order of the cfg.

Little-endian. Three int32 (major, minor, revision), then the images seen in training: 64 bits from version 0.2 on, 32
before. Then for every convolution: with batch norm beta, gamma, running mean and variance, else the bias; then the
weights (out, in, height, width); all float32. Other layers leave nothing. Names and shapes are not stored, so it is the
size that tells whether a file belongs to a network.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lightning_prune.errors import WeightsError
from lightning_prune.files import atomic

if TYPE_CHECKING:
    from lightning_prune.models.yolo_parts import YoloNetwork

Convolution = tuple[int, nn.Conv2d, nn.BatchNorm2d | None]  # the first: its number in darknet's counting
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
    version, seen, offset = _header(content, path)
    arrays, skipped = _contents(model, len(content), offset, path, other_classes)
    staged: list[tuple[Tensor, Tensor]] = []
    for array in arrays:
        values = np.frombuffer(content, "<f4", math.prod(array.shape), offset)
        wrong = ~np.isfinite(values) | ((array.name == "running variance") & (values < 0))
        if wrong.any():  # as no trained network has them
            place = int(wrong.argmax())
            raise WeightsError(
                f"{path} is damaged or not a darknet file: byte {offset + place * FLOAT}, {array.name} of layer "
                f"{array.layer}, reads {values[place]}; download it again"
            )
        if array.layer not in skipped:
            staged.append((array.tensor, torch.from_numpy(values.astype(np.float32)).view(array.shape)))
        offset += values.nbytes
    with torch.no_grad():
        for tensor, loaded in staged:
            tensor.copy_(loaded)
    taken = tuple(dict.fromkeys(array.layer for array in arrays if array.layer not in skipped))
    return DarknetFile(version, seen, taken, tuple(n for n, *_ in model.darknet_layers() if n not in taken))


def save_darknet_weights(model: YoloNetwork, path: str | Path, *, seen: int = 0) -> None:
    """Write a .weights file of version 0.2 that darknet, or `load_darknet_weights`, reads.

    Args:
        model: whose weights to write, as float32.
        path: of the file; written as a whole or not at all.
        seen: images seen in training.
    """
    with atomic(Path(path)) as stream:
        stream.write(struct.pack("<3iQ", 0, 2, 0, seen))
        for array in _arrays(model):
            stream.write(array.tensor.detach().cpu().float().numpy().astype("<f4").tobytes())


def _header(content: bytes, path: Path) -> tuple[tuple[int, int, int], int, int]:
    """Version, images seen, and where the numbers start."""
    if len(content) < 12:
        raise WeightsError(
            f"{path} ends at byte {len(content)}, inside the header of 16 or 20 bytes; download it again"
        )
    version = struct.unpack_from("<3i", content)
    if not all(0 <= number < 1000 for number in version):
        raise WeightsError(
            f"{path} is not a darknet file: bytes 0 to 11 should hold its version and read "
            f"{'.'.join(map(str, version))}; name one, or download it again"
        )
    layout = "<Q" if version[0] * 10 + version[1] >= 2 else "<i"  # of the images seen
    start = 12 + struct.calcsize(layout)
    if len(content) < start:
        raise WeightsError(f"{path} ends at byte {len(content)}, inside the header of {start} bytes; download it again")
    return version, struct.unpack_from(layout, content, 12)[0], start


class _Array(NamedTuple):
    """Numbers in a file."""

    layer: int
    name: str
    tensor: Tensor
    shape: tuple[int, ...]  # in the file


def _arrays(model: YoloNetwork) -> list[_Array]:
    """What the convolutions leave in a file, in order."""
    arrays = []
    for layer, conv, norm in model.darknet_layers():
        tensors = {"bias": conv.bias}
        if norm is not None:
            tensors = {"beta": norm.bias, "gamma": norm.weight}
            tensors |= {"running mean": norm.running_mean, "running variance": norm.running_var}
        for name, tensor in (*tensors.items(), ("weights", conv.weight)):
            assert tensor is not None
            arrays.append(_Array(layer, name, tensor, tuple(tensor.shape)))
    return arrays


def _contents(
    model: YoloNetwork, size: int, start: int, path: Path, other_classes: bool
) -> tuple[list[_Array], set[int]]:
    """The arrays that a file of some size holds, and the numbers of the layers to skip."""
    arrays, end, ends = _arrays(model), start, {}
    for array in arrays:
        ends[array.layer] = end = end + FLOAT * array.tensor.numel()
    backbone = max(of for layer, of in ends.items() if layer <= model.backbone_end)
    if size == end:
        return arrays, set()
    if size == backbone:
        return [array for array in arrays if array.layer <= model.backbone_end], set()
    detectors = {layer for layer, _, norm in model.darknet_layers() if norm is None}
    boxes = len(model.anchors[0])  # per cell
    per_class = FLOAT * boxes * sum(math.prod(array.shape[1:]) for array in arrays if array.layer in detectors)
    classes = model.num_classes + (size - end) // per_class
    if (size - end) % per_class or classes < 1:
        layers = zip(ends, (start, *ends.values()), ends.values(), strict=False)
        cut = (f"inside layer {n}, which takes bytes {first} to {last}" for n, first, last in layers if size < last)
        where = next(cut, f"{size - end} bytes after this network's last layer")
        raise WeightsError(
            f"{path} ends at byte {size}, {where}: it is truncated or belongs to another network: download it again, or "  # noqa: E501
            f"build its network. Complete files of "
            f"this {type(model).__name__} have {end} bytes, those of its backbone {backbone}"
        )
    if not other_classes:
        raise WeightsError(
            f"{path} has {size} bytes, which is this {type(model).__name__} with {classes} classes, and the model has "
            f"{model.num_classes}; pass other_classes=True to load all but the detection convolutions"
        )
    outputs = boxes * (5 + classes)
    return [a._replace(shape=(outputs, *a.shape[1:])) if a.layer in detectors else a for a in arrays], detectors
