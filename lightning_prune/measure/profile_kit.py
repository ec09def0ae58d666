"""A folder that makes a latency table where there is no torch: a Raspberry Pi, a Jetson."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from lightning_prune.engines import OnnxRuntime
from lightning_prune.engines.base import tensors_of
from lightning_prune.engines.onnx_file import onnx_bytes
from lightning_prune.errors import PruningError
from lightning_prune.files import atomic
from lightning_prune.graph import ChannelGraph
from lightning_prune.measure.portable import standalone
from lightning_prune.measure.portable.making import as_data
from lightning_prune.measure.table_making import layers_of

PROFILE = '''"""Time the layers that manifest.json lists in ONNX Runtime on this machine, and write table.json.

    pip install onnxruntime numpy
    python profile.py [--threads N] [--provider CPUExecutionProvider] [--out table.json]

Python 3.8 and newer; needs neither torch nor lightning-prune. The machine should do nothing else meanwhile. After an
interruption call it again: the times in points.jsonl are not taken anew.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path = [str(HERE), *(path for path in sys.path if path != str(HERE))]

from portable.standalone import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(HERE))
'''


def write_profile_kit(
    folder: str | os.PathLike[str],
    model: nn.Module,
    example_inputs: Any,
    *,
    threads: int | None = None,
    graph: ChannelGraph | None = None,
) -> Path:
    """Write what times the layers of a model on another machine: ``profile.py``, and a list of the layers.

    Copy the folder there, run ``python profile.py`` (Python 3.8, numpy, onnxruntime), bring ``table.json`` back and
    open it by ``LatencyTable.load("table.json", force=True)``. The script builds the ONNX file of every layer there;
    the folder holds the whole model besides, since budgets need its time. Interrupted, it goes on where it was.

    Args:
        folder: is made; files of the same names are replaced.
        model: dense; left as it is.
        example_inputs: batch and image size that the table will hold for.
        threads: of the CPU there; None: all its cores.
        graph: of the model; channels that can never go are then not varied.

    Returns:
        The path of ``profile.py``.

    Raises:
        PruningError: the folder cannot be written.
        EngineError: the model cannot be exported to ONNX, or the packages for that are missing.
        TableError: the model has no layers.
        TraceError: the model does not run on the inputs.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as place:
        ...     script = write_profile_kit(f"{place}/kit", nn.Conv2d(3, 8, 3), torch.zeros(1, 3, 8, 8))
        ...     sorted(path.name for path in script.parent.iterdir())
        ['inputs.npz', 'manifest.json', 'model.onnx', 'portable', 'profile.py']
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise PruningError(f"cannot write {folder}: it is a file")
    layers = [
        {"kind": as_data(layer.kind), "largest": list(layer.largest), "fixed": list(layer.fixed)}
        for layer in layers_of(model, example_inputs, graph)
    ]
    OnnxRuntime().check()
    arrays = io.BytesIO()
    np.savez(arrays, *(tensor.detach().cpu().numpy() for tensor in tensors_of(example_inputs)))
    source = Path(standalone.__file__).parent
    files = {f"portable/{path.name}": path.read_bytes() for path in source.glob("*.py")}
    files[standalone.MANIFEST] = json.dumps({"threads": threads, "layers": layers}, indent=1).encode()
    files[standalone.MODEL] = onnx_bytes(model, example_inputs)
    files[standalone.INPUTS] = arrays.getvalue()
    files["profile.py"] = PROFILE.encode()
    for name, content in files.items():
        with atomic(folder / name) as stream:
            stream.write(content)
    return folder / "profile.py"
