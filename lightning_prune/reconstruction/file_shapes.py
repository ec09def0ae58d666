"""The shapes that a pruned file says its model has: checked against a dense model, then given to it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_prune.errors import CheckpointError
from lightning_prune.model_state.cut_history import remember_history_
from lightning_prune.model_state.cutting import remember_dense_, set_size_, update_attributes_
from lightning_prune.model_state.memory import dense_copy, set_data_
from lightning_prune.model_state.preservation import knows_shapes
from lightning_prune.plan import Plan
from lightning_prune.reconstruction.channel_map import history_in
from lightning_prune.reconstruction.dropped_blocks import drop_as_noted_
from lightning_prune.reconstruction.file_checks import check_plan, check_sizes
from lightning_prune.reconstruction.state_dicts import check_kind, check_names


@contextmanager
def dropped_as_noted(
    model: nn.Module, content: Mapping[str, Any], source: str, *, always_back: bool = False
) -> Iterator[None]:
    """The model without the blocks that a file's model has no more; they come back on failure, or always."""
    if knows_shapes(model):
        raise CheckpointError("the dense model holds masks, which know its shapes; call MaskHandle.remove() first")
    undo = drop_as_noted_(model, content.get("blocks", {}), source)
    try:
        yield
    except BaseException:
        undo()
        raise
    if always_back:
        undo()


@dataclass(frozen=True)
class FileShapes:
    """What a pruned checkpoint says of the model that it is of."""

    plan: Plan
    state: dict[str, Any]  # with the buffers that no state dict holds
    buffers: dict[str, Any]
    sizes: dict[str, dict[str, Any]]
    dense: dict[str, list[int]]
    channels: Any  # of which the map of old and new ones is made
    source: str

    @classmethod
    def read(cls, content: Mapping[str, Any], source: str) -> FileShapes:
        """From the content of a file."""
        try:
            buffers, plan = dict(content.get("buffers", {})), Plan.from_dict(content["plan"])  # a file may be older
            state = {**content["state_dict"], **buffers}
            sizes = {module: dict(values) for module, values in content["sizes"].items()}
            dense = {name: list(shape) for name, shape in content["dense"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{source} is not a pruned checkpoint: {error!r}") from error
        return cls(plan, state, buffers, sizes, dense, content.get("channels"), source)

    def check(self, model: nn.Module) -> list[str]:
        """Refuse a model that cannot become the one in the file; the names of the tensors to change otherwise."""
        tensors = _tensors(model)
        own = {**model.state_dict(), **{name: tensors[name] for name in self.buffers if name in tensors}}
        check_names(own, self.state, self.source)
        smaller = [name for name, value in self.state.items() if shape_of(value) != shape_of(own[name])]
        for name in dict.fromkeys((*smaller, *self.dense)):
            saved = self.state.get(name)
            if name in tensors and saved is not None and shape_of(saved) == shape_of(own[name]):
                continue  # it has the pruned shape already
            expected = self.dense.get(name, shape_of(saved))
            fits = name in tensors and isinstance(saved, Tensor) and saved.dim() == tensors[name].dim()
            if not fits or expected != shape_of(own[name]):
                found = shape_of(own[name]) if name in own else "not there"
                was = f" (cut from {expected})" if name in self.dense else ""
                raise CheckpointError(
                    f"{self.source} belongs to another model: {name!r} is {shape_of(saved)} in the file{was} and "
                    f"{found} in the dense model"
                )
            assert saved is not None
            if not all(1 <= new <= old for new, old in zip(saved.shape, tensors[name].shape, strict=True)):
                raise CheckpointError(
                    f"{self.source} is damaged: {name!r} is {shape_of(saved)}, which cannot be cut from {expected}"
                )
        for name, saved in self.state.items():
            check_kind(name, saved, own[name], self.source)
        check_plan(self.plan, self.state, dict(model.named_modules()), own, self.source)
        check_sizes(dict(model.named_modules()), self.sizes, self.source)
        history_in(self.channels, self.state, self.source)
        return smaller

    def apply_(self, model: nn.Module, smaller: Iterable[str]) -> None:
        """Cut the model, which `check` has found to fit."""
        tensors, modules = _tensors(model), dict(model.named_modules())
        for name, saved in {**{name: self.state[name] for name in smaller}, **self.buffers}.items():
            tensor = tensors[name]
            tensor.grad = None
            set_data_(tensor, dense_copy(saved.to(tensor), tensor))
        for module, values in self.sizes.items():
            for name, value in values.items():
                set_size_(modules[module], name, value)
        update_attributes_(model)
        remember_dense_(model, self.dense)
        remember_history_(model, history_in(self.channels, self.state, self.source))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Shared tensors are in a state dict under every name they have."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def shape_of(value: Any) -> list[int] | str:
    """Of a tensor; modules may also keep other things in a state dict (`get_extra_state`)."""
    return list(value.shape) if isinstance(value, Tensor) else type(value).__name__
