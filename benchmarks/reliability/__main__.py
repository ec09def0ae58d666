"""Ends, starves and feeds garbage to every part of the package, and writes down what became of it.

Run from the repository's root: ``python -m benchmarks.reliability --kills 200``, an hour on one core. Trials that the
file of ``--out`` holds are not repeated; ``--render`` writes benchmarks/results/reliability.md from it.
"""

from __future__ import annotations

import argparse
import os
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # runs are forked, and bit for bit equal

import torch

from benchmarks.reliability import __doc__ as about
from benchmarks.reliability.corruption import Corruption
from benchmarks.reliability.disks import FullDisks
from benchmarks.reliability.forked import import_all
from benchmarks.reliability.kills import Kills
from benchmarks.reliability.memory import OutOfMemory
from benchmarks.reliability.report import page
from benchmarks.rows import Rows

RESULTS = Path("benchmarks/results/reliability.md")


def options_of(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/reliability.jsonl"), help="the trials' rows"
    )
    parser.add_argument("--work", type=Path, default=Path("/dev/shm/reliability"), help="folder for the runs")
    parser.add_argument("--kills", type=int, default=200, metavar="N")
    parser.add_argument("--damages", type=int, default=200, metavar="N", help="of every kind of file")
    parser.add_argument("--disks", type=int, default=36, metavar="N", help="full disks; needs root")
    parser.add_argument("--memories", type=int, default=40, metavar="N", help="runs that memory is not enough for")
    parser.add_argument("--only", default="", help="subjects whose name contains this")
    parser.add_argument("--render", action="store_true", help=f"only write {RESULTS}")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = options_of(argv)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = Rows(options.out, {"torch": torch.__version__})
    if options.render:
        RESULTS.write_text(page(rows.rows), encoding="utf-8")
        return 0
    import_all()
    Corruption(options.work.absolute() / "damaged", rows).go(options.damages, options.only)
    OutOfMemory(options.work.absolute() / "starved", rows).go(options.memories, options.only)
    FullDisks(options.work.absolute() / "full", rows).go(options.disks, options.only)
    Kills(options.work.absolute() / "killed", rows).go(options.kills, options.only)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
