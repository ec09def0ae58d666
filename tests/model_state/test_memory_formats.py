"""Cutting keeps what torch chooses its kernels by: the order in memory, dense storage, types, devices and flags."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_prune.errors import OptimizerError
from lightning_prune.model_state.cutting import Cut, Undo, cut_
from lightning_prune.model_state.memory import dense_copy, set_data_
from lightning_prune.model_state.optimizer_state import check_sliceable

LAYERS = {
    "conv": lambda outputs, inputs: nn.Conv2d(inputs, outputs, 3),
    "1x1 conv": lambda outputs, inputs: nn.Conv2d(inputs, outputs, 1),
    "transposed conv": lambda outputs, inputs: nn.ConvTranspose2d(outputs, inputs, 3),
    "depthwise conv": lambda outputs, inputs: nn.Conv2d(outputs, outputs, 3, groups=outputs),
    "3d conv": lambda outputs, inputs: nn.Conv3d(inputs, outputs, 3),
    "linear": lambda outputs, inputs: nn.Linear(inputs, outputs),
}
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _converted(layer: nn.Module, last: bool) -> nn.Module:
    dim = layer.weight.dim()
    return layer.to(memory_format=LAST[dim]) if last and dim in LAST else layer


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("sizes", [(4, 5), (1, 5), (4, 1), (1, 1)])
@pytest.mark.parametrize("name", LAYERS)
def test_a_cut_layer_lies_in_memory_as_one_that_was_built_small(
    name: str, sizes: tuple[int, int], device: str, last: bool
) -> None:
    layer, fresh = (_converted(LAYERS[name](*size).to(device), last) for size in ((8, 6), sizes))
    cuts = [Cut("weight", dim, torch.arange(size)) for dim, size in enumerate(fresh.weight.shape)]
    cut_(layer, cuts)
    assert layer.weight.shape == fresh.weight.shape
    assert layer.weight.stride() == fresh.weight.stride()
    assert layer.weight.untyped_storage().nbytes() == layer.weight.nbytes
    assert layer.weight.device.type == device


def test_any_order_of_dimensions_is_kept_and_what_is_no_dense_tensor_becomes_one() -> None:
    wide = torch.arange(48.0).view(6, 8)
    for tensor, strides in ((wide.t(), (1, 8)), (wide[:, ::2].t(), (1, 4)), (torch.ones(1, 6).expand(8, 6), (2, 1))):
        smaller = Cut("weight", 1, torch.tensor([0, 5])).apply(tensor)
        assert torch.equal(smaller, tensor[:, [0, 5]])
        assert smaller.stride() == strides
        assert smaller.untyped_storage().nbytes() == smaller.nbytes
    copied = dense_copy(torch.ones(2, 3, 4, 4), torch.ones(8, 3, 4, 4).to(memory_format=torch.channels_last))
    assert copied.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_and_optimizer_state_lie_as_the_weight_does(dtype: torch.dtype) -> None:
    """Fused kernels walk through all of them by address: another order would mix up channels, without an error."""
    layer = nn.Conv2d(6, 8, 3, dtype=dtype).to(memory_format=torch.channels_last)
    layer.bias.requires_grad_(False)
    weight = layer.weight
    optimizer = torch.optim.Adam(layer.parameters(), capturable=False)
    state = {"step": torch.tensor(3.0), "exp_avg": torch.randn_like(weight), "exp_avg_sq": torch.rand(8, 6, 3, 3)}
    optimizer.state[weight] = {key: value.clone() for key, value in state.items()}
    step = optimizer.state[weight]["step"]
    weight.grad = torch.randn(8, 6, 3, 3, dtype=dtype)  # in the other order
    gradient = weight.grad
    keep = torch.tensor([1, 4, 5])
    cut_(layer, [Cut("weight", 0, keep), Cut("weight", 1, keep), Cut("bias", 0, keep)], [optimizer])
    tensors = {**optimizer.state[weight], "gradient": weight.grad}
    assert tensors.pop("step") is step  # a capturable optimizer's is on the device, and known to a captured graph
    assert all(tensor.stride() == weight.stride() == (27, 1, 9, 3) for tensor in tensors.values())
    expected = {**state, "gradient": gradient}
    assert all(torch.equal(value, expected[key][keep][:, keep]) for key, value in tensors.items())
    assert (weight.dtype, weight.grad.dtype) == (dtype, dtype)
    assert (weight.requires_grad, layer.bias.requires_grad) == (True, False)


def test_undo_puts_back_the_same_memory() -> None:
    layer = nn.Conv2d(6, 8, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    layer(torch.randn(2, 6, 8, 8)).square().mean().backward()
    optimizer.step()
    weight = layer.weight

    def places() -> list[tuple[object, ...]]:
        tensors = (weight, weight.grad, *optimizer.state[weight].values())
        return [(tensor.data_ptr(), tensor.shape, tensor.stride()) for tensor in tensors]

    before, undo = places(), Undo(layer, [optimizer])
    cut_(layer, [Cut("weight", 0, torch.tensor([1, 2]))], [optimizer])
    assert places() != before
    undo()
    assert places() == before


@pytest.mark.parametrize("make", [torch.optim.Adafactor, torch.optim.LBFGS])
def test_state_of_another_shape_is_refused_before_anything_is_cut(make) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    optimizer = make(model.parameters())
    fresh = copy.deepcopy(model)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = model(torch.ones(3, 4)).square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    cuts = [Cut("1.weight", 0, torch.tensor([0])), Cut("1.bias", 0, torch.tensor([0]))]
    with pytest.raises(OptimizerError, match=rf"{make.__name__} keeps '\w+' .* cannot be cut along"):
        cut_(model, cuts, [optimizer])
    assert [list(parameter.shape) for parameter in model.parameters()] == [[6, 4], [6], [2, 6], [2]]
    cut_(fresh, cuts, [make(fresh.parameters())])  # before its first step it keeps nothing
    assert len(fresh[1].weight) == 1


def test_what_an_optimizer_will_keep_is_known_from_its_own_shapes_and_after_a_state_was_loaded() -> None:
    class Factored(torch.optim.SGD):
        """Keeps averages of rows where there are many (timm's Adafactor)."""

        def step(self, closure=None) -> None:
            for parameter in self.param_groups[0]["params"]:
                self.state[parameter]["average"] = parameter.mean(1) if len(parameter) > 9 else parameter.clone()

    check_sliceable([Factored([nn.Parameter(torch.ones(9, 4))])])
    with pytest.raises(OptimizerError, match="Factored keeps 'average'"):
        check_sliceable([Factored([nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(16, 4))])])
    loaded = torch.optim.LBFGS([nn.Parameter(torch.ones(3))])
    loaded.load_state_dict(loaded.state_dict())  # adds defaults that its class does not take
    with pytest.raises(OptimizerError, match="LBFGS keeps"):
        check_sliceable([loaded])


def test_within_autocast_new_data_are_seen_at_once() -> None:
    layer, inputs = nn.Linear(2, 2, bias=False), torch.ones(1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        layer(inputs)  # keeps a copy of the weight in bfloat16
        set_data_(layer.weight, torch.zeros(3, 2))
        assert torch.equal(layer(inputs), torch.zeros(1, 3, dtype=torch.bfloat16))


def test_what_lay_in_one_vector_keeps_none_of_it_alive() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    torch.nn.utils.vector_to_parameters(torch.nn.utils.parameters_to_vector(model.parameters()), model.parameters())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    undo, keep = Undo(model), torch.tensor([1, 4])
    cut_(model, [Cut("0.weight", 0, keep), Cut("0.bias", 0, keep), Cut("2.weight", 1, keep)])
    assert all(parameter.untyped_storage().nbytes() == parameter.nbytes for parameter in model.parameters())
    assert torch.equal(model[2].bias, before["2.bias"])
    undo()
    assert len({parameter.untyped_storage().data_ptr() for parameter in model.parameters()}) == 1
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
