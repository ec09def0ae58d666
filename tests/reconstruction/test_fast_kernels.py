"""Masks, reconstruction and loading keep what makes kernels fast, and whatever trains the model goes on."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import lightning_prune as lp
from lightning_prune.model_state.preservation import copy_without_masks
from lightning_prune.reconstruction.small_model import cuts
from tests.helpers import random_plan
from tests.zoo import ZOO, build, images

LAST = torch.channels_last
OPTIMIZERS = {
    "SGD": lambda p, **options: torch.optim.SGD(p, 0.01, momentum=0.9, weight_decay=1e-3, **options),
    "AdamW": lambda p, **options: torch.optim.AdamW(p, 1e-3, amsgrad=True, **options),
    "Adagrad": lambda p, **options: torch.optim.Adagrad(p, 1e-3, **options),
}


def _net(name: str = "Residual", dtype: torch.dtype = torch.float64) -> nn.Module:
    return build(name).to(dtype).to(memory_format=LAST)


def _strides(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tensor.stride() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def _layouts(model: nn.Module, x: Tensor) -> dict[str, tuple[torch.Size, tuple[int, ...]]]:
    """Shape and strides of what every module returns."""
    found = {}
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda _, __, out, name=name: found.update(
                {name: (out.shape, out.stride())} if torch.is_tensor(out) else {}
            )
        )
    model(x)
    return found


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def _built_small(model: nn.Module, graph: lp.ChannelGraph, plan: lp.Plan) -> nn.Module:
    """What a user would have who builds the small model and converts it."""
    contiguous = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    small = lp.reconstruct(contiguous, graph, plan)
    assert all(strides == torch.empty(small.state_dict()[n].shape).stride() for n, strides in _strides(small).items())
    return small.to(memory_format=LAST)


@pytest.mark.parametrize("name", ZOO)
def test_a_channels_last_model_stays_one(name: str) -> None:
    """Its weights and activations lie as those of one that was built small and converted."""
    model, x = _net(name), images().to(memory_format=LAST)
    graph = lp.trace(model, x)
    plan = random_plan(graph)
    expected, small = _built_small(model, graph, plan), lp.reconstruct(model, graph, plan)
    assert _strides(small) == _strides(expected)
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in small.state_dict().values())
    lp.reconstruct_(model, graph, plan)
    assert _strides(model) == _strides(expected)
    for given in (x, x.contiguous()):
        layouts = _layouts(copy.deepcopy(small), given)
        assert layouts == _layouts(copy.deepcopy(expected), given)
        last = [shape for shape, strides in layouts.values() if len(shape) == 4 and strides[1] == 1]
        assert len(last) > 1


def test_prune_and_a_session_keep_the_format_of_model_masked_and_average() -> None:
    x = images()
    result = lp.prune(_net(), x, ratio=0.5)
    assert _strides(result.masked) == _strides(_net())
    assert _strides(result.model) == _strides(copy.deepcopy(result.model).to(memory_format=LAST))
    assert result.model.stem[0].weight.stride()[1] == 1
    model = _net().train()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    session = lp.PruningSession(model, x)
    session.step(copies=[average.module])
    session.reconstruct_(copies=[average.module])
    assert _strides(average.module) == _strides(model) == _strides(result.model)
    average.update_parameters(model)


@pytest.mark.parametrize("how", [{"fused": True}, {"foreach": True}])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fused_optimizers_go_on_as_on_the_masked_model(name: str, how: dict[str, bool]) -> None:
    x = images(4)
    model = _net().train()
    graph = lp.trace(model, x)
    plan = random_plan(graph)
    optimizer = OPTIMIZERS[name](model.parameters(), **how)
    handle = lp.mask_(model, graph, plan, optimizers=[optimizer])
    _step(model, optimizer, x)
    handle.apply_()
    small = copy_without_masks(model)
    small_optimizer = OPTIMIZERS[name](small.parameters(), **how)
    small_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    lp.reconstruct_(small, graph, plan, optimizers=[small_optimizer])
    for _ in range(3):
        _step(model, optimizer, x)
        _step(small, small_optimizer, x)
    handle.apply_()
    expected = {name: parameter.data for name, parameter in model.named_parameters()}
    for cut in cuts(graph, plan):
        if cut.tensor in expected:
            expected[cut.tensor] = cut.apply(expected[cut.tensor])
    for name, parameter in small.named_parameters():
        assert torch.allclose(parameter, expected[name], rtol=1e-8, atol=1e-10), name
        tensors = [parameter.grad, *(value for value in small_optimizer.state[parameter].values() if value.dim())]
        assert all(tensor.stride() == parameter.stride() for tensor in tensors)


def test_an_optimizer_that_cannot_go_on_is_refused_and_nothing_changes() -> None:
    x, model = images(4), _net().train()
    graph = lp.trace(model, x)
    optimizer = torch.optim.Adafactor(model.parameters())
    _step(model, optimizer, x)
    before = copy.deepcopy([*model.state_dict().values(), *optimizer.state_dict()["state"][0].values()])
    with pytest.raises(lp.PruningError, match="Adafactor keeps 'row_var'"):
        lp.reconstruct_(model, graph, random_plan(graph), optimizers=[optimizer], example_inputs=x)
    after = [*model.state_dict().values(), *optimizer.state_dict()["state"][0].values()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_masks_and_their_undoing_change_no_format_and_no_address() -> None:
    x, model = images(4), _net().train()
    graph = lp.trace(model, x)
    before, addresses = _strides(model), [parameter.data_ptr() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, fused=True)
    handle = lp.mask_(model, graph, random_plan(graph), optimizers=[optimizer])
    _step(model, optimizer, x)
    for parameter in model.parameters():
        assert parameter.stride() == parameter.grad.stride() == optimizer.state[parameter]["momentum_buffer"].stride()
    for change in (handle.remove, handle.undo):
        change()
        assert (_strides(model), [parameter.data_ptr() for parameter in model.parameters()]) == (before, addresses)


@pytest.mark.parametrize("saved", [LAST, torch.contiguous_format])
@pytest.mark.parametrize("built", [LAST, torch.contiguous_format])
def test_a_loaded_model_keeps_the_format_and_type_it_was_built_in(saved, built, tmp_path) -> None:
    x, model = images(), _net().to(memory_format=saved)
    graph = lp.trace(model, x)
    plan = random_plan(graph)
    lp.save(tmp_path / "small.pt", lp.reconstruct(model, graph, plan), plan)
    dense = ZOO["Residual"]().to(torch.bfloat16).to(memory_format=built)
    dense.stem[0].weight.requires_grad_(False)
    lp.load(tmp_path / "small.pt", dense)
    assert _strides(dense) == _strides(_built_small(model, graph, plan).to(memory_format=built))
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in dense.state_dict().values())
    assert {parameter.dtype for parameter in dense.parameters()} == {torch.bfloat16}
    assert [name for name, parameter in dense.named_parameters() if not parameter.requires_grad] == ["stem.0.weight"]


class Mixed(nn.Module):
    """Every layer computes in its own type."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 3, dtype=torch.bfloat16), nn.BatchNorm2d(8)
        self.b, self.head = nn.Conv2d(8, 6, 3, dtype=torch.float16), nn.Linear(6, 5, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.a(x.to(self.a.weight)).to(self.norm.weight)).relu()
        return self.head(self.b(x.to(self.b.weight)).mean((2, 3)).to(self.head.weight))


