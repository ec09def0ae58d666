"""What `profile.py` does: time the layers of a manifest in ONNX Runtime, interrupted or not, and write the table."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from .layer_files import context_file, context_key, layer_file
from .machine import this_machine
from .making import Kind, Layer, Maker, Preparer
from .table_data import table_data

MANIFEST, MODEL, INPUTS, POINTS = "manifest.json", "model.onnx", "inputs.npz", "points.jsonl"
WHOLE = 31  # passes of the whole model
_SETTINGS = {"CPUExecutionProvider": "OnnxRuntime('cpu')", "CUDAExecutionProvider": "OnnxRuntime('cuda')"}


def main(folder: Path, argv: Sequence[str] | None = None) -> int:
    """Run the kit in a folder; 0 if the table is written."""
    options = _options(argv)
    try:
        import onnxruntime
    except ImportError:
        sys.stderr.write("error: pip install onnxruntime numpy\n")
        return 1
    if options.provider not in onnxruntime.get_available_providers():
        available = ", ".join(onnxruntime.get_available_providers())
        sys.stderr.write(f"error: this ONNX Runtime has no {options.provider}; it has {available}\n")
        return 1
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    layers = [_layer(entry) for entry in manifest["layers"]]
    threads = options.threads or manifest["threads"] or this_machine()["cores"]
    head = {
        "engine": "onnxruntime",
        "settings": _SETTINGS.get(options.provider, f"OnnxRuntime({options.provider!r})"),
        "machine": this_machine(gpu=options.provider != "CPUExecutionProvider"),
        "threads": threads,
        "versions": {"onnxruntime": onnxruntime.__version__},
    }
    points = Points(folder / POINTS, {**head, "layers": manifest["layers"]})
    if points.known:
        print(f"{len(points.known)} times are known from before ({points.path.name})")
    started = time.perf_counter()
    runtime = _InOnnxRuntime(onnxruntime, threads, options.provider)
    maker = Maker(runtime, known=points.known, keep=points.keep, progress=bar(sys.stderr))
    made = maker.make(layers, options.coarse or None)
    whole = runtime.whole(folder)
    options.out.write_text(json.dumps(table_data(made, **head, whole_ms=whole), allow_nan=False), encoding="utf-8")
    print(f"\nThe whole model takes {whole:.2f} ms here with {threads} threads.")
    print(f"{len(layers)} layers, {maker.points} points, {time.perf_counter() - started:.0f} s: {options.out}")
    print("Bring it back: lightning_prune.measure.LatencyTable.load(file, force=True), since it is another machine's.")
    return 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="profile.py", description=__doc__)
    parser.add_argument("--threads", type=int, help="of the CPU; default: as the kit was made, or all cores")
    parser.add_argument("--provider", default="CPUExecutionProvider", help="of ONNX Runtime")
    parser.add_argument("--coarse", action="store_true", help="fewer points")
    parser.add_argument("--out", type=Path, default=Path("table.json"))
    return parser.parse_args(argv)


def _layer(entry: dict[str, Any]) -> Layer:
    values = entry["kind"].items()
    kind: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values}
    largest, fixed = entry["largest"], entry["fixed"]
    return Layer(Kind(**kind), (largest[0], largest[1]), (fixed[0], fixed[1]))


class Points:
    """The times so far, in a file that outlives an interruption; those of other circumstances are not used."""

    def __init__(self, path: Path, circumstances: dict[str, Any]) -> None:
        self.path = path
        self.known: dict[str, float] = {}
        head = json.dumps(circumstances, sort_keys=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        if lines[:1] != [head]:
            path.write_text(head + "\n", encoding="utf-8")
            return
        for line in lines[1:]:
            try:
                self.known.update(json.loads(line))
            except ValueError:  # cut off in the middle
                break
        path.write_text(f"{head}\n{json.dumps(self.known)}\n", encoding="utf-8")

    def keep(self, found: dict[str, float]) -> None:
        """Append what was just timed."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(found) + "\n")


class _InOnnxRuntime(Preparer):
    """Layers as sessions."""

    def __init__(self, onnxruntime: Any, threads: int, provider: str) -> None:
        self._onnxruntime, self._threads, self._provider = onnxruntime, threads, provider

    def layer(self, kind: Any, channels: tuple[int, int]) -> Callable[[], object]:
        return self._load(*layer_file(kind, channels))

    def context(self, kind: Any, channels_in: int) -> Callable[[], object]:
        return self._load(*context_file(kind, channels_in))

    def context_key(self, kind: Any, channels_in: int) -> tuple[Any, ...]:
        return context_key(kind, channels_in)

    def whole(self, folder: Path) -> float:
        """Milliseconds of the dense model."""
        session = self._session(str(folder / MODEL))
        with np.load(folder / INPUTS) as arrays:
            given = dict(zip([entry.name for entry in session.get_inputs()], arrays.values()))
        spent = []
        for _ in range(WHOLE):
            started = time.perf_counter()
            session.run(None, given)
            spent.append(1e3 * (time.perf_counter() - started))
        return float(np.median(spent[WHOLE // 4 :]))  # the first ones warm up

    def _load(self, content: bytes, shapes: dict[str, tuple[int, ...]]) -> Callable[[], object]:
        session = self._session(content)
        random = np.random.default_rng(0)
        inputs = {name: random.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
        return lambda: session.run(None, inputs)

    def _session(self, file: bytes | str) -> Any:
        options = self._onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 3
        # Its threads must not disturb the next one.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        return self._onnxruntime.InferenceSession(file, options, providers=[self._provider])


def bar(stream: TextIO) -> Callable[[int, int], None]:
    """Show progress: a line that is rewritten on a terminal, else one for every tenth."""
    started = time.perf_counter()
    shown = [-1]

    def show(done: int, total: int) -> None:
        percent = 100 * done // max(total, 1)
        terminal = stream.isatty()
        if percent // (1 if terminal else 10) == shown[0]:
            return
        shown[0] = percent // (1 if terminal else 10)
        filled = "#" * (percent * 30 // 100)
        line = f"[{filled:30}] {percent:3d} %  {time.perf_counter() - started:.0f} s"
        stream.write(f"\r{line}" if terminal else f"{line}\n")
        stream.flush()

    return show
