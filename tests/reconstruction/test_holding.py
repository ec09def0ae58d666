"""Masked entries are zero at every forward, whoever writes, and the price is a handful of operators."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lightning_prune.reconstruction import holding, zeroing
from lightning_prune.reconstruction.holding import Zeros
from lightning_prune.reconstruction.masks import MaskHandle


class Net(nn.Module):
    """Two layers and a norm; entries 1 and 3 of the first layer and of the norm are held, and columns of the last."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).sigmoid())


HELD = (("first.weight", 0), ("first.bias", 0), ("norm.weight", 0), ("norm.bias", 0), ("last.weight", 1))
X = torch.linspace(-1, 1, 18).view(6, 3)


def zeros(entries: tuple[int, ...] = (1, 3)) -> list[Zeros]:
    return [Zeros(name, dim, torch.tensor(entries)) for name, dim in HELD]


def held(entries: tuple[int, ...] = (1, 3)) -> tuple[Net, MaskHandle]:
    torch.manual_seed(0)
    model = Net()
    return model, MaskHandle(model, zeros(entries))


def is_zero(model: nn.Module, entries: tuple[int, ...] = (1, 3)) -> bool:
    values = [model.get_parameter(item.parameter).index_select(item.dim, item.entries) for item in zeros(entries)]
    return all(torch.equal(value, torch.zeros_like(value)) for value in values)


def gradients_are_zero(model: nn.Module) -> bool:
    gradients = [model.get_parameter(item.parameter).grad for item in zeros()]
    assert all(gradient.any() for gradient in gradients)
    return not any(g.index_select(i.dim, i.entries).any() for g, i in zip(gradients, zeros(), strict=True))


class Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def count(step: Callable[[], object]) -> int:
    with Counter() as counter:
        step()
    return len(counter.seen)


@pytest.mark.parametrize("foreach", [True, False])
def test_a_training_step_dispatches_two_operators_more_and_an_evaluation_none(foreach: bool) -> None:
    training, evaluation = [], []
    for model in (Net(), held()[0]):
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, foreach=foreach)

        def step(model=model, optimizer=optimizer) -> None:
            optimizer.zero_grad()
            model(X).sum().backward()
            optimizer.step()

        def evaluate(model=model) -> None:
            with torch.no_grad():
                model(X)

        step()
        training.append(count(step))
        evaluate()
        evaluation.append(count(evaluate))
    assert training[1] == training[0] + 2
    assert evaluation[1] == evaluation[0]


def load(p: nn.Parameter) -> None:
    p.data.copy_(torch.full_like(p, 0.3))


def replace(p: nn.Parameter) -> None:
    p.data = torch.full_like(p, 0.3)


def one_entry(p: nn.Parameter) -> None:
    p.data[..., 1] = -2.0


def not_a_number(p: nn.Parameter) -> None:
    p.data.fill_(torch.nan)


def in_place(p: nn.Parameter) -> None:
    with torch.no_grad():
        p.sub_(1)


def inference(p: nn.Parameter) -> None:
    with torch.inference_mode():
        p.add_(1)


def through_numpy(p: nn.Parameter) -> None:
    p.detach().numpy()[...] = 0.3


def of_all(p: nn.Parameter) -> None:
    torch._foreach_add_([p.data], 1)


