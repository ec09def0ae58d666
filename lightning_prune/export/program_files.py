"""Reading a program of torch.export: torch itself would run code that lies in such a file."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lightning_prune.errors import ExportError, first_line
from lightning_prune.files import check_readable
from lightning_prune.tensor_files import check_sums

#: Records of tensors and plain data, as torch 2.8 and newer write them, and older ones. Others hold pickled objects,
#: which would be executed, or compiled libraries.
_KNOWN = re.compile(
    r"(?:[^/]+/)?(?:archive_format|archive_version|version|byteorder|\.data/[^/]+|models/[^/]+\.json|extra/.+"
    r"|data/weights/(?:weight_\d+|[^/]+\.json|[^/]+\.pt)|data/constants/(?:tensor_\d+|[^/]+\.json|[^/]+\.pt)"
    r"|data/sample_inputs/[^/]+\.pt|serialized_\w+\.(?:json|pt)|extra_files/.+)"
)
_FORCED, _FORBIDDEN = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


def load_program(path: Path, extra_files: dict[str, Any] | None = None) -> torch.export.ExportedProgram:
    """What `torch.export.save` wrote, without running any code of the file; ``extra_files`` as torch has it.

    Raises:
        ExportError: no such file, a damaged one, or one that holds more than tensors and plain data.
    """
    check_readable(path, ExportError)
    try:
        with zipfile.ZipFile(path) as archive:
            strange = next((name for name in archive.namelist() if not _KNOWN.fullmatch(name)), None)
            check_sums(archive)  # torch does not look
        if strange is None:
            with _tensors_alone():
                return torch.export.load(path, extra_files=extra_files)
    except Exception as error:
        raise ExportError(f"cannot read {path}: {first_line(error)}; export it again") from error
    raise ExportError(f"{path} holds {strange!r}, for which code from the file would have to run; export it again")


@contextmanager
def _tensors_alone() -> Iterator[None]:
    """Make every `torch.load` take tensors and plain data alone, those of torch's own among them."""
    before = {name: os.environ.pop(name, None) for name in (_FORCED, _FORBIDDEN)}
    os.environ[_FORCED] = "1"
    try:
        yield
    finally:
        del os.environ[_FORCED]
        os.environ.update({name: value for name, value in before.items() if value is not None})
