"""How a model is run to be looked at: on inputs of any form, in which mode, what of it is running, what comes out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_leaves

from lightning_prune.model_state.preservation import preserved


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
    """A batch with its tensors where the model's are, in the containers that loaders make; others as they are."""
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    return _moved(batch, device)


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_moved(value, device) for value in batch))
    if type(batch) in (list, tuple):
        return type(batch)(_moved(value, device) for value in batch)
    return batch


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

    @contextlib.contextmanager
    def inside(self, module: nn.Module) -> Iterator[None]:
        """Its code runs, though not its forward."""
        self.stack.append(module)
        yield
        self.stack.pop()  # on an exception it stays, as those do whose forward failed

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
