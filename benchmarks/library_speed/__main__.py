"""Command line, described in the package's docstring."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import benchmarks.library_speed
from benchmarks.library_speed import commands, pictures
from benchmarks.library_speed.report import report
from benchmarks.zoo import runner
from benchmarks.zoo.families import SUITES, Entry, entries, part_of
from benchmarks.zoo.runner import Row
from benchmarks.zoo.users import LIBRARIES

RESULTS = runner.ROOT / "benchmarks" / "results"
PEER_SUITES = SUITES[:-1]  # torchvision's three
PROGRAM = "benchmarks.library_speed"


def main(argv: list[str] | None = None) -> None:
    """Measure what has no row yet, and write the report."""
    given = _parser().parse_args(argv)
    if given.command == "worker":
        runner.work(given.memory_gib, _one)
        return
    peer, operators = given.results / "library_speed.jsonl", given.results / "library_speed_operators.jsonl"
    if given.command == "run":
        from benchmarks.library_speed.measure import Options

        options = Options(given.operators, given.repeats)
        given.results, folder = operators if given.operators else peer, given.results
        if not given.commands:
            runner.sweep(_entries(given), options, given, PROGRAM)
        if given.commands or not (given.operators or given.only or given.part):
            with peer.open("a", encoding="utf-8") as rows:
                for row in commands.measure(given.repeats):
                    rows.write(json.dumps(row | {"revision": runner.revision()}) + "\n")
                    print(f"{row['seconds']:7.2f} s  {row['key']}", flush=True)
        given.results = folder
    if given.command == "report" or given.write:
        found = [list(runner.read_rows(path).values()) for path in (peer, operators)]
        (given.results / "library_speed.md").write_text(report(*found), "utf-8")
        pictures.beside_peer(found[0], given.results / "library_speed.png")
        pictures.by_operators(found[1], given.results / "library_speed_operators.png")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        f"python -m {PROGRAM}",
        description=benchmarks.library_speed.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("command", nargs="?", default="run", choices=("run", "report", "worker"))
    add("--operators", action="store_true", help="traces against operators, over the zoos")
    add("--commands", action="store_true", help="the command line alone")
    add("--suite", choices=(*SUITES, "all", *LIBRARIES, "users"), help="default: torchvision's three; --operators: all")
    add("--only", metavar="TEXT", help="models whose key (suite/name) contains this text")
    add("--part", metavar="I/N", help="the i-th of n interleaved parts")
    add("--repeats", type=int, default=5)
    add("--redo", action="store_true", help="also models that have a row")
    add("--results", type=Path, default=RESULTS, metavar="FOLDER")
    add("--write", action="store_true", help="the report, after the run")
    add("--seconds-per-model", type=float, default=300.0)
    add("--seconds-for-peer", type=float, default=300.0, help="for the peer, in addition")
    add("--limit-seconds", type=float, help="start no new model after this time")
    add("--memory-gib", type=float, default=12.0, help="memory limit of the worker")
    parser.set_defaults(retry=False, workers=1)
    return parser


def _entries(given: argparse.Namespace) -> list[Entry]:
    if given.suite is None and not given.operators:
        found = [entry for suite in PEER_SUITES for entry in entries(suite, given.only)]
    else:
        found = entries(given.suite or "all", given.only)
    return part_of(found, given.part)


def _one(entry: Entry, options: Row, emit: Callable[[Row], None]) -> Row:
    """What the worker does with a model."""
    from benchmarks.library_speed.measure import Options, measure

    return measure(entry, Options(**options), emit)


if __name__ == "__main__":
    main()
