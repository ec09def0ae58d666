"""The times of all layers of a network over their widths: which points, in which chunks, as plain data."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .layer_files import bytes_of
from .rounds import LEAST, MOST, time_in_turns
from .widths import FIRST, LAST, Steps, find_steps, grid

CHUNK_BYTES, CHUNK_POINTS = 2**29, 160  # prepared at once
SLOW = 0.2  # seconds to prepare a layer, above which fewer points are timed
NARROW = 16  # channels: of fewer no steps are sought
TOO_SHORT = 0.004  # milliseconds of which no step can be told
PROBED = 4e7  # multiply-accumulates of the layer whose steps are sought, about


class Kind(NamedTuple):
    """What `lightning_prune.measure.LayerKind` is, where that is not installed."""

    operator: str
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    size: tuple[int, ...]
    batch: int
    norm: bool
    activation: str | None


def as_data(kind: Any) -> dict[str, Any]:
    """A `lightning_prune.measure.LayerKind` as plain data."""
    values = {name: getattr(kind, name) for name in Kind._fields}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


class Layer(NamedTuple):
    """A kind of layer, the most channels in and out that it has, and which of the two never change."""

    kind: Any
    largest: tuple[int, int]
    fixed: tuple[bool, bool] = (False, False)


class Preparer:
    """What an engine must do here; both give a function that runs once and returns when it is done."""

    def layer(self, kind: Any, channels: tuple[int, int]) -> Callable[[], object]:
        """A layer in its surroundings."""
        raise NotImplementedError

    def context(self, kind: Any, channels_in: int) -> Callable[[], object]:
        """These surroundings alone."""
        raise NotImplementedError

    def context_key(self, kind: Any, channels_in: int) -> tuple[Any, ...]:
        """What the surroundings depend on."""
        raise NotImplementedError


class Maker:
    """Times points, each once; ``known`` are those of an earlier run, ``keep`` is told of every new one.

    ``progress(done, total)`` counts points prepared and points timed.
    """

    def __init__(
        self,
        preparer: Preparer,
        *,
        known: dict[str, float] | None = None,
        keep: Callable[[dict[str, float]], object] | None = None,
        progress: Callable[[int, int], object] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._preparer, self._keep, self._progress, self._clock = preparer, keep, progress, clock
        self._known = dict(known or {})
        self._done = self._total = 0
        self.points = 0

    def make(self, layers: list[Layer], coarse: bool | None = None) -> list[dict[str, Any]]:
        """Every layer's surfaces of milliseconds as plain data; ``coarse=None``: where preparing is slow."""
        if coarse is None:
            self._preparer.context(layers[0].kind, layers[0].largest[0])  # the first of a process starts the engine
            started = self._clock()
            self._preparer.layer(layers[0].kind, layers[0].largest)
            coarse = self._clock() - started > SLOW
        probes = self._probes(layers, coarse)
        self._total = 2 * sum(len(points) for points in probes.values())
        steps = {}
        for key, points in probes.items():
            times = self.net(points, least=MOST)
            steps[key] = find_steps(times) if np.median(times) > TOO_SHORT else Steps()
        plans = [(layer, self._surfaces(layer, steps, coarse)) for layer in layers]
        points = [
            (layer.kind, channels) for layer, plan in plans for each in plan for channels in _channels(layer, each)
        ]
        points = list(dict.fromkeys(points))
        self._total += 2 * len(points)
        self.points = len(points)
        net = dict(zip(points, self.net(points)))
        return [_entry(layer, plan, net) for layer, plan in plans]

    def net(self, points: list[tuple[Any, tuple[int, int]]], least: int = LEAST) -> list[float]:
        """Milliseconds of layers without their surroundings, over so many rounds at least."""
        contexts: dict[tuple[Any, ...], tuple[Any, int]] = {}
        for kind, (channels_in, _) in points:
            contexts.setdefault(self._preparer.context_key(kind, channels_in), (kind, channels_in))
        around = self._time(
            [
                (
                    f"context {key}",
                    4 * int(np.prod(kind.size)) * channels_in,
                    self._preparer.context,
                    (kind, channels_in),
                )
                for key, (kind, channels_in) in contexts.items()
            ],
            least,
        )
        within = self._time(
            [
                (f"{_name(kind)} {channels}", bytes_of(kind, channels), self._preparer.layer, (kind, channels))
                for kind, channels in points
            ],
            least,
            counted=True,
        )
        found = []
        for (kind, channels), milliseconds in zip(points, within):
            before = around[list(contexts).index(self._preparer.context_key(kind, channels[0]))]
            found.append(max(milliseconds - before, 0.0))
        return found

    def _time(
        self, jobs: list[tuple[str, int, Any, tuple[Any, Any]]], least: int, counted: bool = False
    ) -> list[float]:
        todo = [job for job in jobs if job[0] not in self._known]
        self._advance(2 * (len(jobs) - len(todo)) if counted else 0)
        while todo:
            chunk: list[tuple[str, int, Any, tuple[Any, Any]]] = []
            held = 0
            while todo and len(chunk) < CHUNK_POINTS and (not chunk or held + todo[-1][1] <= CHUNK_BYTES):
                chunk.append(todo.pop())
                held += chunk[-1][1]
            programs = []
            for _, _, prepare, of in chunk:
                programs.append(prepare(*of))
                self._advance(counted)
            names = [name for name, *_ in chunk]
            found = dict(zip(names, time_in_turns(programs, self._clock, least)))
            self._known.update(found)
            if self._keep:
                self._keep(found)
            self._advance(len(chunk) * counted)
        return [self._known[job[0]] for job in jobs]

    def _advance(self, points: int) -> None:
        self._done += points
        if self._progress:
            self._progress(self._done, self._total)

    def _probes(self, layers: list[Layer], coarse: bool) -> dict[tuple[Any, ...], list[tuple[Any, tuple[int, int]]]]:
        """{(family, dimension): the points that tell its steps}."""
        found = {}
        families: dict[tuple[Any, ...], list[Any]] = {}
        most: Counter[tuple[Any, ...]] = Counter()  # channels
        for layer in layers:
            if layer.kind.groups < 2 and not all(layer.fixed):
                family = _family(layer.kind)
                families.setdefault(family, []).append(layer.kind)
                most[family] = max(most[family], *layer.largest)
        if coarse and families:  # one for all
            families = dict([max(families.items(), key=lambda item: sum(_macs(kind, 64) for kind in item[1]))])
        for family, kinds in families.items():
            kind = min(kinds, key=lambda kind: abs(np.log(_macs(kind, 64) / PROBED)))
            other = int(np.clip(64 * round(PROBED / _macs(kind, 64)), 64, 512))
            widths = range(FIRST, LAST + 1)
            if most[family] < NARROW:
                continue
            found[family, 1] = [(kind, (width if kind.groups == 0 else other, width)) for width in widths]
            if kind.groups != 0:
                found[family, 0] = [(kind, (width, other)) for width in widths]
        return found

    @staticmethod
    def _surfaces(layer: Layer, steps: dict[Any, Steps], coarse: bool) -> list[dict[str, Any]]:
        """The widths of the layer's surfaces, one for every pair of classes."""
        found: list[list[tuple[Steps, bool, list[int]]]] = []
        for dim in (0, 1):
            largest = layer.largest[dim]
            if layer.fixed[dim]:
                found.append([(Steps(), True, [largest])])
            elif layer.kind.groups == 0 and dim == 0:
                found.append([(Steps(), True, [1])])  # as many as channels out
            else:
                own = steps.get((_family(layer.kind), dim)) or next(
                    (s for (_, d), s in steps.items() if d == dim), Steps()
                )
                if layer.kind.groups > 1:
                    own = Steps(1, layer.kind.groups)
                classes = [(own, aligned, grid(largest, own, aligned, coarse)) for aligned in (True, False)]
                found.append([each for each in classes if each[2]])
        return [
            {
                "alignment": [rule.alignment for rule, _, _ in pair],
                "aligned": [aligned for _, aligned, _ in pair],
                "lanes": [rule.aligned if aligned else rule.others for rule, aligned, _ in pair],
                "widths": [widths for _, _, widths in pair],
            }
            for pair in ((first, second) for first in found[0] for second in found[1])
        ]


