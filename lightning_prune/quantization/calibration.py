"""What a model is calibrated on: its inputs in real batches, cut to the shapes that the file takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.criteria.batches import Loss, each_batch
from lightning_prune.engines.base import tensors_of
from lightning_prune.errors import QuantizationError
from lightning_prune.measure import samples_in
from lightning_prune.model_state.preservation import preserved


def calibration_runs(
    model: nn.Module, example_inputs: Any, batches: Iterable[Any], loss: Loss | None
) -> list[list[Tensor]]:
    """Inputs of the shapes of the example, on the CPU, one list of tensors per run."""
    example = tensors_of(example_inputs)
    size = samples_in(example_inputs)
    runs: list[list[Tensor]] = []
    none = QuantizationError("batches is empty: there is nothing to calibrate on")
    with preserved(model), torch.no_grad():
        model.eval()
        for batch in each_batch(model, batches, none):
            for given in [batch] if loss is None else _inputs_of(model, batch, loss):
                tensors = [tensor.detach().cpu() for tensor in tensors_of(_in_order(example_inputs, given))]
                _check_fit(example, tensors, size, given, loss)
                runs += _cut(example, tensors, size)
    if not runs:
        raise QuantizationError(
            f"every batch holds fewer samples than the example inputs, which hold {size}: give an example of one sample"
        )
    return runs


def _in_order(example_inputs: Any, given: Any) -> Any:
    """Named inputs in the order of the example's, which is that of the file."""
    if isinstance(example_inputs, Mapping) and isinstance(given, Mapping) and example_inputs.keys() == given.keys():
        return {name: given[name] for name in example_inputs}
    return given


def _inputs_of(model: nn.Module, batch: Any, loss: Loss) -> list[Any]:
    """What the model is called with while the loss runs it."""
    seen: list[Any] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((*args, *kwargs.values()) if args else kwargs)

    hook = model.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        loss(model, batch)
    finally:
        hook.remove()
    if not seen:
        raise QuantizationError(f"loss never called {type(model).__name__}, so there are no inputs to calibrate on")
    return seen


def _check_fit(example: list[Tensor], tensors: list[Tensor], size: int, given: Any, loss: Loss | None) -> None:
    def shape(tensor: Tensor, like: Tensor) -> list[Any]:
        return ["samples" if size and not number and len(like) == size else n for number, n in enumerate(tensor.shape)]

    alike = len(example) == len(tensors) and all(
        one.dim() == other.dim() and one.dtype == other.dtype and shape(one, one) == shape(other, one)
        for one, other in zip(example, tensors, strict=True)
    )
    if not alike:
        found, wanted = ([f"{list(t.shape)} {str(t.dtype)[6:]}" for t in side] for side in (tensors, example))
        hint = "; loss=lambda model, batch: model(batch[0]) runs the model on images that come with labels"
        raise QuantizationError(
            f"a batch holds {', '.join(found) or type(given).__name__} where the example inputs hold "
            f"{', '.join(wanted)}{hint if loss is None else ''}"
        )


def _cut(example: list[Tensor], tensors: list[Tensor], size: int) -> list[list[Tensor]]:
    """A batch as runs of as many samples as the example has; what is left over is not used."""
    if not size:
        return [tensors]
    count = min(len(tensor) for one, tensor in zip(example, tensors, strict=True) if one.dim() and len(one) == size)

    def part(one: Tensor, tensor: Tensor, start: int) -> Tensor:
        return tensor[start : start + size] if one.dim() and len(one) == size else tensor

    starts = range(0, count - size + 1, size)
    return [[part(one, tensor, start) for one, tensor in zip(example, tensors, strict=True)] for start in starts]
