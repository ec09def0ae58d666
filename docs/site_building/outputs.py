"""What the pages' code prints and makes: run once for every build, shown where the pages say."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

from site_building.blocks import BLOCK, OUTPUT

MADE = re.compile(r"\]\(made/([\w.-]+)\)")  # a link to a file that the page's own code has written
# Small pages for a small machine: 80 columns, one thread, no progress bars.
ENVIRONMENT = {
    "COLUMNS": "80",
    "OMP_NUM_THREADS": "1",
    "MPLBACKEND": "Agg",
    "WANDB_MODE": "offline",
    "PL_TRAINER_ENABLE_PROGRESS_BAR": "False",
    "PL_TRAINER_ENABLE_MODEL_SUMMARY": "False",
    "PL_TRAINER_ACCELERATOR": "cpu",
}
# Colours that keep a contrast of 4.5 and more on the dark ground that terminals have on the site, in either mode.
BACK, TEXT = (30, 30, 40), (238, 238, 244)
RED, GREEN, YELLOW, BLUE = (255, 123, 114), (126, 231, 135), (242, 204, 96), (121, 192, 255)
THEME = TerminalTheme(BACK, TEXT, [BACK, RED, GREEN, YELLOW, BLUE, (210, 168, 255), (118, 227, 234), TEXT])


def run_pages(pages: list[Path], folder: Path) -> None:
    """Run every page that shows an output or a file that it makes."""
    due = [str(page) for page in pages if OUTPUT in page.read_text("utf-8") or MADE.search(page.read_text("utf-8"))]
    root = Path(__file__).parents[2]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")]))
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("run_pages.py")), str(folder), *due],
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if run.returncode:
        raise RuntimeError(f"the code of a page failed\n{run.stdout[-4000:]}")


def made_files(pages: list[Path], folder: Path) -> dict[str, Path]:
    """The files that pages link to and their code has written, by name; a missing one is a broken link of mkdocs'."""
    found = {}
    for page in pages:
        for name in MADE.findall(page.read_text("utf-8")):
            if (folder / page.stem / name).is_file():
                found[name] = folder / page.stem / name
    return found


def show_outputs(name: str, text: str, folder: Path) -> str:
    """The page with what its blocks printed in the place of every `OUTPUT`."""
    file = folder / f"{Path(name).stem}.json"
    if not file.exists():
        return text
    shown = iter(terminal(printed) for printed in json.loads(file.read_text("utf-8")))

    def below(match: re.Match[str]) -> str:
        if not match["output"]:
            return match[0]
        return match[0].removesuffix(OUTPUT).rstrip() + f"\n\n{next(shown)}\n"

    return BLOCK.sub(below, text)


def terminal(printed: str) -> str:
    """What a command printed, as HTML; lines are not broken, but scrolled."""
    console = Console(record=True, width=250, file=io.StringIO())
    console.print(Text.from_ansi(printed.rstrip("\n")), soft_wrap=True)
    code = console.export_html(theme=THEME, code_format="{code}", inline_styles=True).rstrip()
    return f'<pre class="terminal" tabindex="0">{code}</pre>'
