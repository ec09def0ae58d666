"""How many bytes a model takes: activations in a pass, and the weights on disk."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from lightning_prune.measure.operators import Observer


def measure_memory(model: nn.Module, example_inputs: Any) -> int:
    """Bytes of activations alive at once, at most, during a forward pass in eval mode.

    The input counts, parameters and buffers do not, nor does what a kernel allocates for itself.

    Raises:
        TraceError: the model does not run on the inputs.

    Example:
        >>> measure_memory(nn.Linear(4, 2, bias=False), torch.zeros(1, 4))  # 4 numbers in, 2 out
        24
    """
    return _PeakMemory(model).watch(model, example_inputs).peak


def state_size(model: nn.Module) -> int:
    """Bytes of the state dict as `torch.save` writes it."""
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.tell()


class _PeakMemory(Observer):
    """Follows which activations are alive."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        self._alive = WeakIdKeyDictionary()
        self.peak = 0

    def observe(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:  # noqa: ARG002
        for tensor in tree_leaves((args, kwargs, output)):
            if isinstance(tensor, Tensor):
                self._alive[tensor] = True
        storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in self._alive}
        self.peak = max(self.peak, sum(size for key, size in storages.items() if key not in self._own))
