"""Layers that are called without their module: ``F.linear(x, self.qkv.weight)``, the projections of an attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from typing_extensions import Self

from lightning_prune.model_state.recomputing import weight_hooks

Show = Callable[[str, nn.Module, Any, Any], Any]


class FunctionalCalls(TorchFunctionMode):
    """Shows every `torch.nn.functional.linear` with a watched module's weight that its own forward does not make.

    Of a weight that is used in parts (queries, keys and values packed in one) the output is shown with zeros for the
    other parts, so that its channels lie where the weight's filters do.

    Args:
        modules: by path.
        before: is shown ``(path, module, input, None)``.
        after: is shown ``(path, module, input, output)``; what it returns goes on in place of the output.
    """

    def __init__(self, modules: Mapping[str, nn.Module], before: Show | None = None, after: Show | None = None) -> None:
        super().__init__()
        self._before, self._after = before, after
        self._modules = modules
        self._owners = {
            id(weight): path
            for path, module in modules.items()
            if isinstance(module, (nn.Linear, nn.MultiheadAttention)) and not weight_hooks(module)
            for name, weight in module.named_parameters(recurse=False)
            if name.endswith("weight")
        }
        self._inside: set[str] = set()
        self._hooks = ExitStack()

    def __enter__(self) -> Self:
        for path, module in self._modules.items():
            if isinstance(module, nn.Linear):
                enter = module.register_forward_pre_hook(lambda *_, path=path: self._inside.add(path))
                leave = module.register_forward_hook(lambda *_, path=path: self._inside.discard(path), always_call=True)
                self._hooks.callback(enter.remove)
                self._hooks.callback(leave.remove)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hooks.close()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.linear:
            return func(*args, **kwargs)
        given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
        value, weight = given["input"], given["weight"]
        source = weight if weight._base is None else weight._base
        path = self._owners.get(id(source))
        if path is None or path in self._inside:
            return func(*args, **kwargs)
        module = self._modules[path]
        if self._before is not None:
            self._before(path, module, value, None)
        output = func(*args, **kwargs)
        return output if self._after is None else self._shown(path, module, value, output, weight, source)

    def _shown(self, path: str, module: nn.Module, value: Any, output: Tensor, weight: Tensor, source: Tensor) -> Any:
        assert self._after is not None
        if weight is source:
            replacement = self._after(path, module, value, output)
            return output if replacement is None else replacement
        start, size = (weight.storage_offset() - source.storage_offset()) // source.stride(0), len(weight)
        whole = F.pad(output, [int(start), int(len(source) - start - size)])
        replacement = self._after(path, module, value, whole)
        return (whole if replacement is None else replacement).narrow(-1, start, size)
