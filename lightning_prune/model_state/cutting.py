"""Cutting a model's tensors and size attributes in place, and putting everything back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.optim import Optimizer

from lightning_prune.model_state.attention import fit_attention_
from lightning_prune.model_state.code_sizes import SIZES, follow_, unfollow_
from lightning_prune.model_state.memory import NewMemory, memory_order, set_data_, upright
from lightning_prune.model_state.optimizer_state import change_state_, check_state, rescale_state_
from lightning_prune.model_state.preservation import folding, places_of, put_back
from lightning_prune.model_state.recomputing import recompute_, update_recurrent_, value_of, weight_hooks

CHANGED = "_sizes_changed_by_pruning"
RESCALED = "_weight_rescaled_by_pruning"
DENSE = "_shapes_before_pruning"


@dataclass(frozen=True)
class Cut:
    """The entries of one dimension of one tensor that survive."""

    tensor: str
    dim: int
    keep: Tensor

    def apply(self, tensor: Tensor, like: Tensor | None = None) -> Tensor:
        """A smaller, dense copy, whose dimensions lie in memory in the order of those of ``like``, or of the tensor."""
        keep, order = self.keep.to(tensor.device), memory_order(tensor if like is None else like)
        if order == list(range(tensor.dim())):
            return tensor.detach().index_select(self.dim, keep)
        return upright(tensor.detach().permute(order).index_select(order.index(self.dim), keep), order)


@dataclass(frozen=True)
class NewSize:
    """An integer attribute, one item of a list or tuple, or a size in the module's code, that changes."""

    module: str
    attribute: str
    position: int | str | None
    value: int


@dataclass(frozen=True)
class MeanRescaling:
    """What makes up for the channels that a mean no longer counts: an eps and a weight of the module that takes it.

    eps * ``eps_factor``; (weight + ``offset``) * ``factor`` - ``offset``.
    """

    module: str
    eps: str | None  # its attribute
    eps_factor: float
    weight: str
    factor: float
    offset: float


@torch.inference_mode(False)  # what is cut can be trained
def cut_(model: nn.Module, cuts: Sequence[Cut], optimizers: Sequence[Optimizer] = ()) -> None:
    """Cut tensors, which stay the same objects; their gradients and optimizer state are cut along.

    Raises:
        OptimizerError: that cannot be done to the state of an optimizer; nothing has been changed then.
    """
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    check_state(optimizers, (tensors[cut.tensor] for cut in cuts))
    memory = NewMemory()
    for cut in sorted(cuts, key=lambda cut: (cut.tensor, cut.dim)):
        tensor = tensors[cut.tensor]
        data, gradient = tensor.data, tensor.grad
        tensor.grad = None  # torch refuses a .data whose shape differs from .grad
        memory.change_(tensor, cut.apply, cut.dim, cut.keep)
        # Fused optimizers walk through weight, gradient and state by address: all lie in the same order.
        tensor.grad = None if gradient is None else cut.apply(gradient, data)
        change_state_(optimizers, tensor, data.shape, partial(cut.apply, like=data))
    memory.leave_(tensors.values())


def resize_(model: nn.Module, sizes: Sequence[NewSize]) -> None:
    """Set size attributes, then make those of torch's own layers say what their weights are."""
    for size in sizes:
        module = model.get_submodule(size.module)
        if size.attribute == SIZES:
            set_size_(module, SIZES, {**vars(module).get(SIZES, {}), size.position: size.value})
            continue
        old = getattr(module, size.attribute)
        new: Any = size.value
        if size.position is not None:
            new = type(old)(size.value if k == size.position else item for k, item in enumerate(old))
        if new != old:
            set_size_(module, size.attribute, new)
    update_attributes_(model)
    drop_caches_(model)


@torch.inference_mode(False)
def rescale_means_(
    model: nn.Module, mean_rescalings: Sequence[MeanRescaling], optimizers: Sequence[Optimizer] = ()
) -> dict[str, Tensor]:
    """Let means over fewer channels come to the same; once after each cut. Gradients and optimizer state follow.

    Returns the weights before they are rounded to their type.
    """
    parameters = dict(model.named_parameters())
    precise: dict[str, Tensor] = {}
    for one in mean_rescalings:
        module = model.get_submodule(one.module)
        vars(module)[RESCALED] = 1
        if one.eps is not None:
            set_size_(module, one.eps, getattr(module, one.eps) * one.eps_factor)
        parameter = parameters[one.weight]
        precise[one.weight] = (parameter.data.double() + one.offset) * one.factor - one.offset
        set_data_(parameter, precise[one.weight].to(parameter.dtype))
        if parameter.grad is not None:
            parameter.grad = parameter.grad / one.factor
        rescale_state_(optimizers, parameter, one.factor)
    if mean_rescalings:
        drop_caches_(model)
    return precise


def drop_caches_(model: nn.Module) -> None:
    """Let modules derive anew, from changed weights, what they derived when they entered eval mode; the modes stay.

    Entering train mode is what makes them forget it. Those in eval mode enter it again: some fold their branches into
    one kernel then.
    """
    if not folding(model):
        return
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    entered: set[int] = set()
    for module, training in modes:
        if not training and id(module) not in entered:
            module.eval()
            entered.update(id(inner) for inner in module.modules())
    for module, training in modes:
        module.training = training


def set_size_(module: nn.Module, name: str, value: Any) -> None:
    """Set one size attribute, or an eps, and remember that it was set, for `changed_sizes`."""
    if name == SIZES:
        follow_(module, value)
    else:
        setattr(module, name, value)
    vars(module)[CHANGED] = tuple(sorted({*getattr(module, CHANGED, ()), name}))


