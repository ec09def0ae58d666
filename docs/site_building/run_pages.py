"""Run the code of pages and keep what every block prints: `python run_pages.py FOLDER PAGE.md ...`, a process apart.

Each page runs in a folder of its own, FOLDER/PAGE; what it printed goes to FOLDER/PAGE.json, a list.
"""

from __future__ import annotations

import io
import json
import os
import shlex
import sys
from contextlib import redirect_stdout
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from site_building.blocks import Block, blocks_of, command_lines, write_files


def run_block(block: Block, namespace: dict[str, object]) -> str:
    """What a block prints."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        if block.kind == "python":
            exec(compile("\n" * (block.line - 1) + block.text, block.page, "exec"), namespace)
        else:
            _run_commands(block, printed)
    return printed.getvalue()


def _run_commands(block: Block, printed: io.StringIO) -> None:
    from lightning_prune.cli import main

    lines = command_lines(block.text)
    for line in lines:
        if len(lines) > 1:
            printed.write(f"$ {line}\n")
        os.environ["FORCE_COLOR"] = "1"  # as in a terminal
        status = main(shlex.split(line, comments=True)[1:])
        del os.environ["FORCE_COLOR"]
        if status:
            raise SystemExit(f"{block.page}:{block.line}: exit status {status} of: {line}")


def run_page(page: Path, folder: Path) -> list[str]:
    """What the blocks of a page print that show it, in order."""
    folder.mkdir(parents=True)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    blocks = blocks_of(page.name, page.read_text("utf-8"))
    write_files(blocks)
    namespace: dict[str, object] = {}
    outputs = []
    for block in blocks:
        if not block.name and not block.needs and (block.kind == "python" or block.output):
            text = run_block(block, namespace)
            if block.output:
                outputs.append(text)
    sys.path.remove(str(folder))
    return outputs


if __name__ == "__main__":
    out, *pages = (Path(name).absolute() for name in sys.argv[1:])
    for page in pages:
        outputs = run_page(page, out / page.stem)
        (out / f"{page.stem}.json").write_text(json.dumps(outputs), "utf-8")
