"""What a module's forward is given in its own training step, where no example was set."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from pytorch_lightning import LightningModule
from torch import Tensor

from lightning_prune.errors import CallbackError
from lightning_prune.graph.entry_points import EntryPoint, head
from lightning_prune.graph.running import untouched
from lightning_prune.model_state.preservation import copy_sharing_tensors
from lightning_prune.reconstruction.rehearsal import SAMPLES


class _Seen(BaseException):
    """What forward was given; ends the step, also where that catches every Exception."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.arguments = args, kwargs


def seen_inputs(pl_module: LightningModule, steps: Sequence[EntryPoint]) -> Any:
    """The inputs of the first forward in ``training_step``, of two samples; None if it calls no forward of the module.

    The step runs on a copy, up to that call.

    Raises:
        CallbackError: it failed before.
    """
    step = next((entry for entry in steps if entry.name.startswith("training_step")), None)
    if step is None:
        return None
    copied = copy_sharing_tensors(pl_module)

    def stop(_module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Seen(args, kwargs)

    copied.register_forward_pre_hook(stop, with_kwargs=True)
    step = head(step.own(), SAMPLES)
    with untouched(copied):
        try:
            step.call(copied, step.inputs)
        except _Seen as seen:
            return _as_example(pl_module, *seen.arguments)
        except Exception as error:
            raise CallbackError(
                f"no example inputs, and {step.name} raised {type(error).__name__} before it called self(...): "
                f"{error}. Set self.example_input_array in the LightningModule, or pass example_inputs=... to the "
                "callback"
            ) from error
    return None


def _as_example(pl_module: LightningModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A tensor, a tuple of positional arguments or a dict of named ones; None if they have to be mixed."""
    if not kwargs:
        return args[0] if len(args) == 1 and isinstance(args[0], Tensor) else args
    signature = inspect.signature(pl_module.forward)
    named: dict[str, Any] = {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        kind = signature.parameters[name].kind
        if kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY):
            return None
        named |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    return named