@pytest.mark.parametrize(
    "write",
    [load, replace, one_entry, not_a_number, in_place, inference, through_numpy, of_all],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("name", [name for name, _ in HELD])
def test_whatever_is_written_between_two_evaluations_is_cleared(name: str, write) -> None:
    model, _ = held()
    model.eval()
    for _ in range(2):
        with torch.no_grad():
            model(X)
            write(model.get_parameter(name))
            assert name == "last.weight" or not is_zero(model) or write is one_entry
            model(X)
        assert is_zero(model)


def test_writes_in_the_middle_of_a_forward_are_seen() -> None:
    model, _ = held()
    model(X)
    model.norm.register_forward_hook(lambda *_: model.last.weight.data.fill_(0.5))
    model(X)
    assert is_zero(model)


def test_an_array_of_numpy_from_before_writes_without_a_trace() -> None:
    model, _ = held()
    array = model.first.weight.detach().numpy()
    for _ in range(2):
        with torch.no_grad():
            model.eval()(X)
        assert is_zero(model)
        array[...] = 0.3
        assert not is_zero(model)


def test_zero_is_plus_zero() -> None:
    model, _ = held()
    model.first.weight.data.fill_(-0.5)
    model(X)
    assert not torch.signbit(model.first.weight[[1, 3]]).any()


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.complex64])
def test_other_types(dtype: torch.dtype) -> None:
    model, _ = held()
    model(X)
    model.to(dtype)
    for _ in range(2):
        model.first.weight.data.fill_(0.5)
        model.first(X.to(dtype))
        assert not model.first.weight[[1, 3]].any()
        assert (model.first.weight[[0, 2]] == 0.5).all()


def test_memory_that_processes_share_is_cleared_every_time() -> None:
    model, _ = held()
    model.share_memory()
    model(X)
    assert not zeroing.is_unwritten(model.first.weight)
    model.first.weight.data.fill_(0.5)
    model(X)
    assert is_zero(model)


def test_inference_mode_leaves_a_model_that_trains() -> None:
    model, _ = held()
    with torch.inference_mode():
        model(X)
        model.first.weight.fill_(0.5)
        model(X)
    assert is_zero(model)
    model(X).square().sum().backward()
    assert gradients_are_zero(model)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:FutureWarning", "ignore:.torch.jit.trace:DeprecationWarning")
def test_a_traced_model_has_the_zeros_in_it() -> None:
    model, _ = held()
    model.eval()(X)
    model.first.weight.data.fill_(0.5)
    traced = torch.jit.trace(model, X)
    assert "lightning_prune" not in str(traced.inlined_graph)
    assert torch.equal(traced(X), model(X))


def test_what_left_the_model_is_let_go() -> None:
    model, _ = held()
    model(X)
    gone = weakref.ref(model.last.weight)
    model.last = nn.Linear(4, 2)
    gc.collect()
    assert gone() is None


def test_what_autocast_remembers_of_a_weight_is_forgotten() -> None:
    model, _ = held()
    with torch.autocast("cpu", torch.bfloat16):
        model(X)
        model.first.weight.data.fill_(0.5)
        assert nn.functional.linear(X, model.first.weight)[:, [1, 3]].any()
        assert not model.first(X)[:, [1, 3]].any()


def test_parts_run_alone() -> None:
    model, _ = held()
    model(X)
    for parameter in model.parameters():
        parameter.data.fill_(0.5)
    model.norm(torch.ones(2, 4))
    model.last(torch.ones(1, 4))
    assert not model.last.weight[:, [1, 3]].any()


def test_a_new_parameter_is_held_too() -> None:
    model, _ = held()
    model(X)
    model.first.weight = nn.Parameter(torch.ones(4, 3))
    for _ in range(2):
        model(X)
        assert is_zero(model)
        model.first.weight.data.fill_(0.5)


def test_parameters_given_for_a_call_are_cleared() -> None:
    model, _ = held()
    model(X)
    others = {name: torch.ones_like(parameter) for name, parameter in model.named_parameters()}
    torch.func.functional_call(model, others, (X,))
    assert not others["first.weight"][[1, 3]].any()
    others = {name: torch.ones_like(parameter) for name, parameter in model.named_parameters()}
    torch.func.grad(lambda given: torch.func.functional_call(model.eval(), given, (X,)).sum())(others)
    assert not others["first.weight"][[1, 3]].any()
    model.first.weight.data.fill_(0.5)
    assert torch.equal(torch.vmap(model.eval())(X[:, None])[:, 0], model(X))
    assert is_zero(model)


