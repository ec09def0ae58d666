"""`graph`: which channels of a model go together and which cannot go, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lightning_prune.cli.architecture import architecture
from lightning_prune.cli.parser import CONFIG_FLAGS, Parser
from lightning_prune.errors import TraceError
from lightning_prune.files import atomic
from lightning_prune.graph import trace
from lightning_prune.report.graph_picture import graph_html, graph_svg

_USAGE = """lightning-prune graph MODEL [--arg KEY=VALUE ...] [--input 1 3 224 224] [--out graph.html]
       lightning-prune graph --config task/resnet18_digits.yaml [--model.KEY VALUE ...] [--input ...] [--out ...]"""
_PICTURES = {".html": graph_html, ".svg": graph_svg}


def run(argv: Sequence[str]) -> int:
    """`lightning-prune graph MODEL` or `lightning-prune graph --config TASK`."""
    parser = Parser(
        "graph",
        usage=_USAGE,
        description="Show which channels of a model go together, and which cannot be pruned and why.",
        epilog="With --config, the other options are those of lightning-prune fit.",
    )
    from_config = any(word.partition("=")[0] in CONFIG_FLAGS for word in argv)
    parser.add_model_options("--model" if from_config else "model")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write a picture: .html (with a table) or .svg")
    options = parser.parse_with_fit_options(argv)
    if options.out and options.out.suffix not in _PICTURES:
        parser.error(f"--out must end in .html or .svg, got '{options.out}'")

    known = architecture(options)
    inputs = known.example_inputs()
    try:
        graph = trace(known.dense, inputs)
    except TraceError as error:
        if inputs is known.task_inputs:
            raise
        cause = str(error).partition(" Pass inputs as")[0]  # this command can pass nothing but one tensor
        shape = tuple(inputs.shape)
        raise TraceError(f"{cause} The input was a tensor of shape {shape}; --input sets another.") from error
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(graph.describe())
    if options.out:
        with atomic(options.out) as stream:
            stream.write(_PICTURES[options.out.suffix](graph, title=known.name).encode())
        console.print(f"\nPicture: {options.out}")
    return 0
