"""Runs are ended at random moments and begun again: they must end as the run that nobody ended."""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.reliability.forked import TRACEBACK, end, run, start
from benchmarks.reliability.phases import PHASES, Phases
from benchmarks.reliability.subjects import SUBJECTS, Subject, make_given, prepare
from benchmarks.reliability.wholeness import drafts, halves
from benchmarks.rows import Row, Rows

CAMPAIGN = "kills"
SIGNALS = (signal.SIGKILL,) * 6 + (signal.SIGTERM, signal.SIGINT)
LIMIT = 240.0  # seconds that a run may take


@dataclass
class Kills:
    """The campaign.

    Attributes:
        work: folder for the runs, best on another file system than that of temporary files, where a file cannot just
            be moved to its place.
        rows: what is known.
    """

    work: Path
    rows: Rows

    def __post_init__(self) -> None:
        self.phases = Phases()
        self.given, self.temporary = self.work / "given", Path(tempfile.mkdtemp(prefix="reliability-"))
        self.said = self.work / "said.txt"

    def go(self, count: int, only: str = "") -> None:
        """As many kills as are missing."""
        self.work.mkdir(parents=True, exist_ok=True)
        if not (self.given / "small.pt").exists() and run(lambda: make_given(self.given), self.said, LIMIT):
            raise SystemExit(f"what the runs start from could not be made:\n{self.said.read_text('utf-8')}")
        try:
            for subject, number in self._missing(count, only):
                known = self.rows.find(campaign="whole", subject=subject.name) or self.whole(subject)
                self.trial(subject, known, number)
        finally:
            shutil.rmtree(self.temporary, ignore_errors=True)

    def _missing(self, count: int, only: str) -> list[tuple[Subject, int]]:
        """Subjects with the numbers of their trials, so that all of them come on alike."""
        found = []
        for subject in (subject for subject in SUBJECTS.values() if only in subject.name):
            wanted = round(count * subject.share / 100)
            done = sum(row["campaign"] == CAMPAIGN and row["subject"] == subject.name for row in self.rows.rows)
            found += [((number + 0.5) / wanted, subject.name, number) for number in range(done, wanted)]
        return [(SUBJECTS[name], number) for _, name, number in sorted(found)]

    def _work(self, subject: Subject, folder: Path) -> int:
        tempfile.tempdir = str(self.temporary)
        self.phases.watch()
        return subject.run(folder)

    def whole(self, subject: Subject) -> Row:
        """The run in one go: its result, and how long it is in which phase."""
        folder = self.work / "whole"
        prepare(folder, self.given)
        self.phases.reset()
        started = time.perf_counter()
        code = run(lambda: self._work(subject, folder), self.said, LIMIT)
        if code or (wrong := halves(folder)):
            raise SystemExit(
                f"{subject.name} in one go: {code} {'' if code else wrong}\n{self.said.read_text('utf-8')}"
            )
        visits = {phase: self.phases.visits(phase) for phase in PHASES if self.phases.visits(phase)}
        return self.rows.add(
            campaign="whole",
            subject=subject.name,
            result=subject.result(folder),
            seconds=time.perf_counter() - started,
            visits=visits,
            each={phase: self.phases.seconds(phase) / times for phase, times in visits.items()},
        )

    def trial(self, subject: Subject, whole: Row, number: int) -> Row:
        """One kill, and what became of it."""
        draw = random.Random(f"{subject.name} {number}")
        folder = self.work / "trial"
        prepare(folder, self.given)
        for path in self.temporary.iterdir():
            path.unlink() if path.is_file() else shutil.rmtree(path)
        ended: Row | None = None
        while ended is None:
            ended = self._end_one(subject, folder, whole, draw, number)
            if ended is None:  # too late: the run was done
                prepare(folder, self.given)
        before = {path.relative_to(folder) for path in _files(folder)}
        broken = halves(folder)
        left = len(list(self.temporary.iterdir()))
        code = run(lambda: subject.run(folder), self.said, LIMIT)
        said = self.said.read_text("utf-8", "replace")
        wrong = [] if code == 0 else [f"begun again it ended with {code}: {said[-600:]}"]
        if not wrong:
            wrong += ["another result"] * (_result(subject, folder) != whole["result"])
            wrong += [f"half a file: {name}" for name in halves(folder)]
            wrong += [f"lost: {path}" for path in sorted(before) if not (folder / path).exists()]
        wrong += [f"half a file after the kill: {name}" for name in broken]
        wrong += ["it did not stop"] * (ended["code"] is None)
        return self._add(
            subject,
            number,
            **ended,
            wrong=wrong,
            drafts=drafts(folder),
            temporary=left,
        )

    def _end_one(self, subject: Subject, folder: Path, whole: Row, draw: random.Random, number: int) -> Row | None:
        """Start a run and end it at a random moment of a phase; None if it was done before."""
        met = sorted(whole["visits"], key=PHASES.index)
        phase, sign = met[number % len(met)], draw.choice(SIGNALS)
        visit = draw.randint(1, whole["visits"][phase])
        pause = draw.uniform(0, whole["each"][phase])
        self.phases.reset()
        child = start(lambda: self._work(subject, folder), self.said)
        if not self.phases.wait(child, phase, visit, LIMIT):
            end(child, 0.0)
            return None
        time.sleep(pause)
        now = self.phases.now
        os.kill(child, sign)
        code = end(child, 60.0)
        if code == 0:
            return None
        said = self.said.read_text("utf-8", "replace")
        return {"signal": sign.name, "phase": now, "code": code, "traceback": TRACEBACK in said, "said": said[-300:]}

    def _add(self, subject: Subject, number: int, **found: Any) -> Row:
        row = self.rows.add(campaign=CAMPAIGN, subject=subject.name, number=number, **found)
        print(subject.name, number, found["signal"], found["phase"], found["wrong"] or "ok", flush=True)
        return row


def _result(subject: Subject, folder: Path) -> str:
    try:
        return subject.result(folder)
    except Exception as error:  # noqa: BLE001  # a result that cannot be read is another one
        return repr(error)


def _files(folder: Path) -> list[Path]:
    """Those under final names."""
    return [
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
