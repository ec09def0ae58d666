"""Ways in which a file can be damaged, drawn by hypothesis."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st

KINDS = ("cut", "bits", "zeros", "noise", "grown", "lines", "swapped", "code")


class Damage(NamedTuple):
    """One of them: where as shares of the file's length, and numbers that decide the rest."""

    kind: str
    places: tuple[float, ...]
    number: int


def damages() -> st.SearchStrategy[Damage]:
    """Any of them."""
    places = st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=4).map(tuple)
    return st.builds(Damage, st.sampled_from(KINDS), places, st.integers(0, 2**16 - 1))


class _Trap:
    """Leaves a trace if it is ever unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self) -> Any:
        return Path.touch, (Path(self.canary),)


class _OldTrap(_Trap):
    """The same by a builtin, which a list of dangerous modules may not hold."""

    def __reduce__(self) -> Any:
        return eval, (f"open({self.canary!r}, 'w').close()",)


def applied(damage: Damage, content: bytes, others: list[bytes], canary: Path) -> bytes:
    """The damaged content; never the same."""
    places = [int(share * len(content)) for share in damage.places]
    first, number = places[0], damage.number
    found = bytearray(content)
    if damage.kind == "cut":
        found = found[:first]
    elif damage.kind == "bits":
        for place in places:
            found[place] ^= 1 << number % 8
    elif damage.kind in ("zeros", "noise"):
        for place in range(first, min(len(found), first + 1 + number % 64)):
            found[place] = 0 if damage.kind == "zeros" else (number * (place + 1) * 40503 >> 4) % 256
    elif damage.kind == "grown":
        found[first:first] = bytes((number * (n + 1)) % 256 for n in range(1 + number % 32))
    elif damage.kind == "lines":
        start, end = sorted((first, places[-1]))
        found = found[:start] + found[end:] if number % 2 else found[:end] + found[start:]
    elif damage.kind == "swapped":
        found = bytearray(others[number % len(others)])
    else:
        found = bytearray(_code(number, content, canary))
    return bytes(found) if bytes(found) != content else b""


def _code(number: int, content: bytes, canary: Path) -> bytes:
    """A file that runs code where it is unpickled; of an archive only one record is another."""
    trap = (_Trap, _OldTrap)[number % 2](canary)
    form = number // 2 % 4
    if form == 0:
        return pickle.dumps({"state_dict": trap})
    stream = io.BytesIO()
    if zipfile.is_zipfile(io.BytesIO(content)) and form < 3:
        with zipfile.ZipFile(io.BytesIO(content)) as whole, zipfile.ZipFile(stream, "w") as archive:
            names = whole.namelist()
            for name in names:
                hit = name == names[number // 8 % len(names)]
                archive.writestr(name, pickle.dumps(trap) if hit else whole.read(name))
        return stream.getvalue()
    if form == 3:  # among the records of a program of torch.export
        with zipfile.ZipFile(stream, "w") as archive:
            for name in ("archive_format", "version", "data.pkl", "serialized_example_inputs.pt", "models/model.json"):
                archive.writestr(f"net/{name}", b"pt2" if name == "archive_format" else pickle.dumps(trap))
        return stream.getvalue()
    content = {"state_dict": {"stem.weight": torch.ones(1)}, "hyper_parameters": trap, "format": "lightning-prune/1"}
    torch.save(content, stream, _use_new_zipfile_serialization=form == 1)
    return stream.getvalue()
