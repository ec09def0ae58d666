"""How a model is run to be looked at: on inputs of any form, in which mode, what of it is running, what comes out."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils.rnn import PackedSequence
from torch.utils.checkpoint import CheckpointFunction, checkpoint

from lightning_prune.errors import TraceError, first_line
from lightning_prune.model_state.dispatch import EagerMode
from lightning_prune.model_state.preservation import folding, preserved

OWN = ("_parameters", "_buffers", "_modules")
OPAQUE = (str, bytes, int, float, complex, type(None), type, ModuleType, FunctionType, BuiltinFunctionType, nn.Module)


def as_args(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(positional, keyword) arguments of a forward call.

    A tuple is spread over the positional arguments, a dict with string keys over the keyword arguments; anything
    else, a list of images included, is the only argument.
    """
    if isinstance(example_inputs, tuple):
        return example_inputs, {}
    if isinstance(example_inputs, Mapping) and all(isinstance(key, str) for key in example_inputs):
        return (), dict(example_inputs)
    return (example_inputs,), {}


def call_model(model: nn.Module, example_inputs: Any) -> Any:
    """The model's output on example inputs."""
    args, kwargs = as_args(example_inputs)
    return model(*args, **kwargs)


def on_device(batch: Any, model: nn.Module) -> Any:
    """A batch with its tensors where the model's are, in containers of the same types; others as they are."""
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))

    def moved(tensor: Tensor) -> Tensor:
        frozen = tensor.is_inference() and not torch.is_inference_mode_enabled()  # autograd could not save it
        return tensor.to(device, copy=frozen)

    return map_tensors(moved, batch)


class RunningModules(contextlib.AbstractContextManager["RunningModules"]):
    """Which modules are running, also those made in the forward; on an exception those that were.

    (`torch.utils.module_tracker` keeps a set: it does not tell which of them is the innermost.)
    """

    def __init__(self, model: nn.Module, names: Mapping[int, str] | None = None) -> None:
        self.model = model
        self.names = {id(module): name for name, module in model.named_modules()} if names is None else names
        self.stack: list[nn.Module] = []  # outermost first

    def path(self, module: nn.Module) -> str:
        """Its path in the model; else its type."""
        return self.names.get(id(module), type(module).__name__)

    @property
    def paths(self) -> tuple[str, ...]:
        """Those that belong to the model, innermost first."""
        return tuple(self.names[id(module)] for module in reversed(self.stack) if id(module) in self.names)

    @contextlib.contextmanager
    def inside(self, module: nn.Module) -> Iterator[None]:
        """Its code runs, though not its forward."""
        self.stack.append(module)
        yield
        self.stack.pop()  # on an exception it stays, as those do whose forward failed

    def __enter__(self) -> RunningModules:
        register = nn.modules.module
        self._filters = warnings.catch_warnings()
        self._filters.__enter__()
        # These run twice for torch.compile's wrapper, which is right: the wrapper is left when it is left.
        warnings.filterwarnings("ignore", message=r"Using `torch\.compile\(module\)` when there are global hooks")
        self._hooks = (
            register.register_module_forward_pre_hook(lambda module, _: self.stack.append(module)),
            register.register_module_forward_hook(self._leave),
        )
        return self

    def _leave(self, *_: Any) -> None:  # what it returned would replace the module's output
        self.stack.pop()

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._filters.__exit__(None, None, None)


class KeepsDouble(EagerMode):
    """Inside, code that casts to a shorter floating type gets float64: what it rounds would hide what is compared."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and getattr(kwargs.get("dtype"), "is_floating_point", False):
            kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


def normalise_mode(model: nn.Module, *, training: bool) -> None:
    """Train or eval mode with batch norm and dropout always in eval; caches of eval mode are dropped."""
    if folding(model):
        model.train()
        model.train(training)
    for module in model.modules():
        own = vars(module)
        wanted = training and not isinstance(module, _BatchNorm) and not _is_dropout(module)
        if "training" in own:
            own["training"] = wanted  # what an assignment does, without looking for a parameter of that name
        else:
            module.training = wanted


def _is_dropout(module: nn.Module) -> bool:
    """Whether a module does nothing but drop elements, samples or paths at random while training."""
    return isinstance(module, _DropoutNd) or type(module).__name__ in ("StochasticDepth", "DropPath", "DropBlock2d")


@contextlib.contextmanager
def watch_training_flag() -> Iterator[set[str]]:
    """Types that ask whether they are in train or eval mode; torch's own (batch norm, dropout) do not count."""
    asked: set[str] = set()

    def get(module: nn.Module) -> Any:
        if not (type(module).__module__.startswith("torch.nn.modules.") or _is_dropout(module)):
            asked.add(type(module).__name__)
        if "training" in vars(module):
            return vars(module)["training"]
        return nn.Module.__getattr__(module, "training")  # ScriptModules keep it elsewhere

    nn.Module.training = property(get, lambda module, value: vars(module).update(training=value))  # type: ignore[assignment]
    try:
        yield asked
    finally:
        del nn.Module.training


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Run a model for its operators only: it is left as it was; no autograd, no fused attention, nothing compiled."""
    with preserved(model), by_operators():
        yield


@contextlib.contextmanager
def by_operators() -> Iterator[None]:
    """No autograd, no fused attention, nothing compiled."""
    fused = torch.backends.mha.get_fastpath_enabled()
    # Inference mode would hide the decomposition of linear layers and convolutions.
    # Fused attention would hide which channels meet in it.
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        torch.compiler.set_stance("force_eager"),
        saved_checkpoints(),  # reentrant ones warn of inputs that need no gradient
    ):
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)


class _Saved:
    """In place of torch's reentrant checkpoints: the same gradients, by the kind that keeps the graph."""

    def __init__(self, reentrant: type[CheckpointFunction]) -> None:
        self._reentrant = reentrant

    def apply(self, function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        if not torch.is_grad_enabled():
            return function(*args)
        if any(isinstance(value, Tensor) and value.requires_grad for value in args):
            return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve)
        return self._reentrant.apply(function, preserve, *args)  # takes no gradient, and says so


