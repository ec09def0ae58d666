"""Slow reference of ThiNet: next layers run again without each channel, sets are tried one by one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.reference.taylor import inputs_of


def effects(model: nn.Module, reader: str, images: Tensor, index: Tensor) -> list[Tensor]:
    """Per call of a reader what each channel adds to its outputs, (N, outputs, channels)."""
    module, calls = model.get_submodule(reader), []
    handle = module.register_forward_hook(lambda _m, args, out: calls.append((args[0].clone(), out.clone())))
    with torch.no_grad():
        model(images)
    handle.remove()
    found = []
    for entered, out in calls:
        columns = []
        for entries in index.tolist():
            without, chosen = entered.clone(), inputs_of(module, entries)
            if isinstance(module, nn.Linear):
                without[..., chosen] = 0
            else:
                without[:, chosen] = 0
            with torch.no_grad():
                columns.append((out - module(without)).flatten(1))
        found.append(torch.stack(columns, 2))
    return found


def loss_of_removing(rows: list[list[float]], channels: list[int]) -> float:
    return sum(sum(row[c] for c in channels) ** 2 for row in rows)


def removal_order(rows: list[list[float]]) -> list[int]:
    """Channels in the order they go: each time all candidates are tried."""
    removed: list[int] = []
    left = list(range(len(rows[0])))
    while left:
        best = min(left, key=lambda c: loss_of_removing(rows, [*removed, c]))
        left.remove(best)
        removed.append(best)
    return removed


def places(rows: list[list[float]]) -> list[float]:
    order = removal_order(rows)
    return [order.index(c) / max(len(order) - 1, 1) for c in range(len(order))]
