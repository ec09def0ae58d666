"""The frozen dense model beside the current one: its weights, lent for a forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module

from lightning_prune.errors import ScoreError
from lightning_prune.model_state.preservation import without_masks


def fit_baseline(model: nn.Module, baseline: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Copies of the baseline's tensors on the model's devices."""
    if baseline is None:
        raise ScoreError(
            "reference='baseline' needs the weights of the dense model: pass baseline={name: tensor}, for example a "
            "deep copy of model.state_dict() taken before pruning"
        )
    fitted = {}
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            continue
        if name not in baseline or baseline[name].shape != tensor.shape:
            found = f"shape {list(baseline[name].shape)}" if name in baseline else "nothing"
            raise ScoreError(
                f"baseline: expected {name!r} with shape {list(tensor.shape)}, found {found}; the model being scored "
                "must still have the dense shapes (mask it, and reconstruct at the end), or use reference='self'"
            )
        fitted[name] = baseline[name].detach().to(tensor.device, tensor.dtype, copy=True)
    return fitted


@contextmanager
def swapped(model: nn.Module, tensors: dict[str, Tensor]) -> Iterator[None]:
    """Let the model compute with other parameters and buffers; masks do not act on them meanwhile."""
    with _reparametrize_module(model, tensors, stack_weights=True), without_masks(model):
        yield
