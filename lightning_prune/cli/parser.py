"""What the commands' parsers share: refusals in one line, and the options that name a model or what is written."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lightning_prune.cli.option_types import count, file, setting
from lightning_prune.errors import ModelError, did_you_mean

CONFIG_FLAGS = ("--config", "-c")
_FIT_OPTIONS = ("--model.", "--data", "--seed_everything")  # of a Trainer none: nothing is trained


class UsageError(ModelError):
    """Options that say too little, or contradict one another, which is found after they are parsed."""


class Parser(argparse.ArgumentParser):
    """Options of one command; says what is wrong in one line."""

    def __init__(self, command: str, **options: Any) -> None:
        super().__init__(prog=f"lightning-prune {command}", allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Print the cause alone: the usage is what --help is for."""
        self.exit(2, f"error: {message}{'' if message.endswith(('?', '.')) else '.'} See {self.prog} --help.\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Answer what is no choice with the closest one."""
        choices = list(map(str, action.choices or ()))
        if choices and value not in choices:
            cause = f"invalid choice: '{str(value)[:40]}' (choose from {', '.join(choices)})"
            raise argparse.ArgumentError(action, f"{cause}.{did_you_mean(str(value), choices)}")

    def add_model_options(self, name: str = "--model") -> None:
        """Add what says which dense model the command is about; ``name`` is that of its first option."""
        add = self.add_argument_group("the dense model").add_argument
        metavar = "NAME" if name.startswith("-") else "MODEL"
        add(name, metavar=metavar, help="of torchvision, package.module:name or file.py:name")
        arguments = "argument of the model; repeat"
        add("--arg", type=setting, action="append", default=[], metavar="KEY=VALUE", help=arguments)
        config = "YAML file or recipe, with the options of fit"
        add(*CONFIG_FLAGS, action="append", default=[], metavar="TASK", help=config)
        add("--input", nargs="+", type=count, metavar="N", help="shape of the input, samples first")

    def add_output(self, help: str, *, default: str | None = None, required: bool = False) -> None:
        """Add the file that is written, which a later command leaves alone; see `refuse_used`."""
        said = help if default is None else f"{help}default: {default}"
        path = None if default is None else Path(default)
        self.add_argument("--out", type=file, default=path, required=required, metavar="FILE", help=said)
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


def _same_file(first: Path, second: Path) -> bool:
    try:
        return first.samefile(second)
    except (OSError, ValueError):  # one is not there, or cannot be by that name
        return False
