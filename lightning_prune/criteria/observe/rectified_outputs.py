"""Finding the rectifier behind every layer while the model runs, module or function alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from lightning_prune.criteria import functional
from lightning_prune.criteria.base import Tap
from lightning_prune.criteria.observe.watcher import Watcher, calls_of, channel_dim, key_of, recomputing
from lightning_prune.graph.groups import Group, Layer

_RECTIFIERS = frozenset(
    "relu relu_ leaky_relu leaky_relu_ _prelu_kernel rrelu_with_noise rrelu_with_noise_ threshold threshold_".split()
)
_CLAMPS = frozenset("clamp clamp_ clamp_min clamp_min_ hardtanh hardtanh_".split())
_FOLLOWED = frozenset(
    "add add_ sub sub_ mul mul_ div div_ native_batch_norm cudnn_batch_norm miopen_batch_norm batch_norm_with_update "
    "_native_batch_norm_legit _native_batch_norm_legit_no_training _batch_norm_with_update native_group_norm "
    "max_pool2d_with_indices max_pool2d max_pool3d_with_indices avg_pool2d avg_pool3d mkldnn_max_pool2d "
    "native_dropout bernoulli_ clone contiguous _to_copy".split()
)


@dataclass(eq=False)
class _Mark:
    """One call of a layer; ``found`` once its first rectifier ran (a skip connection may lead to others)."""

    key: str
    tap: Tap
    layer: Layer
    dim: int
    found: bool = False


_Trail = dict[_Mark, int]  # at which channel of the tensor the layer's filters start


class RectifiedOutputWatcher(Watcher):
    """Shows taps the output of the first rectifier that each layer's output enters.

    Marked tensors are followed through operators that keep their channels.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._audience: dict[str, list[tuple[str, Tap, Layer]]] = {}
        self._trails = WeakIdKeyDictionary()

    def listen(self, group: Group, tap: Tap) -> None:
        for layer in group.layers:
            key = key_of(group, layer, tap)
            self._audience.setdefault(layer.name, []).append((key, tap, layer))
            self.shapes[key] = (group.size,)

    def start(self) -> None:
        self._trails = WeakIdKeyDictionary()
        self.hooks.enter_context(calls_of(self.model, self._audience, self._mark))
        self.hooks.enter_context(_Operators(self._follow))

    def _mark(self, path: str, module: nn.Module, _value: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim >= 2:
            marks = {_Mark(*listener, channel_dim(module)): 0 for listener in self._audience[path]}
            self._trails[output] = {**self._trails.get(output, {}), **marks}

    def _follow(self, name: str, args: tuple[Any, ...], output: Tensor) -> None:
        before = [(t, self._trails[t]) for t in tree_leaves(args) if isinstance(t, Tensor) and t in self._trails]
        if not before:
            return
        trail: _Trail = {}
        if name == "cat":
            trail = self._concatenated(args)
        elif name in _RECTIFIERS or (name in _CLAMPS and len(args) > 1 and args[1] == 0):
            self._rectified(output, before[0][1])
        elif name in _FOLLOWED:
            for tensor, found in before:
                if tensor.ndim == output.ndim:
                    trail.update({m: at for m, at in found.items() if tensor.shape[m.dim] == output.shape[m.dim]})
        self._trails[output] = trail

    def _concatenated(self, args: tuple[Any, ...]) -> _Trail:
        tensors, dim = args[0], args[1] if len(args) > 1 else 0
        trail: _Trail = {}
        along = 0
        for tensor in tensors:
            for mark, start in self._trails.get(tensor, {}).items():
                if dim % tensor.ndim == mark.dim % tensor.ndim:
                    trail.setdefault(mark, start + along)
            along += tensor.shape[dim]
        return trail

    def _rectified(self, output: Tensor, trail: _Trail) -> None:
        for mark, start in trail.items():
            if mark.found or recomputing():
                continue
            mark.found, layer = True, mark.layer
            maps = functional.by_position(output.detach().narrow(mark.dim, start, layer.filters), mark.dim)
            seen = self.open(layer.name, mark.key, mark.tap, (len(maps), len(layer.index)), maps.device)
            seen.add(functional.gather_channels(mark.tap.partial(maps, None), layer.index), maps.shape[-1])


class _Operators(TorchDispatchMode):
    """Shows every operator that returns a tensor: its name, arguments and (first) result."""

    def __init__(self, see: Callable[[str, tuple[Any, ...], Tensor], None]) -> None:
        super().__init__()
        self._see = see

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        result = output[0] if isinstance(output, tuple) else output
        if isinstance(result, Tensor):
            self._see(func._schema.name.removeprefix("aten::"), args, result)
        return output
