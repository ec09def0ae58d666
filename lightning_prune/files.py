"""Writing a file as a whole or not at all, and reading a stranger's: what cannot be read is refused by its name."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from lightning_prune.errors import PruningError, first_line

AGAIN = "copy or write it again"  # the way out, where nothing of a file can be used
MOST_NODES = 1_000_000  # of a YAML file, counting what its aliases repeat


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


def write_text(path: Path, text: str) -> None:
    """Write a whole file, see `atomic`."""
    with atomic(path) as stream:
        stream.write(text.encode())


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
    with _explained(path):
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if path.is_dir():
            raise IsADirectoryError("Is a directory")
        tempfile.TemporaryFile(dir=folder).close()


def check_readable(path: str | os.PathLike[str], error: type[PruningError]) -> None:
    """Refuse, as ``error``, what is no file with something in it that this process may read."""
    path, wrong, start = Path(path), None, b""
    try:
        if path.is_dir():
            wrong = "is a folder, and a file is needed"
        elif path.exists() and not path.is_file():  # a device or a pipe could be read for ever
            wrong = "is no regular file"
        elif path.exists():
            with path.open("rb") as stream:
                start = stream.read(1)
    except (OSError, ValueError) as problem:  # ValueError: a null character in the name
        wrong = f"cannot be read: {getattr(problem, 'strerror', None) or problem}"
    if wrong:
        raise error(f"{str(path)[:200]} {wrong}")
    if not path.exists():
        raise error(f"there is no file {path}")
    if not start:
        raise error(f"{path} is empty: nothing was written to it, or it was cut short; {AGAIN}")


def read_text(path: str | os.PathLike[str], error: type[PruningError], what: str) -> str:
    """The text of a file; ``what`` it should be, for the refusal, which is raised as ``error``."""
    check_readable(path, error)
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as problem:
        raise error(f"{path} is no {what}: it holds no text, byte {problem.start} is no UTF-8; {AGAIN}") from problem
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror or problem}") from problem


def read_json(path: str | os.PathLike[str], error: type[PruningError], what: str) -> dict[str, Any]:
    """The object in a JSON file; ``what`` it should be, for the refusal, which is raised as ``error``."""
    text = read_text(path, error, what)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as problem:  # RecursionError: brackets in brackets without end
        raise error(f"{path} is no {what}, or a damaged one: {first_line(problem)}; {AGAIN}") from problem
    if not isinstance(data, dict):
        raise error(f"{path} is no {what}: it holds a {type(data).__name__}; {AGAIN}")
    return data


def read_yaml(path: str | os.PathLike[str], error: type[PruningError], what: str) -> dict[str, Any]:
    """The mapping in a YAML file; ``what`` it should be, for the refusal, which is raised as ``error``."""
    import yaml  # help needs none

    text = read_text(path, error, what)
    try:
        data = yaml.safe_load(text)
        nodes = _nodes(data, {})
    except (yaml.YAMLError, ValueError, RecursionError) as problem:  # ValueError: a date of month 13
        raise error(f"{path} is no {what}, or a damaged one: {_yaml_problem(problem)}; correct it") from problem
    if data is None:
        raise error(f"{path} is no {what}: nothing is in it but comments; {AGAIN}")
    if not isinstance(data, dict):
        raise error(f"{path} is no {what}: it holds a {type(data).__name__}, not names with values; correct it")
    if nodes > MOST_NODES:
        raise error(f"{path} is no {what}: its aliases repeat one another into more than {MOST_NODES:,} values")
    return data


def _nodes(value: Any, known: dict[int, int]) -> int:
    """Values in a value, with those that aliases repeat; an alias of what it lies in is endless, as recursion finds."""
    if not isinstance(value, (dict, list)):
        return 1
    if id(value) not in known:
        inside = [*value, *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_nodes(item, known) for item in inside)
    return known[id(value)]


def _yaml_problem(error: BaseException) -> str:
    """The cause and its place, in one line."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
    return f"{place}{problem or first_line(error)}"


def disk_error(error: BaseException) -> OSError | None:
    """What the system said: torch ends its archive on a full disk, which fails again with another error."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return cause


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:
        if (cause := disk_error(error)) is None:
            raise
        raise PruningError(f"cannot write {str(path)[:200]}: {cause.strerror or cause}") from error