def pickled(model: Net) -> Net:
    return pickle.loads(pickle.dumps(model))


def saved(model: Net) -> Net:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved], ids=lambda f: f.__name__)
def test_a_copy_holds_its_own(copied) -> None:
    model, handle = held()
    model(X)
    twin = copied(model)
    handle.undo()
    twin(X)
    for _ in range(2):
        for parameter in twin.parameters():
            parameter.data.fill_(0.5)
        twin.eval()(X)
        assert is_zero(twin)
    assert not is_zero(model)
    before = copy.deepcopy(model.state_dict())
    twin(X)
    model(X)
    assert torch.equal(model.first.weight, before["first.weight"])
    part = copied(model.first)
    assert not part._forward_pre_hooks


def test_a_copy_of_a_part_is_no_copy_of_the_whole() -> None:
    model, _ = held()
    model(X)
    part = copy.deepcopy(model.first)
    assert len(pickle.dumps(part)) < len(pickle.dumps(model))
    part.weight.data.fill_(0.5)
    part(X)
    assert not part.weight[[1, 3]].any()


def test_two_masks_on_one_model_hold_both() -> None:
    model, first = held((1,))
    model(X)
    second = MaskHandle(model, zeros((2,)))
    for _ in range(2):
        model.eval()(X)
        for parameter in model.parameters():
            parameter.data.fill_(0.5)
        model(X)
        assert is_zero(model, (1, 2))
        model.zero_grad()
        model(X).square().sum().backward()
        assert not model.first.weight.grad[[1, 2]].any()
    first.remove()
    model.first.weight.data.fill_(0.5)
    model(X)
    assert is_zero(model, (2,))
    assert not is_zero(model, (1,))
    second.remove()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_nothing_is_copied_and_autograd_sees_no_new_version() -> None:
    model, _ = held()
    before = [(parameter.data_ptr(), parameter._version) for parameter in model.parameters()]
    model.first.weight.data.fill_(0.5)
    model.norm.weight.data.fill_(0.5)
    loss = model(X).sum()
    model.last.weight.data.fill_(0.5)
    model(X)
    loss.backward()
    assert [(parameter.data_ptr(), parameter._version) for parameter in model.parameters()] == before


def test_without_marks_every_module_clears_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zeroing, "can_mark", lambda: False)
    model, _ = held()
    for _ in range(2):
        for parameter in model.parameters():
            parameter.data.fill_(0.5)
        model.eval()(X)
        assert is_zero(model)
        assert not any(map(zeroing.is_unwritten, model.parameters()))


def test_a_cuda_graph_has_the_zeros_in_it_and_is_not_trusted_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = held()
    with torch.no_grad():
        model.eval()(X)
        evaluated = count(lambda: model(X))
        monkeypatch.setattr(holding, "_is_captured", lambda _: True)
        assert count(lambda: model(X)) > evaluated
        monkeypatch.undo()
        assert count(lambda: model(X)) == count(lambda: model(X)) > evaluated
    assert is_zero(model)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
def test_gradients_are_zero_after_every_way_backward() -> None:
    model, _ = held()
    for _ in range(2):  # they accumulate
        model(X).square().sum().backward()
        assert gradients_are_zero(model)
    model.zero_grad()
    model(X).square().sum().backward(create_graph=True)
    sum(p.grad.square().sum() for p in model.parameters()).backward()
    assert gradients_are_zero(model)
    model.zero_grad()
    model(X).square().sum().backward(inputs=[model.first.weight])
    assert model.first.bias.grad is None
    assert not model.first.weight.grad[[1, 3]].any()
    checkpointed = checkpoint(model, X.clone().requires_grad_(), use_reentrant=True)
    checkpointed.square().sum().backward()
    assert gradients_are_zero(model)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