@contextlib.contextmanager
def saved_checkpoints() -> Iterator[None]:
    """Let no checkpoint of `torch.utils.checkpoint` run its part under no_grad: hooks could await no gradient there."""
    reentrant = torch.utils.checkpoint.CheckpointFunction
    torch.utils.checkpoint.CheckpointFunction = _Saved(reentrant)  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        torch.utils.checkpoint.CheckpointFunction = reentrant  # type: ignore[misc]


def remembered(model: nn.Module) -> set[tuple[str, str, tuple[int, ...]]]:
    """What modules keep in plain attributes: tensors that a run makes there are not made by the next."""
    return {
        (path, name, tuple(tensor.shape))
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor) or (isinstance(value, (dict, list)) and value and name not in OWN)
        for tensor in tensors_in(value)
    }


_PLAIN = frozenset((str, bytes, int, float, bool, complex, type(None)))


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor inside nested containers, mappings, dataclasses and objects with attributes, each once."""
    found: list[Tensor] = []
    seen: dict[int, Any] = {}  # the objects too: an id is free again once its object is gone
    to_do = [value]
    while to_do:
        item = to_do.pop()
        kind = type(item)
        if kind in _PLAIN or id(item) in seen:
            continue
        seen[id(item)] = item
        if kind is Tensor or isinstance(item, Tensor):
            found.append(item)
        elif kind is tuple or kind is list:
            to_do += reversed(item)
        elif kind is dict:
            to_do += reversed(item.values())
        elif not isinstance(item, OPAQUE):
            to_do += reversed([*_items(item), *_attributes(item).values()])
    return found


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same containers and objects, of the same types, with other tensors; what holds none is not copied."""
    return _mapped(function, value, {})


def _mapped(function: Callable[[Tensor], Tensor], value: Any, done: dict[int, Any]) -> Any:
    if id(value) in done:
        return done[id(value)][1]
    if isinstance(value, Tensor):
        new: Any = function(value)
    elif isinstance(value, OPAQUE) or not tensors_in(value):
        return value
    elif isinstance(value, PackedSequence):  # its batch sizes have to stay integers on the CPU
        parts = [None if t is None else function(t) for t in (value.data, value.sorted_indices, value.unsorted_indices)]
        new = PackedSequence(parts[0], value.batch_sizes, *parts[1:])  # type: ignore[arg-type]
    elif isinstance(value, (tuple, set, frozenset)):
        items = [_mapped(function, item, done) for item in value]
        new = type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    else:
        new = _shallow_copy(value)
        done[id(value)] = value, new  # before what is inside, which may lead back here
        for name, inner in _attributes(value).items():
            if (other := _mapped(function, inner, done)) is not inner:
                object.__setattr__(new, name, other)
        pairs = value.items() if isinstance(value, Mapping) else enumerate(_items(value))
        for key, inner in pairs:
            if (other := _mapped(function, inner, done)) is not inner:
                new[key] = other
    done[id(value)] = value, new
    return new


def _shallow_copy(value: Any) -> Any:
    if isinstance(value, Mapping) and not isinstance(value, MutableMapping):
        return dict(value)
    try:
        return copy.copy(value)
    except Exception as error:
        kind = type(value).__name__
        raise TraceError(
            f"tensors inside a {kind} cannot be moved or cast: {first_line(error)}; use a tuple or a dict"
        ) from error


def _items(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, (list, tuple, set, frozenset, deque)) else ()


def _attributes(value: Any) -> dict[str, Any]:
    """What an object keeps in its ``__dict__`` and ``__slots__``."""
    names = [name for kind in type(value).__mro__ for name in _slots(kind)]
    return {**getattr(value, "__dict__", {}), **{name: getattr(value, name) for name in names if hasattr(value, name)}}


def _slots(kind: type) -> list[str]:
    slots = vars(kind).get("__slots__", ())
    names = [slots] if isinstance(slots, str) else list(slots)
    hidden = kind.__name__.lstrip("_")
    own = [f"_{hidden}{name}" if name.startswith("__") and not name.endswith("__") else name for name in names]
    return [name for name in own if name not in ("__dict__", "__weakref__")]
