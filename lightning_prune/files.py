"""Writing a file as a whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from lightning_prune.errors import PruningError


@contextmanager
def atomic(path: Path) -> Iterator[IO[bytes]]:
    """Open `path` for writing so that it holds the old content or the new, never a part.

    Raises:
        PruningError: it cannot be written.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with draft.open("wb") as stream:
                yield stream
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)


def append_line(path: Path, line: str) -> None:
    """Add a line to the end of a file; what an interruption left of an earlier line is dropped.

    Raises:
        PruningError: it cannot be written.
    """
    with _explained(path), path.open("r+b") as stream:
        whole = stream.read().rfind(b"\n") + 1
        stream.seek(whole)
        stream.truncate()
        stream.write(f"{line}\n".encode())


def check_writable(path: Path) -> None:
    """Refuse before the work what its result cannot be written to."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    with _explained(path):
        if path.is_dir():
            raise IsADirectoryError("Is a directory")
        tempfile.TemporaryFile(dir=folder).close()


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PruningError(f"cannot write {path}: {error.strerror or error}") from error
