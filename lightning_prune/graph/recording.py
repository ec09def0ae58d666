"""Run a model once and show every ATen operator, with the tensors' labels, to a rule."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from lightning_prune.graph.labels import TensorInfo
from lightning_prune.model_state.preservation import preserved

Observe = Callable[["OperatorRecorder", Any, tuple[Any, ...], dict[str, Any], Any], None]


class OperatorRecorder(TorchDispatchMode):
    """Dispatch mode that calls ``observe(recorder, op, args, kwargs, output)`` after every operator.

    Information is held per tensor object, weakly: an activation's labels go when the activation goes.
    """

    def __init__(self, known: Mapping[Tensor, TensorInfo], modules: RunningModules, observe: Observe, run: int) -> None:
        super().__init__()
        self.run, self.order = run, 0
        self.before: Tensor | None = None
        self._modules = modules
        self._info = WeakIdKeyDictionary(dict(known))
        self._by_storage = {tensor.untyped_storage()._cdata: tensor for tensor in known}
        self._observe = observe

    @property
    def stack(self) -> tuple[str, ...]:
        """Paths of the modules that are running, innermost first; the type of those made in the forward."""
        return tuple(map(self._modules.path, reversed(self._modules.stack)))

    @property
    def module(self) -> str:
        """Path of the innermost module that is running."""
        return self._modules.path(self._modules.stack[-1]) if self._modules.stack else ""

    @property
    def kind(self) -> str:
        """Type of the innermost module that is running."""
        return "".join(f"{type(m).__module__}.{type(m).__qualname__}" for m in self._modules.stack[-1:])

    def info(self, tensor: Tensor) -> TensorInfo:
        """What is known of a tensor; a parameter seen through ``.data`` or ``detach`` is found by its storage."""
        found = self._info.get(tensor)
        if found is None:
            owner = self._by_storage.get(tensor.untyped_storage()._cdata)
            same = owner is not None and owner.shape == tensor.shape and owner.stride() == tensor.stride()
            found = self._info[owner] if same else TensorInfo()
        return found

    def set_info(self, tensor: Tensor, info: TensorInfo) -> None:
        """Remember the labels of a tensor for as long as it lives."""
        self._info[tensor] = info

    def aliases(self, tensor: Tensor) -> list[Tensor]:
        """Other live tensors on the same storage."""
        storage = tensor.untyped_storage()._cdata
        return [t for t in self._info if t is not tensor and t.untyped_storage()._cdata == storage]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # Restrides in place: only the old strides tell whether the elements stay where they were.
        self.before = args[0].detach() if func is torch.ops.aten.as_strided_.default else None
        output = func(*args, **kwargs)
        self.order += 1
        self._observe(self, func, args, kwargs, output)
        return output


class RunningModules(contextlib.AbstractContextManager["RunningModules"]):
    """Which modules are running, also those made in the forward; on an exception those that were.

    (`torch.utils.module_tracker` keeps a set: it does not tell which of them is the innermost.)
    """

    def __init__(self, model: nn.Module) -> None:
        self.names = {id(module): name for name, module in model.named_modules()}
        self.stack: list[nn.Module] = []  # outermost first

    def path(self, module: nn.Module) -> str:
        """Its path in the model; else its type."""
        return self.names.get(id(module), type(module).__name__)

    @property
    def paths(self) -> tuple[str, ...]:
        """Those that belong to the model, innermost first."""
        return tuple(self.names[id(module)] for module in reversed(self.stack) if id(module) in self.names)

    def __enter__(self) -> RunningModules:
        register = nn.modules.module
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


def normalise_mode(model: nn.Module, *, training: bool) -> None:
    """Train or eval mode with batch norm and dropout always in eval; caches of eval mode are dropped."""
    model.train()
    model.train(training)
    for module in model.modules():
        if isinstance(module, _BatchNorm) or _is_dropout(module):
            module.eval()


def _is_dropout(module: nn.Module) -> bool:
    """Whether a module does nothing but drop elements, samples or paths at random while training."""
    return isinstance(module, _DropoutNd) or type(module).__name__ in ("StochasticDepth", "DropPath", "DropBlock2d")


class _TrainingFlag:
    """Stands in for ``nn.Module.training`` and notes whether a module with code of its own asks for it."""

    def __init__(self) -> None:
        self.asked = False

    def __get__(self, module: nn.Module | None, owner: type) -> Any:
        if module is None:
            return self
        self.asked = self.asked or not (owner.__module__.startswith("torch.nn.modules.") or _is_dropout(module))
        if "training" in vars(module):
            return vars(module)["training"]
        return nn.Module.__getattr__(module, "training")  # ScriptModules keep it elsewhere

    def __set__(self, module: nn.Module, value: bool) -> None:
        vars(module)["training"] = value


@contextlib.contextmanager
def watch_training_flag() -> Iterator[_TrainingFlag]:
    """See whether a run depends on train or eval mode; torch's own modules (batch norm, dropout) do not count."""
    flag = _TrainingFlag()
    nn.Module.training = flag  # type: ignore[assignment]
    try:
        yield flag
    finally:
        del nn.Module.training


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Run a model for its operators only: it is left as it was; no autograd, no fused attention."""
    fused = torch.backends.mha.get_fastpath_enabled()
    # Inference mode would hide the decomposition of linear layers and convolutions.
    # Fused attention would hide which channels meet in it.
    with preserved(model), torch.inference_mode(False), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor inside nested containers, dataclasses and objects with attributes."""
    found: list[Tensor] = []
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, (type, nn.Module)):
            found += [t for v in vars(leaf).values() if v is not leaf for t in tensors_in(v)]
    return found
