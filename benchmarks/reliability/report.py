"""The trials as a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from benchmarks.reliability.damages import KINDS
from benchmarks.reliability.memory import network
from benchmarks.reliability.phases import PHASES
from benchmarks.rows import Row
from lightning_prune.measure import count_params
from lightning_prune.report.table import Table

TEXT = """\
# Reliability

`python -m benchmarks.reliability`, tiny networks on two shared CPU cores; trials are in `{source}`. The package as it
is: {before}"""
BEFORE = """what the campaign found on its way was mended first and tried again (see
[what was tried](../../docs/guarantee.md#what-was-tried))."""
KILLS = """\
## Runs that are ended

{kills} runs were ended at a random moment of a phase ({signals}) and begun again by the same command, `fit` with
`--ckpt_path last` where there was a checkpoint. Right: the end has weights, optimizer state and numbers bit for bit as
the run that nobody ended, every file under its final name is whole after the kill and at the end, and none is gone.
The runs lie on another file system than temporary files. {drafts} runs left a hidden draft or a temporary file behind."""  # noqa: E501
DISKS = """\
## Full disks

{disks} runs on a disk that had room for a random part of what they write. Right: the error names the file that there was
no room for, what was there before is as it was, no file is half written, and with room again the command ends well."""  # noqa: E501
DAMAGES = """\
## Damaged files

{damages} files, {each} of every kind, damaged at random places by hypothesis ({kinds}; "code": a pickle, or one
record of the archive, that creates a file where it is executed). The same: read as it was written. Refused: by an error of this
package that names the file and a way out. Another: read as something else, which only files without check sums can be,
or archives whose sums were made anew."""  # noqa: E501
MEMORY = """\
## Too little memory

{memories} steps in a process that may have between 0 and 64 MiB more than it has (RLIMIT_AS), on a network of
{parameters:,} parameters. Right: the error speaks of memory, and the model is as it was, bit for bit."""


def page(rows: list[Row], source: str = "benchmarks/results/reliability.jsonl") -> str:
    """All of it as Markdown."""
    of = {name: [row for row in rows if row["campaign"] == name] for name in _PARTS}
    parts = [TEXT.format(source=source, before=BEFORE)]
    for name, part in _PARTS.items():
        if of[name]:
            parts += part(of[name])
    return "\n\n".join(parts) + "\n"


def _kills(rows: list[Row]) -> list[str]:
    signals = Counter(row["signal"] for row in rows)
    told = ", ".join(f"{count} by {name}" for name, count in signals.most_common())
    drafts = sum(bool(row["drafts"] or row["temporary"]) for row in rows)
    phases = [phase for phase in PHASES if any(row["phase"] == phase for row in rows)]
    found = []
    for subject in dict.fromkeys(row["subject"] for row in rows):
        own = [row for row in rows if row["subject"] == subject]
        met = Counter(row["phase"] for row in own)
        right = sum(not row["wrong"] for row in own)
        found.append((subject, str(len(own)), str(right), *(str(met[phase]) for phase in phases)))
    met = Counter(row["phase"] for row in rows)
    right = sum(not row["wrong"] for row in rows)
    found.append(("all", str(len(rows)), str(right), *(str(met[phase]) for phase in phases)))
    titles = ["command", "kills", "right", *phases]
    text = KILLS.format(kills=len(rows), signals=told, drafts=drafts)
    return [text, Table.of(titles, found).markdown(), *_wrong(rows)]


def _disks(rows: list[Row]) -> list[str]:
    found = []
    for subject in dict.fromkeys(row["subject"] for row in rows):
        own = [row for row in rows if row["subject"] == subject]
        fitted = sum(row["code"] == 0 for row in own)
        found.append((subject, str(len(own)), str(fitted), str(sum(not row["wrong"] for row in own))))
    titles = ["command", "full disks", "it fitted all the same", "right"]
    return [DISKS.format(disks=len(rows)), Table.of(titles, found).markdown(), *_wrong(rows)]


def _damages(rows: list[Row]) -> list[str]:
    good = ("the same", "refused", "another")
    found, bad = [], []
    for specimen in dict.fromkeys(row["specimen"] for row in rows):
        met = Counter(row["what"] for row in rows if row["specimen"] == specimen)
        others = met.total() - sum(met[what] for what in good)
        found.append((specimen, *(str(met[what]) for what in good), str(others)))
        bad += [f"{specimen}: {what}, {count} times" for what, count in met.items() if what not in good]
    each = len(rows) // len(found)
    text = DAMAGES.format(damages=f"{len(rows):,}", each=each, kinds=", ".join(KINDS))
    return [text, Table.of(["file", *good, "wrong"], found).markdown(), *_list(bad)]


def _memory(rows: list[Row]) -> list[str]:
    found, bad = [], []
    for step in dict.fromkeys(row["step"] for row in rows):
        met = Counter(row["what"] for row in rows if row["step"] == step)
        enough, refused = met["it was enough"], met["refused"]
        found.append((step, str(met.total()), str(refused), str(enough), str(met.total() - refused - enough)))
        bad += [f"{step}: {what}, {n} times" for what, n in met.items() if what not in ("refused", "it was enough")]
    titles = ["step", "trials", "refused, model unchanged", "it was enough", "wrong"]
    text = MEMORY.format(memories=len(rows), parameters=count_params(network()))
    return [text, Table.of(titles, found).markdown(), *_list(bad)]


def _wrong(rows: Iterable[Row]) -> list[str]:
    said = Counter(f"{row['subject']}: {wrong[:160].strip()}" for row in rows for wrong in row["wrong"])
    return _list(f"{what}, {count} times" for what, count in said.items())


def _list(lines: Iterable[str]) -> list[str]:
    text = "\n".join(f"- {line}" for line in lines)
    return [f"What went wrong:\n\n{text}"] if text else []


_PARTS = {"kills": _kills, "full disk": _disks, "corruption": _damages, "memory": _memory}
