"""Damaged files: each is read as it was written or refused by its name with a way out, and nothing in it runs."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.reliability.damages import Damage, applied
from benchmarks.reliability.specimens import Specimen
from lightning_prune.errors import PruningError, first_line

SECONDS = 20  # that reading may take
#: Words by which a refusal says what to do.
WAY_OUT = re.compile(
    r"\b(copy|download|fetch|unpack|delete|write|save|name|set|correct|pass|make|give|use|add|measure|install|export"
    r"|choose|load|take|leave|remove|put|is needed|must|needs?|should|are|has no|expected)\b"
)
GOOD = ("the same", "refused", "another")  # "another" only where no check sum could tell


class Outcome(NamedTuple):
    """What reading came to: one of `GOOD`, or what is wrong, and what was said."""

    what: str
    said: str = ""


class Prepared:
    """A specimen in a folder of its own, with what its whole file reads as."""

    def __init__(self, specimen: Specimen, folder: Path) -> None:
        self.specimen, self.folder = specimen, folder
        folder.mkdir(parents=True)
        specimen.make(folder)
        self.path, self.canary = folder / specimen.file, folder / "canary"
        self.content = self.path.read_bytes()
        self.whole = specimen.read(self.path)

    def outcome(self, damage: Damage, others: list[bytes]) -> Outcome:
        """Of reading the file with this damage."""
        content = applied(damage, self.content, others, self.canary)
        self.path.write_bytes(content)
        self.canary.unlink(missing_ok=True)
        try:
            found = self._read()
        finally:
            self.path.write_bytes(self.content)
        return Outcome("executed", found.said) if self.canary.exists() else found

    def _read(self) -> Outcome:
        try:
            with _limited(SECONDS):
                value = self.specimen.read(self.path)
        except PruningError as error:
            return _judged(str(error), self.path)
        except _TooLongError:
            return Outcome("too long")
        except Exception as error:  # noqa: BLE001  # what a user would see as a traceback
            return Outcome("raw error", first_line(error))
        if value == self.whole:
            return Outcome("the same")
        return Outcome("wrong, in spite of check sums" if self.specimen.summed else "another")


def _judged(said: str, path: Path) -> Outcome:
    if path.name not in said:
        return Outcome("refused without its name", said)
    if not WAY_OUT.search(said.replace(str(path), "")):
        return Outcome("refused without a way out", said)
    return Outcome("refused", said)


class _TooLongError(Exception):
    """Reading takes longer than it may."""


@contextmanager
def _limited(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise _TooLongError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    started = time.monotonic()
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        if time.monotonic() - started > 1.5 * seconds:
            raise _TooLongError
