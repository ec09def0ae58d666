"""CONTRIBUTING.md shows the package as it is: its folders and modules in the order of pyproject's layers."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
PICTURE = re.search(r"^```\n(cli.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)[1]
ROWS = [re.fullmatch(r"([|:] )?([\w.]+/?) +(\S.*)", line).groups("") for line in PICTURE.splitlines()]


def test_the_picture_names_every_folder_and_module() -> None:
    package = ROOT / "lightning_prune"
    modules = [path.name for path in package.glob("*.py") if path.name != "__init__.py"]
    folders = [f"{path.parent.name}/" for path in package.glob("*/__init__.py")]
    assert sorted(name for _, name, _ in ROWS) == sorted([*modules, *folders])


def test_the_picture_has_the_layers_of_pyproject() -> None:
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    layers = ast.literal_eval(re.search(r"^layers = (\[\n.*?^\])", text, re.MULTILINE | re.DOTALL)[1])
    shown = "\n".join(f"{beside}{name.removesuffix('.py').removesuffix('/')}" for beside, name, _ in ROWS)
    assert re.sub(r"\n([|:]) ", r" \1 ", shown).split("\n") == layers


def test_paths_in_the_text_exist() -> None:
    found = {
        (page.name, path)
        for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"))
        for path in re.findall(r"`([\w./]+(?:/|\.py))`", page.read_text("utf-8").replace("```", ""))
    }
    theirs = {("latency.md", "profile.py")}
    bases = (ROOT, ROOT / "lightning_prune", ROOT / "lightning_prune" / "graph")
    assert len(found) > 15
    assert {(page, path) for page, path in found if not any((base / path).exists() for base in bases)} == theirs


def test_it_fits_a_screen_or_two() -> None:
    assert len(TEXT.splitlines()) < 72
