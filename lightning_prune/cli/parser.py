"""What the commands' parsers share: refusals in one line, types of options, and the options that name a model."""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")
MOST = 2**31 - 1  # of anything that is counted
CONFIG_FLAGS = ("--config", "-c")
_FIT_OPTIONS = ("--model.", "--data", "--seed_everything")  # of a Trainer none: nothing is trained


class Parser(argparse.ArgumentParser):
    """Options of one command; says what is wrong in one line."""

    def __init__(self, command: str, **options: Any) -> None:
        super().__init__(prog=f"lightning-prune {command}", allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Print the cause alone: the usage is what --help is for."""
        self.exit(2, f"error: {message}{'' if message.endswith('?') else '.'} See {self.prog} --help.\n")

    def add_model_options(self, name: str = "--model") -> None:
        """Add what says which dense model the command is about; ``name`` is that of its first option."""
        add = self.add_argument_group("the dense model").add_argument
        metavar = "NAME" if name.startswith("-") else "MODEL"
        add(name, metavar=metavar, help="of torchvision, package.module:name or file.py:name")
        add("--arg", action="append", default=[], metavar="KEY=VALUE", help="argument of the model; repeat")
        config = "YAML file or recipe, with the options of fit"
        add(*CONFIG_FLAGS, action="append", default=[], metavar="TASK", help=config)
        add("--input", nargs="+", type=count, metavar="N", help="shape of the input, samples first")

    def add_output(self, help: str, *, default: str | None = None, required: bool = False) -> None:
        """Add the file that is written, which a later command leaves alone; see `refuse_used`."""
        said = help if default is None else f"{help}default: {default}"
        path = None if default is None else Path(default)
        self.add_argument("--out", type=Path, default=path, required=required, metavar="FILE", help=said)
        self.add_argument("--overwrite", action="store_true", help="the file of --out, where there is one")

    def refuse_used(self, options: argparse.Namespace, option: str = "--out") -> None:
        """Refuse a file, or a folder with something in it, that an earlier command may have written."""
        path: Path | None = getattr(options, option.removeprefix("--"))
        if path is None:
            return
        for read in (getattr(options, name, None) for name in ("checkpoint", "pruned", "plan", "layer_ratios")):
            if read is not None and _same_file(Path(read), path):
                self.error(f"{option} {path} is what is read; write to another file")
        try:
            used = path.is_file() or (path.is_dir() and option != "--out" and any(path.iterdir()))
        except (OSError, ValueError):  # what cannot be looked at cannot be written either, and is refused there
            return
        if used and not options.overwrite:
            self.error(f"{path} is there already; name another with {option}, or add --overwrite")

    def refuse_idle(self, argv: Sequence[str], needed: Mapping[str, str]) -> None:
        """Refuse options that would be ignored: {option: what it needs}."""
        given = {word.partition("=")[0] for word in argv}
        for option, other in needed.items():
            if option in given and other not in given:
                self.error(f"{option} does nothing without {other}")

    def parse_with_fit_options(self, argv: Sequence[str]) -> argparse.Namespace:
        """The options, with those that `fit` knows in ``fit_options`` where there is a configuration to take them."""
        options, rest = self.parse_known_args(argv)
        unknown = [w for w in rest if not options.config or (w.startswith("--") and not w.startswith(_FIT_OPTIONS))]
        if unknown:
            hint = did_you_mean(unknown[0].partition("=")[0], self._option_string_actions)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint and f'.{hint}'}")
        return argparse.Namespace(**vars(options), fit_options=rest, prog=self.prog)


def count(word: str) -> int:
    """A number of at least 1, as the type of an option."""
    if not 1 <= (number := _whole(word)) <= MOST:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got '{word[:40]}'")
    return number


def seed(word: str) -> int:
    """What generators of random numbers take, as the type of an option."""
    if not 0 <= (number := _whole(word)) < 2**32:
        raise argparse.ArgumentTypeError(f"expected a seed from 0 to 4294967295, got '{word[:40]}'")
    return number


def rate(word: str) -> float:
    """A number above 0, as the type of an option."""
    try:
        number = float(word)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got '{word[:40]}'")
    return number


def _whole(word: str) -> int:
    return int(word) if word.isascii() and word.isdigit() and len(word) < 20 else -1


def _same_file(first: Path, second: Path) -> bool:
    try:
        return first.samefile(second)
    except (OSError, ValueError):  # one is not there, or cannot be by that name
        return False


def list_of(kind: Callable[[str], T]) -> Callable[[str], list[T]]:
    """The type of an option that takes several values, with commas between them."""

    def parse(text: str) -> list[T]:
        found = [kind(part.strip()) for part in text.split(",") if part.strip()]
        if not found:
            raise argparse.ArgumentTypeError("expected values with commas between them, got none")
        return found

    parse.__name__ = f"list of {kind.__name__}"  # argparse names it in errors
    return parse


def did_you_mean(word: str, names: Iterable[str], cutoff: float = 0.6) -> str:
    """A question after the closest of the names, or nothing."""
    close = difflib.get_close_matches(word, names, n=1, cutoff=cutoff)
    return f" Did you mean '{close[0]}'?" if close else ""