def _channels(layer: Layer, surface: dict[str, Any]) -> list[tuple[int, int]]:
    """The points of a surface, channels out the fastest."""
    widths_in, widths_out = surface["widths"]
    if layer.kind.groups == 0:
        times = layer.largest[1] // layer.largest[0]
        return [(max(1, width // times), max(1, width // times) * times) for width in widths_out]
    return [(first, second) for first in widths_in for second in widths_out]


def _entry(
    layer: Layer, surfaces: list[dict[str, Any]], net: dict[tuple[Any, tuple[int, int]], float]
) -> dict[str, Any]:
    made = []
    for surface in surfaces:
        times = [net[layer.kind, channels] for channels in _channels(layer, surface)]
        rows = np.reshape(times, [len(widths) for widths in surface["widths"]])
        made.append({**surface, "milliseconds": np.round(rows, 6).tolist()})
    return {"kind": as_data(layer.kind), "largest": list(layer.largest), "surfaces": made}


def _name(kind: Any) -> str:
    return " ".join(f"{name}={value}" for name, value in as_data(kind).items())


def _family(kind: Any) -> tuple[Any, ...]:
    """Layers that an engine computes alike."""
    return kind.operator, all(size == 1 for size in kind.kernel), kind.groups == 0


def _macs(kind: Any, width: int) -> float:
    """Of a layer with so many channels in and out, at least 1; of a depthwise one so many times fewer."""
    places = kind.batch * np.prod(kind.size) / np.prod(kind.stride or (1,)) * np.prod(kind.kernel or (1,))
    return max(1.0, float(places * width * (width if kind.groups else 1)))
