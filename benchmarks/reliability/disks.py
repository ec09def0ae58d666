"""A disk that is full: the refusal names the file, what was there stays, and with room again the work is done."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from benchmarks.reliability.forked import TRACEBACK, run
from benchmarks.reliability.subjects import SUBJECTS, Subject, make_given, prepare
from benchmarks.reliability.wholeness import halves
from benchmarks.rows import Row, Rows

CAMPAIGN = "full disk"
ROOM = 64 << 20  # bytes of the small disk; a filler leaves less
LIMIT = 300.0
SHARES = {"fit classification": 5, "fit segmentation": 2, "prune": 3, "sensitivity": 3, "compare": 3, "export": 2}


@dataclass
class FullDisks:
    """The campaign, on a small file system in memory, which only root can mount."""

    work: Path
    rows: Rows

    def go(self, count: int, only: str = "") -> None:
        """As many full disks as are missing."""
        self.given, self.said, disk = self.work / "given", self.work / "said.txt", self.work / "disk"
        disk.mkdir(parents=True, exist_ok=True)
        if not (self.given / "small.pt").exists() and run(lambda: make_given(self.given), self.said, LIMIT):
            raise SystemExit(f"what the runs start from could not be made:\n{self.said.read_text('utf-8')}")
        total = sum(SHARES.values())
        for name, share in SHARES.items():
            if only not in name:
                continue
            done = sum(row["campaign"] == CAMPAIGN and row["subject"] == name for row in self.rows.rows)
            for number in range(done, round(count * share / total)):
                subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(disk)], check=True)
                try:
                    self.trial(SUBJECTS[name], disk, number)
                finally:
                    subprocess.run(["umount", "-l", str(disk)], check=True)

    def trial(self, subject: Subject, disk: Path, number: int) -> Row:
        """A disk on which some of what the run writes has no room."""
        folder, filler = disk / "run", disk / "filler"
        prepare(folder, self.given)
        whole = self.rows.find(campaign="written", subject=subject.name)
        if whole is None:
            if run(lambda: subject.run(folder), self.said, LIMIT):
                raise SystemExit(f"{subject.name} in one go:\n{self.said.read_text('utf-8')}")
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) - _size(self.given)
            whole = self.rows.add(campaign="written", subject=subject.name, size=size)
            prepare(folder, self.given)
        room = int(random.Random(f"{subject.name} {number}").uniform(0, 0.9) * whole["size"])
        _fill(filler, room)
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        code = run(lambda: subject.run(folder), self.said, LIMIT)
        said = self.said.read_text("utf-8", "replace")
        wrong = [
            f"lost: {path.name}"
            for path, content in before.items()
            if not path.exists() or path.read_bytes() != content
        ]
        wrong += [f"half a file: {name}" for name in halves(folder)]
        if code != 0:
            last = next((line for line in reversed(said.splitlines()) if line.startswith("error: ")), "")
            where = said[-900:] if TRACEBACK in said else last
            wrong += ["a traceback"] * (TRACEBACK in said)
            wrong += ["no error is said"] * (not last)
            wrong += [f"no file is named: {last}"] * (bool(last) and "No space left on device" not in last)
        else:
            where = last = "it fitted"
        filler.unlink()
        again = run(lambda: subject.run(folder), self.said, LIMIT)
        wrong += [f"with room again it ended with {again}: {self.said.read_text('utf-8', 'replace')[-300:]}"] * (
            again != 0
        )
        wrong += [f"half a file at the end: {name}" for name in halves(folder)]
        row = self.rows.add(
            campaign=CAMPAIGN, subject=subject.name, number=number, room=room, code=code, said=where, wrong=wrong
        )
        print(subject.name, number, room, last[:160], wrong or "ok", flush=True)
        return row


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def _fill(filler: Path, room: int) -> None:
    """Leave this many bytes on the disk."""
    free = shutil.disk_usage(filler.parent).free
    with filler.open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, max(1, free - room))
