"""The code of a page: its fenced blocks and the comments that no reader sees.

``<!-- python ... -->`` is run in its place; ``<!-- NAME -->`` above a block says that it is the file NAME, and
``<!-- needs PACKAGE -->`` that it runs, on its own, only where PACKAGE is installed. ``<!-- output -->`` below a block
stands for what the block prints: the site shows it there.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

OUTPUT = "<!-- output -->"
BLOCK = re.compile(
    r"(?:^<!-- (?:needs (?P<needs>\w+)|(?P<name>[\w.]+)) -->\n)?^```(?P<kind>\w*)\n(?P<shown>.*?)^```$"
    r"(?P<output>\n+<!-- output -->$)?"
    r"|^<!-- python\n(?P<hidden>.*?)^-->$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """One block of a page.

    ``kind`` is its language, ``name`` the file that it is, ``needs`` the package without which it does not run;
    ``output``: its output is shown below it.
    """

    page: str
    line: int
    kind: str
    name: str
    text: str
    hidden: bool = False
    needs: str = ""
    output: bool = False


def blocks_of(page: str, text: str) -> list[Block]:
    """All blocks of a page, in order."""
    found = []
    for match in BLOCK.finditer(text):
        hidden = match["hidden"] is not None
        part = "hidden" if hidden else "shown"
        line = text.count("\n", 0, match.start(part)) + 1
        kind = "python" if hidden else match["kind"]
        marks = match["name"] or "", match[part], hidden, match["needs"] or "", bool(match["output"])
        found.append(Block(page, line, kind, *marks))
    return found


def command_lines(text: str) -> list[str]:
    """The lines of a shell block that are commands, continued lines as one."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line for line in lines if shlex.split(line, comments=True)]


def write_files(blocks: list[Block]) -> None:
    """Write the blocks that are files into the working folder."""
    for block in blocks:
        if block.name:
            Path(block.name).write_text(block.text, "utf-8")
