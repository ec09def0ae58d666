"""Times of layers over their widths, on one engine of one machine: read, kept, asked."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from typing_extensions import Self

from lightning_prune.engines import Engine, engine_from
from lightning_prune.errors import TableError, first_line
from lightning_prune.files import read_json, write_text
from lightning_prune.measure.layer_calls import LayerKind, Operator
from lightning_prune.measure.portable.machine import this_machine
from lightning_prune.measure.portable.making import as_data
from lightning_prune.measure.portable.table_data import FORMAT, VERSION
from lightning_prune.measure.portable.widths import rounded_up

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Surface:
    """Times over channels in and out, of those widths that are multiples of an alignment, or of those that are not.

    Attributes:
        widths: that were timed, in and out.
        milliseconds: (in, out).
        lanes: a width costs what the next multiple costs, in and out.
        alignment: in and out.
        aligned: multiples of the alignment, or the others; in and out.
    """

    widths: tuple[tuple[int, ...], tuple[int, ...]]
    milliseconds: Floats = field(repr=False)
    lanes: tuple[int, int] = (1, 1)
    alignment: tuple[int, int] = (1, 1)
    aligned: tuple[bool, bool] = (True, True)

    def has(self, channels: Integers, dim: int) -> NDArray[np.bool_]:
        """Which of the widths are of this class."""
        return (channels % self.alignment[dim] == 0) == self.aligned[dim]

    def time(self, channels_in: Integers, channels_out: Integers) -> Floats:
        """Bilinear between the timed widths, after rounding up to lanes; (n,)."""
        low_in, share_in = self._place(channels_in, 0)
        low_out, share_out = self._place(channels_out, 1)
        high_in, high_out = (np.minimum(low + 1, len(self.widths[dim]) - 1) for dim, low in ((0, low_in), (1, low_out)))
        times = self.milliseconds
        near = times[low_in, low_out] * (1 - share_out) + times[low_in, high_out] * share_out
        far = times[high_in, low_out] * (1 - share_out) + times[high_in, high_out] * share_out
        return near * (1 - share_in) + far * share_in

    def _place(self, channels: Integers, dim: int) -> tuple[Integers, Floats]:
        """The timed width below, and how far towards the next."""
        widths = np.array(self.widths[dim])
        at = rounded_up(channels, self.lanes[dim], 0 if self.aligned[dim] else 1).clip(widths[0], widths[-1])
        low = np.searchsorted(widths, at, side="right") - 1
        step = widths[np.minimum(low + 1, len(widths) - 1)] - widths[low]
        return low, (at - widths[low]) / np.maximum(step, 1)


@dataclass(frozen=True)
class LayerTimes:
    """One kind of layer.

    Attributes:
        largest: most channels in and out that were timed.
        surfaces: one for every pair of classes of widths.
    """

    largest: tuple[int, int]
    surfaces: tuple[Surface, ...]


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds of every layer over channels in and out, on one engine of one machine.

    A layer's time is what it adds to a network: with its norm and activation, without the surroundings that feed it.
    Additions, poolings and reshapes between layers are not in it, so a network takes a little more than the sum.

    Attributes:
        layers: by kind.
        engine: its name.
        settings: of the engine, in its own words, such as its precision.
        machine: CPU, cores, system, GPU.
        threads: of the CPU.
        versions: of the engine's packages.
        made: when, in UTC.
        whole_ms: milliseconds of the whole dense model there, if it was timed too.
        elsewhere: whether it was made on another machine than this one, so that nothing can be checked by measuring.

    Example:
        >>> kind = LayerKind("linear", size=(1,))
        >>> surface = Surface(((8, 64), (8, 64)), np.array([[1.0, 2.0], [2.0, 4.0]]), lanes=(1, 8))
        >>> table = LatencyTable({kind: LayerTimes((64, 64), (surface,))}, engine="onnxruntime")
        >>> table.time(kind, 64, [57, 64, 8]).tolist(), float(table.time(kind, 36, 1))
        ([4.0, 4.0, 2.0], 1.5)
    """

    layers: Mapping[LayerKind, LayerTimes] = field(repr=False)
    engine: str
    settings: str = ""
    machine: Mapping[str, Any] = field(default_factory=this_machine)
    threads: int = 1
    versions: Mapping[str, str] = field(default_factory=dict)
    made: str = ""
    whole_ms: float | None = None
    elsewhere: bool = False

    def time(self, kind: LayerKind, channels_in: ArrayLike, channels_out: ArrayLike) -> Floats:
        """Milliseconds of a layer of so many channels.

        Linear between the widths that were timed; where the engine computes in lanes, a width costs what the next
        multiple costs; widths that are not aligned as it likes have times of their own. Below the smallest width timed
        it is the time of that one. No channels take no time.

        Args:
            kind: of the layer; of a depthwise one the channels in do not matter.
            channels_in: of the whole input; any shape.
            channels_out: of a shape that broadcasts with it.

        Raises:
            TableError: a kind that is not in the table, or more channels than were timed.
        """
        if kind not in self.layers:
            raise TableError(f"the latency table has no {kind} (batch {kind.batch}); make one of this model and input")
        known = self.layers[kind]
        given = np.broadcast_arrays(np.asarray(channels_in), np.asarray(channels_out))
        if any(not np.issubdtype(each.dtype, np.integer) for each in given):
            raise TableError(f"numbers of channels are integers, got {given[0].dtype} and {given[1].dtype}")
        into, out = (each.astype(np.int64).ravel() for each in given)
        for channels, largest, name in ((into, known.largest[0], "in"), (out, known.largest[1], "out")):
            if channels.size and (channels.min() < 0 or channels.max() > largest):
                wrong = channels[(channels < 0) | (channels > largest)][0]
                raise TableError(
                    f"the latency table knows {kind} from 0 to {largest} channels {name}, asked for {wrong}"
                )
        times = np.full(into.shape, np.nan)
        for surface in known.surfaces:
            here = surface.has(into, 0) & surface.has(out, 1)
            times[here] = surface.time(into[here], out[here])
        times[(into == 0) | (out == 0)] = 0.0
        return times.reshape(given[0].shape)

    def alignment(self, kind: LayerKind) -> tuple[int, int]:
        """Multiples of channels in and out that the engine likes; others take a slower way, next to it too."""
        surfaces = self.layers[kind].surfaces if kind in self.layers else ()
        first, second = (math.lcm(*(surface.alignment[dim] for surface in surfaces)) for dim in (0, 1))
        return first, second

    def check(self, engine: str | Engine, threads: int | None = None, *, force: bool = False) -> None:
        """Refuse to speak for another engine, machine or number of threads.

        Args:
            engine: that will run the model.
            threads: that it will have; None: not compared.
            force: do not refuse.

        Raises:
            TableError: with what differs.
        """
        engine = engine_from(engine)
        differing = _differences(self.machine, this_machine(gpu=self.machine.get("gpu") is not None))
        pairs: dict[str, tuple[Any, Any]] = {
            "engine": (self.engine, engine.name),
            "settings": (self.settings, repr(engine)),
        }
        if threads is not None:
            pairs["threads"] = (self.threads, threads)
        if self.engine == engine.name:
            pairs.update({name: (was, engine.versions.get(name)) for name, was in self.versions.items()})
        differing += [f"{name}: {was} there, {now} here" for name, (was, now) in pairs.items() if was and was != now]
        if differing and not force:
            raise TableError(
                f"the latency table does not hold here ({'; '.join(differing)}): make one here, or force it"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON.

        Raises:
            PruningError: the path cannot be written.
        """
        write_text(Path(path), json.dumps(self.data(), allow_nan=False))

    def data(self) -> dict[str, Any]:
        """It as plain data."""
        head = {
            name.name: getattr(self, name.name) for name in fields(self) if name.name not in ("layers", "elsewhere")
        }
        layers = [
            {
                "kind": as_data(kind),
                "largest": list(times.largest),
                "surfaces": [
                    {
                        "alignment": list(surface.alignment),
                        "aligned": list(surface.aligned),
                        "lanes": list(surface.lanes),
                        "widths": [list(widths) for widths in surface.widths],
                        "milliseconds": surface.milliseconds.tolist(),
                    }
                    for surface in times.surfaces
                ],
            }
            for kind, times in self.layers.items()
        ]
        return {"format": FORMAT, "version": VERSION, **head, "layers": layers}

    @classmethod
    def load(cls, path: str | os.PathLike[str], force: bool = False) -> Self:
        """Read it.

        Args:
            path: of a file that `save`, the command ``latency-table`` or a ``profile.py`` wrote.
            force: also if it was made on another machine.

        Raises:
            TableError: no latency table, a damaged one, or one of another machine.
        """
        data = read_json(path, TableError, "latency table")
        if data.get("format") != FORMAT:
            raise TableError(f"{path} is no latency table; make one with lightning-prune latency-table")
        if data.get("version") != VERSION:
            raise TableError(
                f"{path} has version {data.get('version')} of the format, and this package reads {VERSION}; make it "
                "again"
            )
        try:
            table = cls.of(data)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise TableError(f"{path} is a damaged latency table: {first_line(error)}; make it again") from error
        differing = _differences(table.machine, this_machine(gpu=table.machine.get("gpu") is not None))
        if differing and not force:
            raise TableError(
                f"{path} was made on another machine ({'; '.join(differing)}): make one here, or force it if the model "
                "is to run there"
            )
        return replace(table, elsewhere=bool(differing))

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Self:
        """From plain data."""
        layers = {_kind(entry["kind"]): _layer_times(entry) for entry in data["layers"]}
        head = {name: data[name] for name in ("engine", "settings", "machine", "threads", "versions", "made")}
        head["whole_ms"] = whole = data.get("whole_ms")
        if whole is not None and not 0 < float(whole) < math.inf:
            raise ValueError(f"whole_ms must be positive, got {whole}")
        if not (isinstance(head["machine"], dict) and isinstance(head["versions"], dict)):
            raise ValueError("machine and versions must be objects")
        if not (isinstance(head["engine"], str) and isinstance(head["threads"], int) and head["threads"] > 0):
            raise ValueError("engine must be a name, and threads a number")
        return cls(layers, **head)


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    return [f"{name}: {value} there, {here.get(name)} here" for name, value in there.items() if value != here.get(name)]


def _kind(data: Mapping[str, Any]) -> LayerKind:
    if data["operator"] not in get_args(Operator):
        raise ValueError(f"no such operator: {data['operator']}")
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
    return LayerKind(**values)


def _layer_times(data: Mapping[str, Any]) -> LayerTimes:
    surfaces = []
    for each in data["surfaces"]:
        widths, times = tuple(map(tuple, each["widths"])), np.array(each["milliseconds"], dtype=np.float64)
        lanes, alignment = each["lanes"], each["alignment"]
        if any(list(side) != sorted(set(side)) or not side or side[0] < 1 for side in widths):
            raise ValueError(f"widths must rise from 1, got {widths}")
        if times.shape != tuple(map(len, widths)) or not np.isfinite(times).all() or (times < 0).any():
            raise ValueError(f"milliseconds must be {tuple(map(len, widths))} numbers of at least 0")
        if min(*lanes, *alignment) < 1:
            raise ValueError(f"lanes and alignment must be at least 1, got {lanes} and {alignment}")
        surfaces.append(
            Surface(_pair(widths), times, _pair(lanes), _pair(alignment), _pair(map(bool, each["aligned"])))
        )
    largest = _pair(data["largest"])
    if not surfaces:
        raise ValueError("a layer without times")
    return LayerTimes(largest, tuple(surfaces))


def _pair(values: Any) -> Any:
    first, second = values
    return first, second
