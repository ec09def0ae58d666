"""What is compared: how a network is made smaller, and what helps it afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Library = Literal["none", "lightning-prune", "Torch-Pruning"]
Repair = Literal["none", "batch norm", "least squares"]
CRITERIA = (
    "l1", "l2", "fpgm", "lre", "gre", "jre", "taylor", "taylor_fo", "next_layer_taylor", "apoz", "bn_scale", "thinet",
    "dcp", "random",
)  # fmt: skip


@dataclass(frozen=True)
class Method:
    """One line of the table.

    Attributes:
        library: whose pruning; "none": the dense network, the control.
        criterion: what is scored, as the library names it.
        uniform: the same share of every layer goes; else the weakest over the network.
        tolerant: of every layer so much goes that the network loses the same by that layer alone: its sensitivity.
        relative: scores are divided by their layer's mean before layers are compared.
        per_mac: of the network, those go whose score is lowest for the multiply-accumulates that they cost.
        sparse_epochs: of sparse learning before anything goes; they come on top of the fine-tuning.
        steps: score and prune so many times, one after the other, before any training.
        rounds: prune in so many steps over the first half of the fine-tuning; 1: at once, before it.
        repair: of what remains, before fine-tuning.
        distilled: the dense network teaches, beside the labels.
    """

    library: Library
    criterion: str = ""
    uniform: bool = False
    tolerant: bool = False
    relative: bool = False
    per_mac: bool = False
    sparse_epochs: int = 0
    steps: int = 1
    rounds: int = 1
    repair: Repair = "none"
    distilled: bool = False


def _ours(criterion: str, **options: object) -> Method:
    return Method("lightning-prune", criterion, **options)  # type: ignore[arg-type]


def _peer(criterion: str, **options: object) -> Method:
    return Method("Torch-Pruning", criterion, **options)  # type: ignore[arg-type]


SPARSE = 2  # epochs of sparse learning
STEPS, MANY = 8, 24  # where a method prunes in several before training
PART = "taylor_fo"  # the criterion under which single parts of a recipe are judged

METHODS: dict[str, dict[str, Method]] = {
    "control": {
        "dense": Method("none"),
        "dense, distilled": Method("none", distilled=True),
        f"dense, {SPARSE} epochs more": Method("none", sparse_epochs=SPARSE),
        f"dense, {SPARSE} epochs more, distilled": Method("none", sparse_epochs=SPARSE, distilled=True),
    },
    "criteria": {
        **{name: _ours(name) for name in CRITERIA},
        "l1, every layer alike": _ours("l1", uniform=True),
    },
    "peer": {
        "TP GroupNorm": _peer("group_norm"),
        "TP L1": _peer("l1"),
        "TP L2": _peer("l2"),
        "TP Taylor": _peer("taylor"),
        "TP GroupNorm, sparse learning": _peer("group_sl", sparse_epochs=SPARSE),
        "TP BN scale, sparse learning": _peer("bn_scale", sparse_epochs=SPARSE),
        "TP Taylor, distilled": _peer("taylor", distilled=True),
        "TP GroupNorm, sparse learning, distilled": _peer("group_sl", sparse_epochs=SPARSE, distilled=True),
        "TP GroupNorm, alike": _peer("group_norm", uniform=True),
        "TP Taylor, alike": _peer("taylor", uniform=True),
        "TP GroupNorm, alike, distilled": _peer("group_norm", uniform=True, distilled=True),
        "TP Taylor, alike, distilled": _peer("taylor", uniform=True, distilled=True),
        "TP GroupNorm, alike, sparse learning, distilled": _peer(
            "group_sl", uniform=True, sparse_epochs=SPARSE, distilled=True
        ),
    },
    "parts": {
        f"{PART}, batch norm": _ours(PART, repair="batch norm"),
        f"{PART}, least squares": _ours(PART, repair="least squares"),
        f"{PART}, 4 rounds": _ours(PART, rounds=4),
        f"{PART}, distilled": _ours(PART, distilled=True),
        f"{PART}, sparse learning": _ours(PART, sparse_epochs=SPARSE),
        f"{PART}, every layer alike": _ours(PART, uniform=True),
        f"{PART}, per MAC": _ours(PART, per_mac=True),
        f"{PART}, least squares, distilled": _ours(PART, repair="least squares", distilled=True),
        f"{PART}, 4 rounds, distilled": _ours(PART, rounds=4, distilled=True),
        f"{PART}, 4 rounds, least squares, distilled": _ours(PART, rounds=4, repair="least squares", distilled=True),
    },
    "together": {
        f"{PART}, alike, distilled": _ours(PART, uniform=True, distilled=True),
        f"{PART}, alike, least squares, distilled": _ours(PART, uniform=True, repair="least squares", distilled=True),
        f"{PART}, alike, 4 rounds, distilled": _ours(PART, uniform=True, rounds=4, distilled=True),
        f"{PART}, alike, 4 rounds, least squares, distilled": _ours(
            PART, uniform=True, rounds=4, repair="least squares", distilled=True
        ),
        f"{PART}, alike, sparse learning, distilled": _ours(PART, uniform=True, sparse_epochs=SPARSE, distilled=True),
        f"{PART}, per MAC, 4 rounds, distilled": _ours(PART, per_mac=True, rounds=4, distilled=True),
        "l2, alike, distilled": _ours("l2", uniform=True, distilled=True),
        "l2, same tolerance, distilled": _ours("l2", tolerant=True, distilled=True),
        "thinet, distilled": _ours("thinet", distilled=True),
        f"{PART}, alike, {STEPS} steps": _ours(PART, uniform=True, steps=STEPS),
        f"{PART}, alike, {STEPS} steps, least squares, distilled": _ours(
            PART, uniform=True, steps=STEPS, repair="least squares", distilled=True
        ),
        f"{PART}, alike, {STEPS} steps, distilled": _ours(PART, uniform=True, steps=STEPS, distilled=True),
        f"{PART}, {MANY} steps, distilled": _ours(PART, steps=MANY, distilled=True),
        f"{PART}, relative, distilled": _ours(PART, relative=True, distilled=True),
        f"{PART}, relative, {MANY} steps, distilled": _ours(PART, relative=True, steps=MANY, distilled=True),
        f"{PART}, relative, sparse learning, distilled": _ours(
            PART, relative=True, sparse_epochs=SPARSE, distilled=True
        ),
        f"{PART}, sparse learning, {MANY} steps, distilled": _ours(
            PART, sparse_epochs=SPARSE, steps=MANY, distilled=True
        ),
        f"{PART}, alike, sparse learning, {STEPS} steps, distilled": _ours(
            PART, uniform=True, sparse_epochs=SPARSE, steps=STEPS, distilled=True
        ),
        f"thinet, {STEPS} steps, least squares": _ours("thinet", steps=STEPS, repair="least squares"),
        f"thinet, {STEPS} steps, least squares, distilled": _ours(
            "thinet", steps=STEPS, repair="least squares", distilled=True
        ),
        "thinet, least squares, distilled": _ours("thinet", repair="least squares", distilled=True),
    },
}
ALL = {name: method for methods in METHODS.values() for name, method in methods.items()}


def named(words: list[str]) -> dict[str, Method]:
    """The methods of these sets, or with these names."""
    found: dict[str, Method] = {}
    for word in words:
        if word not in METHODS and word not in ALL:
            raise SystemExit(f"no method or set {word!r}; sets: {', '.join(METHODS)}; methods: {'; '.join(ALL)}")
        found |= METHODS.get(word) or {word: ALL[word]}
    return found
