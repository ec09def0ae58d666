"""Types of options: each makes a value of a word, or says what was expected; read without torch."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from lightning_prune.cli.named_objects import is_path
from lightning_prune.errors import did_you_mean

T = TypeVar("T")
MOST = 2**31 - 1  # of anything that is counted
#: The names that `lightning_prune.criteria.criterion_from` knows, which imports torch.
CRITERIA = (
    *("apoz", "bn_scale", "dcp", "fpgm", "gre", "jre", "l1", "l2", "lre", "next_layer_taylor", "random", "taylor"),
    *("taylor_fo", "thinet"),
)
BUDGETS = ("flops", "params", "latency_ms")


def count(word: str) -> int:
    """A number of at least 1."""
    if not 1 <= (number := _whole(word)) <= MOST:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got '{word[:40]}'")
    return number


def least(word: str) -> float:
    """A number of at least 1, or a share of what there is."""
    if 1 <= (number := _whole(word)) <= MOST:
        return number
    if not 0 < (part := _number(word)) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, or a share below 1, got '{word[:40]}'")
    return part


def seed(word: str) -> int:
    """What generators of random numbers take."""
    if not 0 <= (number := _whole(word)) < 2**32:
        raise argparse.ArgumentTypeError(f"expected a seed from 0 to 4294967295, got '{word[:40]}'")
    return number


def rate(word: str) -> float:
    """A number above 0."""
    if not 0 < (number := _number(word)) < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got '{word[:40]}'")
    return number


def share(word: str) -> float:
    """A share of channels that go."""
    if not 0 <= (number := _number(word)) < 1:
        raise argparse.ArgumentTypeError(f"expected a share from 0 to below 1, such as 0.5, got '{word[:40]}'")
    return number


def _whole(word: str) -> int:
    return int(word) if word.isascii() and word.isdigit() and len(word) < 20 else -1


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        return math.nan


def list_of(kind: Callable[[str], T]) -> Callable[[str], list[T]]:
    """Several values, with commas between them."""

    def parse(text: str) -> list[T]:
        found = [kind(part.strip()) for part in text.split(",") if part.strip()]
        if not found:
            raise argparse.ArgumentTypeError("expected values with commas between them, got none")
        return found

    parse.__name__ = f"list of {kind.__name__}"  # argparse names it in errors
    return parse


def criterion(word: str) -> str:
    """A name of a criterion, in any case; or the path of one of the user's own, which is looked for later."""
    if is_path(word):
        return word
    if word.lower().replace("_", "") not in {name.replace("_", "") for name in CRITERIA}:
        hint = did_you_mean(word.lower(), CRITERIA)
        known = f"{', '.join(CRITERIA)}, or module:name"
        raise argparse.ArgumentTypeError(f"expected one of {known}, got '{word[:40]}'.{hint}")
    return word


def budget(words: str) -> dict[str, float]:
    """What may remain, by cost."""
    costs = {}
    for part in words.split(","):
        name, equals, value = part.partition("=")
        if not equals or math.isnan(number := _number(value)):
            raise argparse.ArgumentTypeError(f"takes COST=NUMBER, such as flops=0.5, got '{part[:40]}'")
        if name not in BUDGETS:
            hint = did_you_mean(name, BUDGETS)
            raise argparse.ArgumentTypeError(f"knows flops, params and latency_ms, got '{name[:40]}'.{hint}")
        most = math.inf if name == "latency_ms" else 1
        if not 0 < number < most:
            what = "milliseconds above 0" if name == "latency_ms" else "a share of the dense model's, between 0 and 1"
            raise argparse.ArgumentTypeError(f"{name} is {what}, got '{value[:40]}'")
        costs[name] = number
    return costs


def setting(word: str) -> str:
    """A word with a name, an equals sign and a value."""
    name, equals, _ = word.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got '{word[:40]}'")
    return word


def file(word: str) -> Path:
    """The path of a file to write, where no folder is."""
    path = Path(word)
    try:
        is_folder = word.endswith(("/", os.sep)) or path.is_dir()
    except (OSError, ValueError):  # what cannot be looked at cannot be written either, and is refused there
        is_folder = False
    if is_folder:
        raise argparse.ArgumentTypeError(f"'{word}' is a folder; name a file in it")
    return path
