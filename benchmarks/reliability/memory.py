"""Too little memory, for real: steps in a process that may not have more, whose model must stay as it was."""

from __future__ import annotations

import json
import os
import random
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lightning_prune as lp
from benchmarks.reliability.forked import run
from benchmarks.reliability.wholeness import name_of
from benchmarks.rows import Rows
from lightning_prune.errors import first_line

CAMPAIGN = "memory"
IMAGES = 24
#: What torch, Python and C++ say of it.
WORDS = ("memory", "MemoryError", "bad_alloc", "allocate", "could not create a primitive")
Step = Callable[[nn.Module, Any], Any]


def network() -> nn.Module:
    """Of some megabytes, so that a copy of it can be too much."""
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 96, 3), nn.BatchNorm2d(96), nn.ReLU(), nn.Conv2d(96, 256, 3), nn.ReLU()]
    return nn.Sequential(
        *body, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(4096, 256), nn.ReLU(), nn.Linear(256, 10)
    )


def _loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def _batches() -> list[Any]:
    return [(torch.rand(IMAGES, 3, 48, 48), torch.arange(IMAGES) % 10)]


def _images() -> torch.Tensor:
    return torch.zeros(1, 3, 48, 48)


def _planned(model: nn.Module) -> Any:
    graph = lp.trace(model, _images())
    return graph, lp.GlobalRatio(0.5).select(graph, lp.score(model, graph, "l1"))


STEPS: dict[str, tuple[Callable[[nn.Module], Any], Step]] = {
    "trace": (lambda _: None, lambda model, _: lp.trace(model, _images())),
    "score": (
        lambda model: lp.trace(model, _images()),
        lambda model, graph: lp.score(model, graph, "taylor", batches=_batches(), loss=_loss),
    ),
    "mask_": (_planned, lambda model, made: lp.mask_(model, *made)),
    "reconstruct": (_planned, lambda model, made: lp.reconstruct(model, *made)),
    "reconstruct_": (_planned, lambda model, made: lp.reconstruct_(model, *made)),
    "prune": (lambda _: None, lambda model, _: lp.prune(model, torch.zeros(4, 3, 48, 48), criterion="l1")),
    "save": (
        lambda model: lp.prune(model, _images(), criterion="l1"),
        lambda _, result: lp.save("small.pt", result.model, result.plan),
    ),
}


@dataclass
class OutOfMemory:
    """The campaign: every step with less than it needs."""

    work: Path
    rows: Rows

    def go(self, count: int, only: str = "") -> None:
        """As many as are missing."""
        self.work.mkdir(parents=True, exist_ok=True)
        for name in (name for name in STEPS if only in name):
            done = sum(row["campaign"] == CAMPAIGN and row["step"] == name for row in self.rows.rows)
            for number in range(done, max(1, round(count / len(STEPS)))):
                more = int(random.Random(f"{name} {number}").uniform(0, 1) ** 4 * (64 << 20))
                found = self.work / "found.json"
                found.unlink(missing_ok=True)
                code = run(lambda: starved(name, more, found), self.work / "said.txt", 300)  # noqa: B023
                known = (
                    json.loads(found.read_text("utf-8")) if found.exists() else {"what": f"died: {code}", "said": ""}
                )
                self.rows.add(campaign=CAMPAIGN, step=name, number=number, megabytes=more >> 20, **known)
                print(name, more >> 20, known, flush=True)


def starved(name: str, more: int, found: Path) -> None:
    """One step in a process that may have ``more`` bytes than it has."""
    before, step = STEPS[name]
    os.chdir(found.parent)
    Path("small.pt").unlink(missing_ok=True)
    torch.set_num_threads(1)
    model = network()
    made = before(model)
    was = name_of(model.state_dict()), str(model)
    with Path("/proc/self/statm").open() as stream:
        now = int(stream.read().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (now + more, hard))
    said, what = "", "it was enough"
    try:
        step(model, made)
    except Exception as error:  # noqa: BLE001  # which one, is what is asked here
        said = first_line(error)
        what = "refused" if any(word in f"{type(error).__name__}{error}" for word in WORDS) else "raw error"
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    if what != "it was enough" and (name_of(model.state_dict()), str(model)) != was:
        what = "the model has changed"
    if what != "it was enough" and Path("small.pt").exists():
        what = "half a file"
    found.write_text(json.dumps({"what": what, "said": said}), "utf-8")
