"""Reading a stranger's file of tensors: of torch, in its old and new form, or of safetensors.

All of it is read, and its check sums compared, before any of it is used. Nothing in a file is ever executed.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint

from lightning_prune.errors import CheckpointError, PruningError, first_line
from lightning_prune.files import AGAIN, check_readable

_HEADER_START = 8  # bytes of a safetensors file that tell the length of its header, which is JSON


def read_tensors(path: str | os.PathLike[str], error: type[PruningError] = CheckpointError) -> dict[Any, Any]:
    """What a file of tensors holds: tensors, on the CPU, and plain data.

    Args:
        path: of a file that `torch.save` wrote, or of a ``.safetensors`` file.
        error: what refusals are raised as.

    Raises:
        PruningError: as ``error``; no such file, one that is damaged or cut short, of another kind, or one that holds
            objects, for which code from the file would have to run.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"bias": torch.zeros(2)}, f"{folder}/weights.pt")
        ...     read_tensors(f"{folder}/weights.pt")
        {'bias': tensor([0., 0.])}
    """
    path = Path(path)
    check_readable(path, error)
    try:
        content = _of_safetensors(path, error) if _is_safetensors(path) else _of_torch(path, error)
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror or problem}; {AGAIN}") from problem
    if not isinstance(content, dict) or not content:
        held = "nothing" if isinstance(content, dict) else f"a {type(content).__name__}"
        raise error(f"{path} holds {held}, it is not a checkpoint or a state dict; name a file that holds one")
    return content


def _of_torch(path: Path, error: type[PruningError]) -> Any:
    if zipfile.is_zipfile(path):
        _check_sums(path, error)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:
        code = code_in(path)
        if code:
            some = ", ".join(code[:3]) + (", ..." if len(code) > 3 else "")
            raise error(
                f"{path} cannot be read: it holds {some}, and reading that would run code from the file; save the "
                "weights alone, torch.save(model.state_dict(), ...), or leave such objects out of a LightningModule's "
                "checkpoint by save_hyperparameters(ignore=[...])"
            ) from problem
        raise error(f"{path} cannot be read: {_kind(path)}") from problem


def check_sums(archive: zipfile.ZipFile) -> None:
    """Read all that is in an archive; `zipfile.BadZipFile` where a bit is not as it was written."""
    for record in archive.infolist():
        if record.CRC == 0:
            continue  # torch.serialization.set_crc32_options(False), or nothing in it
        with archive.open(record) as stream:
            while stream.read(1 << 20):
                pass


def _check_sums(path: Path, error: type[PruningError]) -> None:
    """Refuse a file in which a bit is not as it was written: torch does not look."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {record.filename.partition("/")[2] for record in archive.infolist()}
            if "constants.pkl" in names:
                _refuse(path, "a scripted model (torch.jit)", error)
            if "archive_format" in names:
                _refuse(path, "a program of torch.export", error)
            check_sums(archive)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError) as problem:
        raise error(f"{path} is damaged: {first_line(problem)}; copy or download it again") from problem


def _refuse(path: Path, kind: str, error: type[PruningError]) -> NoReturn:
    raise error(f"{path} holds {kind}: save the weights of the eager model, torch.save(model.state_dict(), ...)")


def code_in(path: Path) -> list[str]:
    """Names of what a file would have to import; none if it cannot be told."""
    try:
        return sorted(get_unsafe_globals_in_checkpoint(path))
    except Exception:  # noqa: BLE001  # not a zip archive, a damaged pickle, ...
        return []


def _kind(path: Path) -> str:
    """What a file is, that is not torch's."""
    with path.open("rb") as stream:
        start = stream.read(4096)
    try:
        start.decode("utf-8")
    except UnicodeDecodeError as problem:
        if problem.start < len(start) - 3:  # else the last character was cut in two
            return f"damaged, cut short, or not a checkpoint at all; {AGAIN}"
    return "it is a text, not a checkpoint; name the file that holds the weights"


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as stream:
        start = stream.read(_HEADER_START + 1)
    return path.suffix == ".safetensors" or (start[_HEADER_START:] == b"{" and start[6:_HEADER_START] == b"\0\0")


def _of_safetensors(path: Path, error: type[PruningError]) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ModuleNotFoundError as problem:
        raise error(f"{path} is a safetensors file: reading it needs pip install safetensors") from problem
    try:
        return load_file(path)
    except (SafetensorError, ValueError, RuntimeError, KeyError) as problem:
        raise error(f"{path} is no safetensors file, or a damaged one: {first_line(problem)}; {AGAIN}") from problem
