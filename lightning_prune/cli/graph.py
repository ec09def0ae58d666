"""`graph`: which channels of a model go together and which cannot go, as a table and as a picture."""

from __future__ import annotations

import argparse

from rich.console import Console

from lightning_prune.cli.architecture import architecture, naming_input
from lightning_prune.files import write_text
from lightning_prune.graph import trace
from lightning_prune.report.graph_picture import graph_html, graph_svg

_PICTURES = {".html": graph_html, ".svg": graph_svg}


def run(options: argparse.Namespace) -> int:
    """`lightning-prune graph MODEL` or `lightning-prune graph --config TASK`."""
    known = architecture(options)
    inputs = known.example_inputs()
    with naming_input(inputs):
        graph = trace(known.dense, inputs, statistics=options.statistics)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(graph.describe())
    if options.out:
        write_text(options.out, _PICTURES[options.out.suffix](graph, title=known.name))
        console.print(f"\nPicture: {options.out}")
    return 0