def test_gradients_of_gradients_know_the_zeros() -> None:
    model, _ = held()
    model(X).square().sum().backward(create_graph=True)
    weight, bias = model.last.weight, model.last.bias
    (of_all,) = torch.autograd.grad(weight.grad.sum(), bias, retain_graph=True)
    (of_kept,) = torch.autograd.grad(weight.grad[:, [0, 2]].sum(), bias)
    assert of_all.any()
    assert torch.allclose(of_all, of_kept)
    model.zero_grad()


@pytest.mark.parametrize("create_graph", [False, True])
def test_gradients_that_are_given_back_have_zeros(create_graph: bool) -> None:
    model, _ = held()
    wanted = [model.get_parameter(item.parameter) for item in zeros()]
    gradients = torch.autograd.grad(model(X).square().sum(), wanted, create_graph=create_graph)
    assert all(gradient.any() for gradient in gradients)
    assert not any(g.index_select(i.dim, i.entries).any() for g, i in zip(gradients, zeros(), strict=True))


def test_both_dimensions_of_one_parameter() -> None:
    model = Net()
    MaskHandle(model, [Zeros("last.weight", 0, torch.tensor([1])), Zeros("last.weight", 1, torch.tensor([0, 2]))])
    for _ in range(2):
        model(X).sum().backward()
        for values in (model.last.weight, model.last.weight.grad):
            assert (values != 0).tolist() == [[False, True, False, True], [False] * 4]
        model.last.weight.data.fill_(0.5)


class Poisoned(torch.autograd.Function):
    """A gradient that is no number, or infinite, in two of four columns."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient + torch.tensor([0, torch.nan, 0, torch.inf])


def test_not_a_number_becomes_zero_in_a_gradient() -> None:
    model, _ = held()
    model.norm.register_forward_hook(lambda module, args, output: Poisoned.apply(output))
    model(X).square().sum().backward()
    assert not model.norm.bias.grad[[1, 3]].any()
    assert model.norm.bias.grad[[0, 2]].all()


def test_hooks_of_others_see_zeros() -> None:
    model, _ = held()
    seen = []
    model.norm.bias.register_hook(lambda gradient: seen.append(gradient.clone()))
    model.last.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.t().clone()))
    model(X).square().sum().backward()
    assert len(seen) == 2
    assert all(gradient.any() and not gradient[[1, 3]].any() for gradient in seen)


def test_parameters_that_are_thawed_later_have_zeros_in_their_gradients() -> None:
    torch.manual_seed(0)
    model = Net().requires_grad_(False)
    model.last.bias.requires_grad_(True)  # which nothing masks
    MaskHandle(model, zeros())
    model.requires_grad_(True)
    model(X).square().sum().backward()
    assert gradients_are_zero(model)


@contextmanager
def process_group(path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="no torch.distributed")
@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_as_bucket_view": True}, {"find_unused_parameters": True}, {"static_graph": True}],
    ids=str,
)
def test_what_distributed_training_writes_into_gradients_is_cleared(options, tmp_path) -> None:
    model, _ = held()
    with process_group(tmp_path / "store"):
        wrapped = DistributedDataParallel(model, **options)
        for _ in range(3):
            wrapped.zero_grad()
            if "static_graph" not in options:
                with wrapped.no_sync():
                    wrapped(X).square().sum().backward()
            wrapped(X).square().sum().backward()
            assert gradients_are_zero(model)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_model_is_one_graph() -> None:
    model, _ = held()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        for parameter in model.parameters():
            parameter.data.fill_(0.5)
        compiled(X).square().sum().backward()
        assert is_zero(model)
        assert gradients_are_zero(model)
        model.zero_grad()
    model.first.weight.data.fill_(0.5)
    model(X)
    assert is_zero(model)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_backward_has_the_zeros_in_it() -> None:
    model, _ = held()
    torch._dynamo.reset()
    model.eval()
    with compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
        model(X).square().sum().backward()
    assert gradients_are_zero(model)