def test_every_tensor_keeps_its_type_device_and_flag() -> None:
    model, x = Mixed(), torch.randn(2, 3, 8, 8)
    model.a.requires_grad_(False)
    model.norm.bias.requires_grad_(False)

    def kinds(net: nn.Module) -> list[tuple[object, ...]]:
        return [(tensor.dtype, tensor.requires_grad) for tensor in (*net.parameters(), *net.buffers())]

    graph = lp.trace(model, x)
    plan, before = random_plan(graph), kinds(model)
    unfilled = lp.reconstruct(copy.deepcopy(model).to("meta"), graph, plan)
    assert {tensor.device.type for tensor in (*unfilled.parameters(), *unfilled.buffers())} == {"meta"}
    small = lp.reconstruct(model, graph, plan, example_inputs=x)
    lp.reconstruct_(model, graph, plan)
    assert kinds(small) == kinds(model) == kinds(unfilled) == before
    assert model(x).dtype == torch.float64


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="gradients of another type need torch 2.10")
def test_gradients_of_another_type_than_their_weights() -> None:
    model, x = _net(dtype=torch.bfloat16).train(), images(4).bfloat16()
    for parameter in model.parameters():
        parameter.grad_dtype = torch.float32
    model(x).square().mean().backward()
    graph = lp.trace(model, x)
    plan = random_plan(graph)
    small = lp.reconstruct(model, graph, plan)
    lp.reconstruct_(model, graph, plan)
    for net in (small, model):
        assert {parameter.grad.dtype for parameter in net.parameters()} == {torch.float32}
        net.zero_grad()
        net(x).square().mean().backward()
        assert {parameter.grad.dtype for parameter in net.parameters()} == {torch.float32}


