"""Finding the rectifier behind every layer while the model runs, module or function alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary
from typing_extensions import override

from lightning_prune.criteria import functional
from lightning_prune.criteria.base import Tap
from lightning_prune.criteria.observe.hooks import calls_of, recomputing
from lightning_prune.criteria.observe.watcher import Watcher, key_of
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


@dataclass(frozen=True, eq=False)
class _Source:
    """A layer whose rectifier is looked for."""

    key: str
    tap: Tap
    layer: Layer
    channel_dim: int


@dataclass(eq=False)
class _Mark:
    """One call of the layer; ``found`` once its first rectifier ran (a skip connection may lead to others)."""

    source: _Source
    found: bool = False


_Trail = dict[_Mark, int]  # at which channel of the tensor the layer's filters start


class RectifiedOutputWatcher(Watcher):
    """Shows taps the output of the first rectifier that each layer's output enters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._sources: dict[str, list[_Source]] = {}
        self._follow = _Follow(self._rectified)

    @override
    def listen(self, group: Group, tap: Tap) -> None:
        for layer in group.layers:
            weight = getattr(self.model.get_submodule(layer.name), "weight", None)
            last = isinstance(weight, Tensor) and weight.ndim == 2
            source = _Source(key_of(group, layer, tap), tap, layer, -1 if last else 1)
            self._sources.setdefault(layer.name, []).append(source)
            self.shapes[source.key] = (group.size,)

    @override
    def start(self) -> None:
        self._follow = _Follow(self._rectified)
        self.hooks.enter_context(calls_of(self.model, self._sources, self._leave))
        self.hooks.enter_context(self._follow)

    def _leave(self, path: str, _module: nn.Module, _value: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim >= 2:
            for source in self._sources[path]:
                self._follow.mark(output, source)

    def _rectified(self, output: Tensor, trail: _Trail) -> None:
        value = output.detach()
        for mark, start in trail.items():
            if mark.found or recomputing():
                continue
            mark.found, source = True, mark.source
            layer = source.layer
            own = value.narrow(source.channel_dim, start, layer.filters)
            maps = functional.by_position(own, source.channel_dim)
            seen = self.open(layer.name, source.key, source.tap, (len(maps), len(layer.index)), maps.device)
            seen.add(functional.gather_channels(source.tap.partial(maps, None), layer.index), maps.shape[-1])


class _Follow(TorchDispatchMode):
    """Follows marked tensors through operators that keep their channels, up to the first rectifier."""

    def __init__(self, rectified: Callable[[Tensor, _Trail], None]) -> None:
        super().__init__()
        self._rectified = rectified
        self._trails = WeakIdKeyDictionary()

    def mark(self, tensor: Tensor, source: _Source) -> None:
        """Start to follow a layer's output."""
        self._trails[tensor] = {**self._trails.get(tensor, {}), _Mark(source): 0}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = [(tensor, self._trails[tensor]) for tensor in _tensors(args) if tensor in self._trails]
        output = func(*args, **(kwargs or {}))
        if before:
            result = output[0] if isinstance(output, tuple) else output
            if isinstance(result, Tensor):
                self._follow(func._schema.name.removeprefix("aten::"), args, before, result)
        return output

    def _follow(self, name: str, args: tuple[Any, ...], before: list[tuple[Tensor, _Trail]], output: Tensor) -> None:
        trail: _Trail = {}
        if name == "cat":
            trail = self._concatenated(args)
        elif name in _RECTIFIERS or (name in _CLAMPS and len(args) > 1 and args[1] == 0):
            self._rectified(output, before[0][1])
        elif name in _FOLLOWED:
            for tensor, found in before:
                trail.update({m: start for m, start in found.items() if _same_channels(tensor, output, m.source)})
        self._trails[output] = trail

    def _concatenated(self, args: tuple[Any, ...]) -> _Trail:
        tensors, dim = args[0], args[1] if len(args) > 1 else 0
        trail: _Trail = {}
        along = 0
        for tensor in tensors:
            for mark, start in self._trails.get(tensor, {}).items():
                if dim % tensor.ndim == mark.source.channel_dim % tensor.ndim:
                    trail.setdefault(mark, start + along)
            along += tensor.shape[dim]
        return trail


def _same_channels(tensor: Tensor, output: Tensor, source: _Source) -> bool:
    same = tensor.ndim == output.ndim
    return same and tensor.shape[source.channel_dim] == output.shape[source.channel_dim]


def _tensors(args: tuple[Any, ...]) -> list[Tensor]:
    found = [arg for arg in args if isinstance(arg, Tensor)]
    return found + [t for arg in args if isinstance(arg, list | tuple) for t in arg if isinstance(t, Tensor)]
