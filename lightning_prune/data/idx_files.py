"""MNIST's file format: numbers of one byte with a header that says how many there are."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lightning_prune.errors import DataError

DEFLATE = 1032  # bytes that one byte of a gzip file can become at most


def find_idx(root: Path, names: tuple[str, ...], kind: str, dimensions: int) -> Path:
    """The file of ``kind`` ("images", "labels") under the first of some names that is there, packed or not."""
    files = [f"{name}-{kind}{mark}idx{dimensions}-ubyte{gz}" for name in names for mark in "-." for gz in ("", ".gz")]
    found = next((root / file for file in files if (root / file).is_file()), None)
    if found is None:
        raise DataError(
            f"{root.absolute()} holds no {files[0]}, with or without .gz at its end. Put MNIST's four files there, or "
            "set root, and prefix where the names begin with more"
        )
    return found


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """The bytes of an IDX file, in as many dimensions as it must have; gzip if its name ends in .gz.

    The header is two zeros, 8 for unsigned bytes, the number of dimensions, and each of them in four bytes, the highest
    first. Nothing beyond what it promises is read, and nothing at all if the file cannot hold that much.
    """
    packed = path.suffix == ".gz"
    try:
        with gzip.open(path) if packed else path.open("rb") as stream:
            header = stream.read(4 + 4 * dimensions)
            _check_header(header, dimensions, path)
            shape = struct.unpack(f">{dimensions}I", header[4:])
            size, promised = path.stat().st_size, math.prod(shape)
            content = stream.read(promised) if promised <= size * (DEFLATE if packed else 1) else b""
            more = len(content) == promised and stream.read(1)  # the end of a gzip file, where its checksum is
    except (OSError, EOFError, zlib.error) as error:
        state = "is no gzip file, or damaged" if packed else "cannot be read"
        raise DataError(f"{path} {state} ({error}); fetch it again") from error
    expected = f"{promised} bytes ({' x '.join(map(str, shape))}), as its header says"
    if len(content) < promised:
        held = f"has {len(content)}" if content else f"is {size} bytes long"
        raise DataError(f"{path} is cut: it {held} instead of {expected}; fetch it again")
    if more:
        raise DataError(f"{path} goes on after {expected}; fetch it again")
    return np.frombuffer(bytearray(content), dtype=np.uint8).reshape(shape)  # writable, as torch wants it


def _check_header(header: bytes, dimensions: int, path: Path) -> None:
    magic = bytes([0, 0, 8, dimensions])
    if header[:4] != magic:
        hint = ": it is packed, so its name must end in .gz" if header[:2] == b"\x1f\x8b" else ""
        raise DataError(
            f"{path} begins with {header[:4].hex(' ') or 'nothing'}, not with {magic.hex(' ')}, as bytes in "
            f"{dimensions} dimensions do in IDX files{hint or '; fetch it again'}"
        )
    if len(header) < 4 + 4 * dimensions:
        raise DataError(f"{path} is cut: its header has {len(header)} of {4 + 4 * dimensions} bytes; fetch it again")
