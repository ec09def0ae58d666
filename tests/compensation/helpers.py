"""Nets with one layer under test, and Python loops over what a convolution sees."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.plan import GroupPlan, Plan
from tests.zoo import images


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def entering(model: nn.Module, path: str, x: Tensor) -> Tensor:
    """What enters a layer."""
    seen = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _m, args: seen.append(args[0].clone()))
    with torch.no_grad():
        model(x)
    handle.remove()
    return seen[0]


def leaving(model: nn.Module, path: str, x: Tensor) -> Tensor:
    """What a layer returns."""
    seen = []
    handle = model.get_submodule(path).register_forward_hook(lambda _m, _a, out: seen.append(out.clone()))
    with torch.no_grad():
        model(x)
    handle.remove()
    return seen[0]


def masked(model: nn.Module, graph: lp.ChannelGraph, plan: Plan) -> nn.Module:
    result = copy.deepcopy(model)
    lp.mask_(result, graph, plan)
    return result


def seen_by(layer: nn.Conv2d, value: Tensor, group: int) -> Iterator[tuple[int, int, int, np.ndarray]]:
    """Python loops: (sample, row, column, (inputs, taps, taps)) of every output position of one group."""
    (p, q), (s, t), (d, e), (kh, kw) = layer.padding, layer.stride, layer.dilation, layer.kernel_size
    size = layer.in_channels // layer.groups
    part = value[:, group * size : (group + 1) * size].numpy()
    part = np.pad(
        part, ((0, 0), (0, 0), (p, p), (q, q)), mode="reflect" if layer.padding_mode == "reflect" else "constant"
    )
    rows = (part.shape[2] - d * (kh - 1) - 1) // s + 1
    columns = (part.shape[3] - e * (kw - 1) - 1) // t + 1
    for n, i, j in itertools.product(range(len(part)), range(rows), range(columns)):
        patch = np.array([[[part[n, c, i * s + a * d, j * t + b * e] for b in range(kw)] for a in range(kh)]
                          for c in range(size)])  # fmt: skip
        yield n, i, j, patch


class Chain(nn.Module):
    """A layer to be pruned, and the layer under test that reads it; then another reader."""

    def __init__(self, reader: nn.Module, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.reader, self.norm = nn.Conv2d(3, 8, 3, padding=1), reader, norm or nn.Identity()
        self.last = nn.Conv2d(reader.out_channels, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.norm(self.reader(F.relu(self.first(x))))))


READERS = {
    "padded": lambda: nn.Conv2d(8, 6, 3, padding=1),
    "strided, dilated": lambda: nn.Conv2d(8, 6, 3, stride=2, dilation=2, padding=2),
    "uneven": lambda: nn.Conv2d(8, 6, (1, 3), stride=(2, 1), padding=(0, 1)),
    "reflected": lambda: nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect"),
    "grouped": lambda: nn.Conv2d(8, 6, 3, padding=1, groups=2),
    "without bias": lambda: nn.Conv2d(8, 6, 3, padding=1, bias=False),
}


def chain(name: str) -> tuple[Chain, lp.ChannelGraph, Plan, Tensor]:
    torch.manual_seed(0)
    model = Chain(READERS[name](), nn.BatchNorm2d(6)).double().eval()
    x = images(6)
    graph = lp.trace(model, x)
    size = graph.group("first").size  # 4 pairs under a grouped reader
    return model, graph, Plan({"first": GroupPlan(size, tuple(range(1, size, 2)))}), x


def removed_entries(model: nn.Module, graph: lp.ChannelGraph, plan: Plan, path: str) -> np.ndarray:
    gone = np.zeros(model.get_submodule(path).weight.shape[1], dtype=bool)
    for name, planned in plan.groups.items():
        for part in graph.group(name).slices:
            if part.tensor == f"{path}.weight" and part.layer is None:
                gone[part.index[list(planned.removed)].flatten().numpy()] = True
    return gone