def _forwards(model: nn.Module, x: Tensor, graph: lp.ChannelGraph, plan: lp.Plan) -> Iterator[Tensor]:
    """Of the masked, the unmasked and the reconstructed model."""
    handle = lp.mask_(model, graph, plan)
    yield model(x)
    handle.undo()
    yield model(x)
    lp.reconstruct_(model, graph, plan)
    yield model(x)


def test_within_one_autocast_nothing_old_is_used() -> None:
    """Autocast keeps copies of weights in half precision until its block ends."""
    x = images().float()
    models = [_net("Plain", torch.float32).train() for _ in range(2)]
    graph = lp.trace(models[0], x)
    plan = random_plan(graph)
    with torch.autocast("cpu", torch.bfloat16):
        models[0](x)
        outputs = list(_forwards(models[0], x, graph, plan))
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        expected = list(_forwards(models[1], x, graph, plan))
    assert all(torch.equal(one, other) for one, other in zip(outputs, expected, strict=True))
    assert not torch.equal(*expected[:2])


def test_a_gradient_scaler_and_hooks_of_an_optimizer_in_backward_go_on() -> None:
    x, model, fired = images(4).float(), _net(dtype=torch.float32).train(), []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: fired.append(p.grad.shape == p.shape))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    session = lp.PruningSession(model, x[:2])

    def backward() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x).square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)

    session.step(optimizers=[optimizer])
    backward()
    before = model.stem[0].weight.detach().clone()
    session.reconstruct_(optimizers=[optimizer])  # between unscale_ and step
    fired.clear()
    scaler.step(optimizer)
    scaler.update()
    keep = list(session.plan.groups["stem.0"].keep)
    assert model.stem[0].weight.shape == before[keep].shape
    assert not torch.equal(model.stem[0].weight, before[keep])
    backward()
    assert fired == [True] * len(list(model.parameters()))
    scaler.step(optimizer)


def test_tied_weights_stay_one_in_their_format() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)
    ).to(memory_format=LAST)
    model[4].weight = model[2].weight
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, fused=True)
    x = torch.randn(2, 3, 12, 12)
    _step(model, optimizer, x)
    graph = lp.trace(model, x)
    lp.reconstruct_(model, graph, random_plan(graph), optimizers=[optimizer], example_inputs=x)
    assert model[4].weight is model[2].weight
    assert model[2].weight.shape == (4, 4, 3, 3)
    assert model[2].weight.stride() == optimizer.state[model[2].weight]["momentum_buffer"].stride() == (36, 1, 12, 4)
    _step(model, optimizer, x)


def test_weights_that_are_tied_by_their_memory_stay_so() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)
    ).to(memory_format=LAST)
    model[4].weight.data = model[2].weight.data
    x = torch.randn(2, 3, 12, 12)
    graph = lp.trace(model, x)
    lp.reconstruct_(model, graph, random_plan(graph), example_inputs=x)
    assert model[2].weight.shape == (4, 4, 3, 3)
    assert model[4].weight.data_ptr() == model[2].weight.data_ptr()
    assert model[4].weight.stride() == model[2].weight.stride() == (36, 1, 12, 4)
