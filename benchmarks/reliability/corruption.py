"""Damaged files: each is read as it was written or refused by its name with a way out, and nothing in it runs."""

from __future__ import annotations

import logging
import re
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import HealthCheck, Phase, given, seed, settings

from benchmarks.reliability.damages import Damage, applied, damages
from benchmarks.reliability.forked import run
from benchmarks.reliability.specimens import SPECIMENS, Specimen
from benchmarks.rows import Row, Rows
from lightning_prune.errors import PruningError, first_line

CAMPAIGN = "corruption"
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
            found = self._read(summed=self.specimen.summed and damage.kind != "code")
        finally:
            self.path.write_bytes(self.content)
        return Outcome("executed", found.said) if self.canary.exists() else found

    def _read(self, *, summed: bool) -> Outcome:
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
        return Outcome("wrong, in spite of check sums" if summed else "another")


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
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@dataclass
class Corruption:
    """The campaign: ``count`` damages of every kind of file, each specimen in a process of its own."""

    work: Path
    rows: Rows

    def go(self, count: int, only: str = "") -> None:
        """As many as are missing."""
        others = self._contents()
        for specimen in (specimen for specimen in SPECIMENS.values() if only in specimen.name):
            while (done := len(self._known(specimen))) < count:
                said = self.work / "said.txt"
                code = run(lambda: self._some(specimen, others, done, count - done), said, 3600)  # noqa: B023
                self.rows.reread()
                if code:  # the reader took its process with it
                    self._add(specimen, Outcome("died", f"{code}: {said.read_text('utf-8', 'replace')[-300:]}"))
            print(specimen.name, Counter(row["what"] for row in self._known(specimen)), flush=True)

    def _contents(self) -> list[bytes]:
        """Of all specimens, for the damage "swapped"; made once, in a process of its own."""
        folder = self.work / "whole"

        def make() -> None:
            shutil.rmtree(self.work, ignore_errors=True)
            for number, specimen in enumerate(SPECIMENS.values()):
                (folder / str(number)).mkdir(parents=True)
                specimen.make(folder / str(number))

        self.work.mkdir(parents=True, exist_ok=True)
        if not folder.exists() and run(make, self.work.with_suffix(".txt"), 600):
            raise SystemExit(f"no files to damage: {self.work.with_suffix('.txt').read_text('utf-8')}")
        return [(folder / str(n) / specimen.file).read_bytes() for n, specimen in enumerate(SPECIMENS.values())]

    def _some(self, specimen: Specimen, others: list[bytes], first: int, count: int) -> None:
        """In a forked process."""
        logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
        folder = self.work / "one"
        shutil.rmtree(folder, ignore_errors=True)
        prepared = Prepared(specimen, folder)

        @seed(first)
        @settings(
            max_examples=count,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(damages())
        def one(damage: Damage) -> None:
            print(damage, flush=True)
            self._add(specimen, prepared.outcome(damage, others), damage)

        one()

    def _add(self, specimen: Specimen, outcome: Outcome, damage: Damage | None = None) -> None:
        said = outcome.said.replace(str(self.work), "")
        kind = damage.kind if damage else "unknown"
        self.rows.add(campaign=CAMPAIGN, specimen=specimen.name, damage=kind, what=outcome.what, said=said[:300])

    def _known(self, specimen: Specimen) -> list[Row]:
        return [r for r in self.rows.rows if r["campaign"] == CAMPAIGN and r["specimen"] == specimen.name]