def changed_sizes(model: nn.Module) -> dict[str, dict[str, Any]]:
    """{module path: {attribute: value}} of what reconstruction set and no tensor tells: sizes, and eps."""
    return {
        path: {name: getattr(module, name) for name in getattr(module, CHANGED)}
        for path, module in model.named_modules()
        if hasattr(module, CHANGED)
    }


def is_rescaled(model: nn.Module) -> bool:
    """Whether a weight was multiplied, see `rescale_means_`, which its type rounds; of a loaded model its eps tells."""
    marked = any(RESCALED in vars(module) for module in model.modules())
    return marked or any(
        isinstance(value, float) for values in changed_sizes(model).values() for value in values.values()
    )


def update_attributes_(model: nn.Module) -> None:
    """Make the size attributes of torch's own layers say what their weights are; ``groups`` must be right already."""
    recompute_(model)
    for module in model.modules():
        weight = value_of(module, "weight")
        if isinstance(module, _ConvTransposeNd):
            module.in_channels, module.out_channels = weight.shape[0], weight.shape[1] * module.groups
        elif isinstance(module, _ConvNd):
            module.out_channels, module.in_channels = weight.shape[0], weight.shape[1] * module.groups
        elif isinstance(module, nn.Linear):
            module.out_features, module.in_features = weight.shape
        elif isinstance(module, nn.Bilinear):
            module.out_features = weight.shape[0]
        elif isinstance(module, _NormBase):
            if (sized := module.running_mean if weight is None else weight) is not None:
                module.num_features = len(sized)
        elif isinstance(module, nn.GroupNorm) and weight is not None:
            module.num_channels = len(weight)
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and weight is not None:
            module.normalized_shape = tuple(weight.shape)
        elif isinstance(module, nn.Embedding):
            module.num_embeddings, module.embedding_dim = weight.shape
        elif isinstance(module, nn.PReLU):
            module.num_parameters = weight.numel()
    update_recurrent_(model)
    fit_attention_(model)


class Undo:
    """Puts back submodules, parameters, buffers, numbers in attributes and optimizer state of a model."""

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer] = (), *, tensors: bool = True) -> None:
        self.model = model
        kept = (*model.parameters(), *model.buffers()) if tensors else ()
        self.tensors = [(t, t.data, t.grad) for t in kept]
        self.places = places_of(model)
        self.attributes = [(module, numbers_of(module), vars(module).get(SIZES)) for module in model.modules()]
        self.nested = [(m, m.use_nested_tensor) for m in model.modules() if isinstance(m, nn.TransformerEncoder)]
        self.computed = [(m, name, getattr(m, name)) for m in model.modules() for name in weight_hooks(m)]
        self.states = [(state, dict(state)) for optimizer in optimizers for state in optimizer.state.values()]

    def __call__(self) -> None:
        """Put them back."""
        put_back(self.places)
        for tensor, data, gradient in self.tensors:
            tensor.grad = None
            set_data_(tensor, data)
            tensor.grad = gradient
        for module, numbers, in_code in self.attributes:
            for mark in (CHANGED, RESCALED):
                vars(module).pop(mark, None)
            unfollow_(module)
            if in_code is not None:
                follow_(module, in_code)
            vars(module).update(numbers)
        for encoder, nested in self.nested:
            encoder.use_nested_tensor = nested
        fit_attention_(self.model)
        for module, name, value in self.computed:
            setattr(module, name, value)
        for state, before in self.states:
            state.update(before)


def dense_shapes(model: nn.Module) -> dict[str, list[int]]:
    """{tensor: its shape before anything was cut from the model or a part of it}, of the tensors that were cut."""
    found: dict[str, list[int]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for tensor, shape in vars(module).get(DENSE, {}).items():
            name = f"{path}.{tensor}" if path else tensor
            found[name] = list(map(max, shape, found.get(name, shape)))  # cuts of whole and part make it only smaller
    return found


def remember_dense_(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> None:
    """Note shapes from before a cut, for `dense_shapes`; those of an earlier cut stay."""
    vars(model)[DENSE] = {**{name: list(shape) for name, shape in shapes.items()}, **dense_shapes(model)}


def forget_dense_(model: nn.Module) -> None:
    """Let `dense_shapes` say nothing of tensors that the model no longer has."""
    names = {name for kind in (model.named_parameters, model.named_buffers) for name, _ in kind(remove_duplicate=False)}
    if DENSE in vars(model):
        vars(model)[DENSE] = {name: shape for name, shape in dense_shapes(model).items() if name in names}


def sizes_of(module: nn.Module) -> dict[str, Any]:
    """A module's own attributes that are integers, or lists or tuples of integers."""
    return {name: value for name, value in vars(module).items() if _is_size(value) or name == CHANGED}


def numbers_of(module: nn.Module) -> dict[str, Any]:
    """All of a module's own attributes that pruning may change: its sizes, and numbers such as an eps."""
    return {**sizes_of(module), **{name: value for name, value in vars(module).items() if isinstance(value, float)}}


_NO_SIZES = frozenset((bool, float, str, type(None), dict, OrderedDict, set))  # most of what modules keep


def _is_size(value: Any) -> bool:
    kind = type(value)
    if kind is int or kind in _NO_SIZES:
        return kind is int
    items = value if isinstance(value, (list, tuple)) else (value,)
    return bool(items) and all(isinstance(item, int) and not isinstance(item, bool) for item in items)
