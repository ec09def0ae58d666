"""What a reconstructed model must be able to do beside being equal: copies, export; and what it takes in memory."""

from __future__ import annotations

import copy
import ctypes
import gc
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lightning_prune as lp
from benchmarks.zoo.models import equal, outputs


def copies(
    model: nn.Module, small: nn.Module, inputs: Any, after: list[torch.Tensor], again: Callable[[], nn.Module]
) -> bool | str:
    """Deep copy, pickle, and a state dict loaded into a second reconstruction: the same outputs each."""
    second = again()
    for parameter in second.parameters():
        parameter.data.fill_(0.1)
    buffer = io.BytesIO()
    torch.save(small.state_dict(), buffer)
    buffer.seek(0)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    others = {"deep copy": copy.deepcopy(small), "state dict": second}
    if _pickles(model):
        others["pickle"] = pickle.loads(pickle.dumps(small))
    differ = [f"{name} differs" for name, other in others.items() if not equal(after, outputs(other, inputs))]
    return "; ".join(differ) or True


def _pickles(model: nn.Module) -> bool:
    """Whether the dense model can be pickled; only its structure matters."""
    try:
        pickle.dumps(model)
    except Exception:  # noqa: BLE001
        return False
    return True


def export(model: nn.Module, small: nn.Module, inputs: Any) -> bool | None:
    """True if the reconstructed model exports; None if the dense one does not either."""
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    try:
        torch.export.export(model.eval(), args, strict=False)
    except Exception:  # noqa: BLE001
        return None
    program = torch.export.export(small, args, strict=False)
    with torch.no_grad():
        return len(list(program.graph.nodes)) > 0


def memory(model: nn.Module, inputs: Any) -> list[float]:
    """MiB above the start at the peak of a forward, and of a trace (Linux: peak of the resident set).

    The worker's allocator is told to hand memory back at once (`runner.RETURN_MEMORY`), or reuse would hide it.
    """
    found = []
    for run in (lambda: outputs(model, inputs), lambda: lp.trace(model, inputs)):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", "ascii")
        start = _status("VmRSS")
        run()
        found.append(round((_status("VmHWM") - start) / 1024, 1))
    return found


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))
