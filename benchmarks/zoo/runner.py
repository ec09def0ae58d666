"""Run the sweep in worker processes: a crash, a hang or too much memory costs one row, not the sweep."""

from __future__ import annotations

import argparse
import json
import os
import queue
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from benchmarks.zoo.families import Entry

Row = dict[str, Any]
Options = Any  # a dataclass of plain data, which the child makes again
ROOT = Path(__file__).parents[2]
FAT = 4 << 20  # KiB: a worker that once held more than this is replaced, since allocators keep what they had
#: glibc: every larger block is a mapping of its own. It slows everything down, so only for ``--memory``.
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def read_rows(path: Path) -> dict[str, Row]:
    """Rows by key; the last one of a key counts, a line cut short by a crash does not."""
    rows: dict[str, Row] = {}
    if path.exists():
        for line in path.read_text("utf-8").splitlines():
            with suppress(json.JSONDecodeError, KeyError, TypeError):
                row = json.loads(line)
                rows[row["key"]] = row
    return rows


def is_done(row: Row | None, options: Options) -> bool:
    """Whether a row has all that these options ask for."""
    asked = [name for name in ("peer", "export", "memory") if getattr(options, name, False)]
    # What failed earlier never reached export or memory; trying again would not get there either.
    return row is not None and all(name in row or (name != "peer" and row["outcome"] != "pruned") for name in asked)


def sweep(entries: Iterable[Entry], options: Options, given: argparse.Namespace, program: str) -> None:
    """Append a row per model to the results; models that have one are left out unless ``--redo``.

    program: the module whose command ``worker`` calls `work`.
    """
    path, limit = given.results, given.limit_seconds
    path.parent.mkdir(parents=True, exist_ok=True)
    known = {} if given.redo else read_rows(path)
    if given.retry:
        known = {key: row for key, row in known.items() if row["outcome"] == "pruned"}
    todo = [entry for entry in entries if not is_done(known.get(entry.key), options)]
    print(f"{len(todo)} models to do; results in {path}", flush=True)
    start, lock, left = time.monotonic(), threading.Lock(), enumerate(todo, 1)

    def one_after_the_other(results: IO[str]) -> None:
        environment = RETURN_MEMORY if getattr(options, "memory", False) else {}
        with Worker(path.with_suffix(".log"), given.memory_gib, program, environment) as worker:
            while limit is None or time.monotonic() - start <= limit:
                with lock:
                    number, entry = next(left, (0, None))
                if entry is None:
                    return
                began = time.monotonic()
                row = worker.run(entry, options, given.seconds_per_model, given.seconds_for_peer)
                row |= {"seconds_in_all": round(time.monotonic() - began, 2), "revision": revision()}
                with lock:
                    results.write(json.dumps(row) + "\n")
                    results.flush()
                    print(_told(row, f"{number:4}/{len(todo)}"), flush=True)

    with path.open("a", encoding="utf-8") as results, ThreadPoolExecutor(given.workers) as threads:
        list(threads.map(one_after_the_other, [results] * given.workers))
    if not_begun := sum(1 for _ in left):
        print(f"time is up; {not_begun} models left")


def _told(row: Row, number: str) -> str:
    peer = f"  peer: {row['peer'].get('outcome')}" if row.get("peer") else ""
    return f"{number} {row['seconds_in_all']:7.1f} s  {row['key']:<52} {row['outcome'][:90]}{peer[:60]}"


def revision() -> str:
    """The git commit, with a plus if files differ from it. Only for information: rows of any revision count."""

    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=False).stdout

    return git("rev-parse", "--short", "HEAD").strip() + ("+" if git("status", "--porcelain").strip() else "")


class Worker:
    """A child process that handles one model after the other; started on demand, and again after it died."""

    def __init__(self, log: Path, memory_gib: float, program: str, environment: dict[str, str] | None = None) -> None:
        self.log, self.memory_gib, self.program = log, memory_gib, program
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **(environment or {})}
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def run(self, entry: Entry, options: Options, seconds: float, peer_seconds: float = 120.0) -> Row:
        """The row of a model; if the worker dies or takes too long, what was known until then and why it ended."""
        process = self._started()
        assert process.stdin is not None
        deadline = time.monotonic() + seconds
        partial: Row | None = None
        try:
            process.stdin.write(json.dumps({"entry": asdict(entry), "options": asdict(options)}) + "\n")
            process.stdin.flush()
            while True:
                line = self._lines.get(timeout=max(0.1, deadline - time.monotonic()))
                if line is None:
                    process.wait()
                    end = f"the process ended with code {process.returncode}"
                    break
                message = json.loads(line)
                if "row" in message:
                    if message.get("fat"):
                        self.stop()
                    return message["row"]
                partial, seconds = message["partial"], peer_seconds
                deadline = time.monotonic() + seconds
        except queue.Empty:
            end = f"not done after {seconds:g} s"
        except BrokenPipeError:
            end = "the process had ended"
        self.stop()
        if partial is not None:
            partial["peer"] = {"outcome": f"error: {end}"}
            return partial
        return {**asdict(entry), "key": entry.key, "seconds": {}, "outcome": f"error: {end}"}

    def stop(self) -> None:
        """End the child, if there is one."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        assert process.stdout is not None
        process.kill()
        process.wait()
        self._reader.join()
        with suppress(BrokenPipeError):  # what was not yet written to a child that is gone
            process.stdin.close()
        process.stdout.close()

    def _started(self) -> subprocess.Popen[str]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.stop()
        command = [sys.executable, "-m", self.program, "worker", "--memory-gib", str(self.memory_gib)]
        with self.log.open("a", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
                env=self.environment,
            )
        self._lines = queue.Queue()
        assert self._process.stdout is not None
        self._reader = threading.Thread(target=_pump, args=(self._process.stdout, self._lines), daemon=True)
        self._reader.start()
        return self._process


def _pump(stream: IO[str], lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def work(memory_gib: float, one: Callable[[Entry, Row, Callable[[Row], None]], Row]) -> None:
    """The child: a model per line of standard input, a row per line of what was standard output.

    one: makes the row of a model with these options; it may hand over what it has so far, before what may hang.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a model or the peer prints goes to the log
    limit = int(memory_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    import torch

    torch.set_num_threads(1)

    def answer(message: Row) -> None:
        answers.write(json.dumps(message, default=str) + "\n")
        answers.flush()

    for line in sys.stdin:
        task = json.loads(line)
        row = one(Entry(**task["entry"]), task["options"], lambda part: answer({"partial": part}))
        answer({"row": row, "fat": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > FAT})
