"""Where a link of the repository leads on the site, and the pages that the site takes from outside docs/."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

from site_building.blocks import BLOCK

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")
SINGLE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
FOLDERS = {"docs/": "", "benchmarks/results/": "results/"}


def pages_outside() -> dict[str, Path]:
    """Pages and pictures that stand elsewhere, by their place on the site."""
    files = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
    files += sorted(path for ending in ("md", "png") for path in ROOT.glob(f"benchmarks/results/*.{ending}"))
    return {on_site(path.relative_to(ROOT).as_posix()): path for path in files}


def on_site(path: str) -> str:
    """The place on the site of a file of the repository; "" if it has none."""
    for folder, place in FOLDERS.items():
        if path.startswith(folder):
            return place + path.removeprefix(folder)
    return SINGLE.get(path, "")


def rewrite_links(source: str, text: str) -> str:
    """Links of the page `source` (its path in the repository) as they lead on the site; plain text where to nowhere."""
    folder = PurePosixPath(source).parent.as_posix()

    def rewritten(match: re.Match[str]) -> str:
        mark, words, target, anchor = match.groups("")
        if "://" in target or target.startswith(("mailto:", "made/", "reference/")):
            return match[0]
        path = os.path.normpath(os.path.join(folder, target))  # noqa: PTH118
        place = on_site(path)
        known = place and (place.endswith((".md", ".png", ".svg")) or (source.startswith("docs/") and not mark))
        if not known or place.endswith(".py"):
            return f"**{words}**" if mark else words
        start = PurePosixPath(on_site(source)).parent.as_posix()
        return f"{mark}[{words}]({os.path.relpath(place, start)}{anchor})"

    parts, end = [], 0
    for match in BLOCK.finditer(text):  # code stays as it is
        parts += [LINK.sub(rewritten, text[end : match.start()]), match[0]]
        end = match.end()
    return "".join([*parts, LINK.sub(rewritten, text[end:])])
