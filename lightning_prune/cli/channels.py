"""`channels`: which channels of the dense model a pruned file still has, and their new numbers."""

from __future__ import annotations

import argparse
import json

from rich.console import Console

from lightning_prune.errors import PlanError, did_you_mean
from lightning_prune.files import write_text
from lightning_prune.graph.describe import ranges, renumbered
from lightning_prune.plan.basis import matches
from lightning_prune.reconstruction import ChannelMap
from lightning_prune.report.table import print_line

EVERY = 1 << 30  # characters: nothing is left out


def run(options: argparse.Namespace) -> int:
    """`lightning-prune channels PRUNED [--layer NAME]`."""
    found = ChannelMap.load(options.pruned)
    console = Console(highlight=False, markup=False)
    if options.layer is None:
        console.print(str(found), soft_wrap=True)
    else:
        _show(console, found, options.layer)
    if options.out:
        write_text(options.out, json.dumps(found.to_dict()))
        console.print(f"\nMap: {options.out}", soft_wrap=True)
    return 0


def _show(console: Console, found: ChannelMap, name: str) -> None:
    paths = [path for path in found.layers if matches(name, path)]
    if not paths:
        raise PlanError(f"no layer is named {name!r}.{did_you_mean(name, found.layers)}")
    for path in paths:
        console.print(path, style="bold", soft_wrap=True)
        for title, side in vars(found.layers[path]).items():
            print_line(console, f"{title}: {side if side.removed else f'{side}, as they were'}", indent="  ")
            if side.removed:
                print_line(console, f"removed: {ranges(side.removed, EVERY)}", indent="    ")
                print_line(console, f"old→new: {renumbered(side.keep)}", indent="    ")
