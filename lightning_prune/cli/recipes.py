"""The YAML recipes that ship with the package, found by short name such as `prune/jre.yaml`."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from rich.console import Console
from rich.text import Text

from lightning_prune.cli.parser import CONFIG_FLAGS, Parser, did_you_mean
from lightning_prune.errors import UnknownRecipeError


def recipe_paths() -> dict[str, Path]:
    """Shipped recipes by short name, in alphabetical order.

    Example:
        >>> recipe_paths()["prune/jre.yaml"].is_file()
        True
    """
    root = Path(str(resources.files("lightning_prune") / "conf"))
    return {path.relative_to(root).as_posix(): path for path in sorted(root.glob("*/*.yaml"))}


def describe(path: Path) -> str:
    """The description of a recipe: its first line, which is a comment."""
    with path.open(encoding="utf-8") as lines:
        return lines.readline().lstrip("#").strip()


def find_recipe(name: str) -> Path:
    """Path of a configuration: a file in the working directory, or else a shipped recipe.

    Raises:
        UnknownRecipeError: If it is neither; the message lists the recipes.

    Example:
        >>> find_recipe("task/resnet18_digits").name
        'resnet18_digits.yaml'
    """
    if Path(name).is_file():
        return Path(name)
    recipes = recipe_paths()
    for candidate in (name, f"{name}.yaml"):
        if candidate in recipes:
            return recipes[candidate]
    cause = f"no file '{name}' in {Path.cwd()}, and no recipe of that name.{did_you_mean(name, recipes)}"
    raise UnknownRecipeError("\n  ".join([f"{cause}\nRecipes:", *recipes]))


def resolve(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Replace the short names after `--config` by paths; also return the stems of all configurations.

    Example:
        >>> argv, stems = resolve(["--config", "prune/jre.yaml", "--trainer.max_epochs", "3"])
        >>> argv[0], argv[2:], stems
        ('--config', ['--trainer.max_epochs', '3'], ['jre'])
    """
    resolved, stems = list(argv), []
    for place, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if place and argv[place - 1] in CONFIG_FLAGS:
            prefix, value = "", word
        elif equals and flag in CONFIG_FLAGS:
            prefix = f"{flag}="
        else:
            continue
        path = find_recipe(value)
        stems.append(path.stem)
        resolved[place] = f"{prefix}{path}"
    return resolved, stems


def show(argv: Sequence[str]) -> None:
    """`lightning-prune recipes`: list them with their descriptions; a line each where no terminal limits it."""
    Parser("recipes", description="List the recipes that ship with the package.").parse_args(argv)
    console = Console()
    described = {name.removesuffix(".yaml"): describe(path) for name, path in recipe_paths().items()}
    for _, group in itertools.groupby(described, key=lambda name: name.partition("/")[0]):
        names = list(group)
        column = max(map(len, names)) + 2
        for name in names:
            text = described[name]
            lines = textwrap.wrap(text, max(20, console.width - column)) if console.is_terminal else [text]
            listed = f"\n{' ' * column}".join(lines)
            console.print(Text.assemble((name.ljust(column), "bold"), listed), soft_wrap=True)
        console.print()
    console.print(
        "Use one task, and any prune recipe after it; the file order counts:\n"
        "  lightning-prune fit --config task/resnet18_digits --config prune/jre",
        highlight=False,
        soft_wrap=True,
    )
