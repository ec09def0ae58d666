"""Command line of the sweep, described in the package's docstring."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import benchmarks.zoo
from benchmarks.zoo import runner
from benchmarks.zoo.families import SUITES, Entry, entries, suites_of
from benchmarks.zoo.report import report
from benchmarks.zoo.runner import Row
from benchmarks.zoo.users import LIBRARIES

RESULTS = runner.ROOT / "benchmarks" / "results" / "zoo.jsonl"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.zoo",
        description=benchmarks.zoo.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("command", nargs="?", default="run", choices=("run", "report", "list", "worker"))
    add("--report", action="store_true", help="the same as the command report")
    add("--suite", default="all", choices=(*SUITES, "all", *LIBRARIES, "users"))
    add("--only", metavar="TEXT", help="models whose key (suite/name) contains this text")
    add("--part", metavar="I/N", help="the i-th of n interleaved parts")
    add("--peer", action="store_true", help="Torch-Pruning 1.6.1 beside it")
    add("--export", action="store_true", help="torch.export of the dense and the reconstructed model")
    add("--memory", action="store_true", help="peak memory of a forward and a trace")
    add("--repeats", type=int, default=1, help="rounds of the timing against the peer")
    add("--ratio", type=float, default=0.5, help="share of every layer that is removed")
    add("--redo", action="store_true", help="also models that have a row")
    add("--retry", action="store_true", help="also models whose row says that they were not pruned")
    add("--results", type=Path, default=RESULTS)
    add("--write", type=Path, metavar="FILE", help="the report goes there, after a run too")
    add("--seconds-per-model", type=float, default=300.0)
    add("--seconds-for-peer", type=float, default=120.0, help="for the peer, in addition")
    add("--workers", type=int, default=1, help="models at a time, each on one core")
    add("--limit-seconds", type=float, help="start no new model after this time")
    add("--memory-gib", type=float, default=12.0, help="memory limit of the worker")
    given = parser.parse_args(argv)
    if given.command == "worker":
        runner.work(given.memory_gib, _one)
        return
    if given.report or given.command == "report":
        _write(report(_chosen(given)), given.write)
        return
    found = entries(given.suite, given.only, given.part)
    if given.command == "list":
        print("\n".join(f"{entry.key}  {entry.family}  {entry.kind}" for entry in found))
        return
    from benchmarks.zoo.measure import Options

    options = Options(given.peer, given.export, given.memory, given.repeats, given.ratio)
    runner.sweep(found, options, given, "benchmarks.zoo")
    if given.write:
        _write(report(_chosen(given)), given.write)


def _one(entry: Entry, options: Row, emit: Callable[[Row], None]) -> Row:
    """What the worker does with a model."""
    from benchmarks.zoo.measure import Options, sweep_one

    return sweep_one(entry, Options(**options), emit)


def _chosen(given: argparse.Namespace) -> list[Row]:
    """The rows of the suites and models asked for."""
    suites = suites_of(given.suite)
    rows = runner.read_rows(given.results).values()
    return [row for row in rows if row["suite"] in suites and (given.only or "") in row["key"]]


def _write(text: str, path: Path | None) -> None:
    """To a file, or to standard output."""
    if path is None:
        print(text)
    else:
        path.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
