"""The YAML recipes that ship with the package, found by short name such as `prune/jre.yaml`."""

from __future__ import annotations

import itertools
import re
import sys
import textwrap
from collections.abc import Sequence
from contextlib import suppress
from importlib import resources
from pathlib import Path

from rich.console import Console
from rich.text import Text

from lightning_prune.cli.parser import CONFIG_FLAGS, Parser
from lightning_prune.errors import ConfigurationError, UnknownRecipeError, did_you_mean
from lightning_prune.files import read_yaml


def recipe_paths() -> dict[str, Path]:
    """Shipped recipes by short name, in alphabetical order; those of `reproduce` are its own."""
    root = Path(str(resources.files("lightning_prune") / "conf"))
    paths = (path for path in sorted(root.glob("*/*.yaml")) if path.parent.name != "reproduce")
    return {path.relative_to(root).as_posix(): path for path in paths}


def describe(path: Path) -> str:
    """The description of a recipe: its first line, which is a comment."""
    with path.open(encoding="utf-8") as lines:
        return lines.readline().lstrip("#").strip()


def find_recipe(name: str) -> Path:
    """Path of a configuration: a file in the working directory, or else a shipped recipe."""
    with suppress(OSError, ValueError):  # a name that no file can have
        if Path(name).is_file():
            return Path(name)
    recipes = recipe_paths()
    for candidate in (name, f"{name}.yaml"):
        if candidate in recipes:
            return recipes[candidate]
    cause = f"no file '{name}' in {Path.cwd()}, and no recipe of that name.{did_you_mean(name, recipes)}"
    raise UnknownRecipeError("\n  ".join([f"{cause}\nRecipes:", *recipes]))


def resolve(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Replace the short names after `--config` by paths; also return the stems of all configurations."""
    split = (word.split("=", 1) if word.partition("=")[0] in CONFIG_FLAGS else [word] for word in argv)
    words, stems = list(itertools.chain.from_iterable(split)), []
    for place, (before, word) in enumerate(itertools.pairwise(words), 1):
        if before in CONFIG_FLAGS:
            path = find_recipe(word)
            read_yaml(path, ConfigurationError, "configuration")  # jsonargparse, which reads it next, says less
            stems.append(_name_of(path))
            words[place] = str(path)
    return words, stems


def _name_of(config: Path) -> str:
    """That of the file, or of the run that has saved it as runs/NAME/fit/config.yaml."""
    folder = config.absolute().parent
    saved = re.fullmatch(r"config(-\d+)?", config.stem) and re.fullmatch(r"fit(-\d+)?", folder.name)
    return folder.parent.name if saved else config.stem


def show(argv: Sequence[str]) -> None:
    """`lightning-prune recipes`: list them with their descriptions; a line each where no terminal limits it."""
    Parser("recipes", description="List the recipes that ship with the package.").parse_args(argv)
    console = Console()
    described = {name.removesuffix(".yaml"): describe(path) for name, path in recipe_paths().items()}
    for _, group in itertools.groupby(described, key=lambda name: name.partition("/")[0]):
        names = list(group)
        column = max(map(len, names)) + 2
        width = max(column + 20, console.width) if console.is_terminal else sys.maxsize
        for name in names:
            line = f"{name:<{column}}{described[name]}"
            text = Text(textwrap.fill(line, width, subsequent_indent=" " * column))
            text.stylize("bold", 0, column)
            console.print(text, soft_wrap=True)
        console.print()
    console.print(
        "Use one task, and any prune recipe after it; the file order counts:\n"
        "  lightning-prune fit --config task/resnet18_digits --config prune/jre",
        highlight=False,
        soft_wrap=True,
    )
