"""Pruned checkpoints: whole, plain, and loadable into a freshly built dense model and no other."""

from __future__ import annotations

import copy
import os
import stat
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.errors import CheckpointError, PruningError
from lightning_prune.graph import trace
from lightning_prune.model_state.cutting import changed_sizes, dense_shapes
from lightning_prune.plan import Plan
from lightning_prune.reconstruction.checkpoint import load, load_dense, read, save, shapes_of
from lightning_prune.reconstruction.masks import mask_
from lightning_prune.reconstruction.small_model import reconstruct
from tests.helpers import random_plan
from tests.zoo import ZOO, build, images


def pruned(name: str, coupling: str = "joint") -> tuple[nn.Module, Plan]:
    model = build(name)
    graph = trace(model, images())
    plan = random_plan(graph, coupling=coupling)
    return reconstruct(model, graph, plan, example_inputs=images()), plan


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    small, plan = pruned("Residual")
    save(tmp_path / "small.pt", small, plan)
    return tmp_path / "small.pt"


def assert_untouched(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("coupling", ["joint", "union"])
@pytest.mark.parametrize("name", ZOO)
def test_a_freshly_built_model_becomes_the_saved_one(name: str, coupling, tmp_path: Path) -> None:
    small, plan = pruned(name, coupling)
    save(tmp_path / "small.pt", small, plan)
    fresh = build(name, seed=7)  # other weights
    assert load(tmp_path / "small.pt", fresh) == plan
    x = images(batch=3, seed=5)
    assert torch.equal(fresh(x), small(x))
    for module, expected in zip(fresh.modules(), small.modules(), strict=True):
        assert str(module) == str(expected)  # out_channels, groups, num_features ...
    outputs = fresh.train()(x)
    torch.autograd.backward([t.sum() for t in ([outputs] if isinstance(outputs, Tensor) else outputs)])
    assert all(p.grad is not None and p.grad.shape == p.shape for p in fresh.parameters())


def test_shapes_really_shrink(saved: Path) -> None:
    fresh = build("Residual")
    load(saved, fresh)
    assert (fresh.b1[0].in_channels, fresh.b1[0].out_channels, fresh.b1[1].num_features) == (4, 6, 6)


def test_the_file_is_plain_and_carries_extras(tmp_path: Path) -> None:
    small, plan = pruned("Residual")
    extras = {"epoch": 3, "metric": {"top1": 0.5, "names": ["a", None]}, "scores": torch.arange(3.0)}
    save(tmp_path / "new" / "dir" / "small.pt", small, plan, **extras)
    content = torch.load(tmp_path / "new" / "dir" / "small.pt", weights_only=True)
    assert Plan.from_dict(content["plan"]) == plan
    kept = read(str(tmp_path / "new" / "dir" / "small.pt"))["extra"]
    assert (kept["epoch"], kept["metric"]) == (3, extras["metric"])
    assert torch.equal(kept["scores"], extras["scores"])


def test_other_dtypes_and_gradients_of_the_dense_model(saved: Path) -> None:
    fresh = build("Residual").float()
    fresh(images().float()).sum().backward()
    fresh.stem[0].weight.requires_grad_(False)
    load(saved, fresh)
    assert {p.dtype for p in fresh.parameters()} == {torch.float32}
    assert not fresh.stem[0].weight.requires_grad
    fresh(images().float()).sum().backward()  # gradients of the old shapes would be in the way


def test_shared_parameters_stay_shared(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.b.weight, self.out = self.a.weight, nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.b(torch.tanh(self.a(torch.tanh(self.stem(x))))))

    model, x = Tied(), torch.randn(2, 3)
    graph = trace(model, x)
    plan = random_plan(graph)
    small = reconstruct(model, graph, plan, example_inputs=x)
    save(tmp_path / "small.pt", small, plan)
    fresh = Tied()
    load(tmp_path / "small.pt", fresh)
    assert torch.equal(fresh(x), small(x))
    assert fresh.a.weight is fresh.b.weight
    assert fresh.a.weight.shape == (4, 4)


def test_other_things_in_a_state_dict(tmp_path: Path) -> None:
    class WithState(nn.Module):
        def __init__(self, note: str) -> None:
            super().__init__()
            self.body, self.note = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2)), note

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

        def get_extra_state(self) -> str:
            return self.note

        def set_extra_state(self, state: str) -> None:
            self.note = state

    model, x = WithState("saved"), torch.randn(2, 3)
    graph = trace(model, x)
    plan = random_plan(graph)
    save(tmp_path / "small.pt", reconstruct(model, graph, plan), plan)
    fresh = WithState("fresh")
    load(tmp_path / "small.pt", fresh)
    assert (fresh.note, fresh.body[0].out_features) == ("saved", 4)


# Saving


def test_nothing_but_the_file_is_left(saved: Path) -> None:
    assert [path.name for path in saved.parent.iterdir()] == ["small.pt"]


def test_the_file_has_the_usual_permissions(saved: Path) -> None:
    (saved.parent / "other").touch()
    assert stat.S_IMODE(saved.stat().st_mode) == stat.S_IMODE((saved.parent / "other").stat().st_mode)


@pytest.mark.parametrize(
    "bad", [object(), lambda: 0, nn.Linear(1, 1), Path("x")], ids=["object", "lambda", "module", "path"]
)
def test_an_extra_that_cannot_be_read_back_leaves_the_old_file_whole(saved: Path, bad) -> None:
    before = saved.read_bytes()
    small, plan = pruned("Residual", "union")
    with pytest.raises(CheckpointError, match="only tensors and plain data can be kept") as caught:
        save(saved, small, plan, bad=bad)
    assert "can still be loaded" not in str(caught.value)  # torch's advice, which would run code from the file
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == ["small.pt"]


def test_a_place_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    small, plan = pruned("Residual")
    (tmp_path / "taken").mkdir()
    with pytest.raises(PruningError, match="taken"):
        save(tmp_path / "taken", small, plan)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


# Refused


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickled_object_is_refused_and_not_run(tmp_path: Path) -> None:
    path, trap = tmp_path / "evil.pt", tmp_path / "trap"
    torch.save({"format": "lightning-prune/1", "plan": Evil(trap)}, path)
    with pytest.raises(
        CheckpointError, match=r"evil\.pt cannot be read: it holds \w+\.mkdir, and reading that would run code"
    ) as caught:
        load(path, build("Residual"))
    assert not trap.exists()
    assert "can still be loaded" not in str(caught.value)


def foreign(kind: str, path: Path) -> None:
    if kind == "text":
        path.write_text("not a checkpoint")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "state dict":
        torch.save(build("Residual").state_dict(), path)
    elif kind == "tensor":
        torch.save(torch.ones(2), path)
    elif kind == "format":
        torch.save({"format": "lightning-prune/99"}, path)
    elif kind == "parts":
        torch.save({"format": "lightning-prune/1", "plan": {}}, path)
    elif kind == "plan":
        small, plan = pruned("Residual")
        save(path, small, plan)
        content = torch.load(path, weights_only=True)
        content["plan"]["groups"]["stem.0"]["keep"] = [99]
        torch.save(content, path)


@pytest.mark.parametrize("kind", ["missing", "text", "empty", "state dict", "tensor", "format", "parts", "plan"])
def test_files_that_are_no_pruned_checkpoint_are_refused(kind: str, tmp_path: Path) -> None:
    foreign(kind, tmp_path / "file.pt")
    fresh = build("Residual")
    before = copy.deepcopy(fresh.state_dict())
    told = {"missing": "there is no file", "empty": "is empty"}.get(kind, "not a (pruned )?checkpoint")
    with pytest.raises(CheckpointError, match=told):
        load(tmp_path / "file.pt", fresh)
    assert_untouched(fresh, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m, "stem", nn.Sequential(nn.Conv2d(3, 2, 3, bias=False), nn.BatchNorm2d(2))),
         r"'stem.0.weight' is \[4, 3, 3, 3\] in the file \(cut from \[8, 3, 3, 3\]\) and \[2, 3, 3, 3\] in the"),
        (lambda m: setattr(m.stem, "0", nn.Conv2d(3, 8, 5, bias=False)),
         r"'stem.0.weight' is \[4, 3, 3, 3\] in the file \(cut from \[8, 3, 3, 3\]\) and \[8, 3, 5, 5\] in the"),
        (lambda m: setattr(m.head, "fc", nn.Conv2d(12, 5, 1)),
         r"'head.fc.weight' is \[5, 6\] in the file \(cut from \[5, 12\]\) and \[5, 12, 1, 1\] in the dense model"),
        (lambda m: setattr(m, "stem", nn.Conv2d(3, 8, 3)), r"2 missing \(stem.bias, stem.weight\), 6 unexpected"),
        (lambda m: setattr(m, "extra", nn.Linear(1, 1)), r"2 missing \(extra.bias, extra.weight\)$"),
    ],
    ids=["narrower", "kernel", "dims", "other", "more"],
)  # fmt: skip
def test_another_model_is_refused_and_left_as_it_was(saved: Path, change, message: str) -> None:
    other = build("Residual")
    change(other)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(CheckpointError, match=message):
        load(saved, other)
    assert_untouched(other, before)


def test_a_masked_model_is_refused(saved: Path) -> None:
    model = build("Residual")
    graph = trace(model, images())
    handle = mask_(model, graph, random_plan(graph))
    with pytest.raises(CheckpointError, match=r"MaskHandle.remove"):
        load(saved, model)
    handle.remove()
    load(saved, model)


@pytest.mark.parametrize("wrapped", [False, True])
def test_dense_weights_are_loaded_from_a_state_dict_and_from_a_lightning_checkpoint(wrapped, tmp_path: Path) -> None:
    torch.manual_seed(1)
    trained, fresh = build("Residual"), build("Residual")
    state = trained.state_dict()
    torch.save({"state_dict": state, "epoch": 3} if wrapped else state, tmp_path / "dense.pt")
    load_dense(tmp_path / "dense.pt", fresh)
    assert all(torch.equal(value, state[name]) for name, value in fresh.state_dict().items())


def test_dense_weights_of_another_model_leave_it_as_it_was(tmp_path: Path) -> None:
    fresh = build("Residual")
    before = copy.deepcopy(fresh.state_dict())
    changed = {**before, "head.fc.weight": torch.zeros(2, 12)}
    for state, message in (
        (changed, r"'head.fc.weight' is \[2, 12\] in the file and \[5, 12\] in the model"),
        ({"head.fc.weight": torch.zeros(2, 12)}, r"belongs to another model: \d+ missing \(a1"),
        (
            {"loss.weight": torch.ones(1), **{f"model.{name}": value for name, value in before.items()}},
            r"have 'model.' in front, beside loss.weight; it is of the whole task",
        ),
        ({"epoch": 3}, "holds no state dict"),
    ):
        torch.save(state, tmp_path / "other.pt")
        with pytest.raises(CheckpointError, match=message):
            load_dense(tmp_path / "other.pt", fresh)
    assert all(torch.equal(value, before[name]) for name, value in fresh.state_dict().items())


def test_a_model_that_has_the_pruned_shapes_already_is_loaded_too(tmp_path):
    def dense():
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()

    images = torch.randn(2, 3, 8, 8)
    result = lp.prune(dense(), images)
    lp.save(tmp_path / "small.pt", result.model, result.plan)
    fresh, alike = dense(), lp.prune(dense(), images).model
    for model in (fresh, fresh, alike):
        assert lp.load(tmp_path / "small.pt", model) == result.plan
        assert torch.equal(model(images), result.model(images))
        with torch.no_grad():
            model[0].weight.zero_()
    other = lp.prune(dense(), images, ratio=0.25).model
    with pytest.raises(CheckpointError, match=r"another model: '0.weight' is \[4, 3, 3, 3\] in the file"):
        lp.load(tmp_path / "small.pt", other)


class ScaledByPlace(nn.Module):
    """A buffer per channel that no state dict holds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.register_buffer("scale", torch.arange(1.0, 9.0).view(1, 8, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)) * self.scale)


def test_buffers_that_are_not_persistent_are_cut_too(tmp_path):
    torch.manual_seed(0)
    model, x = ScaledByPlace().eval(), torch.rand(2, 3, 8, 8)
    plans = []
    for criterion in ("l1", lp.criteria.Random(seed=3)):
        result = lp.prune(model, x, criterion=criterion, ratio=0.5)
        assert result.model.scale.shape == (1, 4, 1, 1)
        save(tmp_path / f"{len(plans)}.pt", result.model, result.plan)
        plans.append(result)
    fresh = ScaledByPlace().eval()
    for number, result in enumerate(plans):  # the second into what was pruned as the first: of the same shape
        load(tmp_path / f"{number}.pt", fresh)
        assert torch.equal(fresh(x), result.model(x))
    assert not torch.equal(plans[0].model.scale, plans[1].model.scale)
    older = torch.load(tmp_path / "0.pt", weights_only=True)
    assert list(older.pop("buffers")) == ["scale"]
    torch.save(older, tmp_path / "older.pt")
    with pytest.raises(CheckpointError, match="'scale' is NoneType in the file"):
        load(tmp_path / "older.pt", ScaledByPlace())


class Taught(nn.Module):
    """Keeps a frozen teacher out of its files, as Lightning's documentation shows it."""

    strict_loading = False

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.net, self.teacher = build("Residual", seed=seed), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def state_dict(self, *args, **kwargs):
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if "teacher" not in name}


class Forgetful(Taught):
    """Has not said so."""

    strict_loading = True


class LeftOut(Taught):
    """Leaves it out when it writes a file."""

    state_dict = nn.Module.state_dict


def taught(path: Path) -> nn.Module:
    model = Taught()
    graph = trace(model, images(), also=[lambda model: model.teacher(torch.zeros(1, 2))])
    small = reconstruct(model, graph, plan := random_plan(graph), example_inputs=images())
    torch.save({"state_dict": small.state_dict(), "lightning_prune": shapes_of(small, plan)}, path)
    return small


@pytest.mark.parametrize("kind", [Taught, LeftOut])
def test_what_a_module_leaves_out_of_its_files_stays_as_it_is(kind, tmp_path: Path) -> None:
    small, fresh = taught(tmp_path / "last.ckpt"), kind(seed=7)
    teacher = fresh.teacher.weight.clone()
    load(tmp_path / "last.ckpt", fresh)
    assert torch.equal(fresh(images(seed=5)), small(images(seed=5)))
    assert torch.equal(fresh.teacher.weight, teacher)
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    del content["state_dict"]["net.head.fc.weight"]
    torch.save(content, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"1 missing \(net.head.fc.weight"):
        load(tmp_path / "last.ckpt", kind())  # it was cut: that of the model would not fit


def test_a_module_that_cannot_take_the_weights_is_left_as_it_was(tmp_path: Path) -> None:
    taught(tmp_path / "last.ckpt")
    model = Forgetful(seed=7)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    described, attributes = str(model), [dict(vars(module)) for module in model.modules()]
    with pytest.raises(CheckpointError, match=r"Missing key.*teacher.weight.*strict_loading = False"):
        load(tmp_path / "last.ckpt", model)
    assert_untouched(model, before)
    assert str(model) == described
    assert [dict(vars(module)) for module in model.modules()] == attributes
    assert changed_sizes(model) == dense_shapes(model) == {}
    torch.save(Taught().state_dict(), tmp_path / "dense.pt")
    with pytest.raises(CheckpointError, match="strict_loading = False"):
        load_dense(tmp_path / "dense.pt", model)
    assert_untouched(model, before)
    load_dense(tmp_path / "dense.pt", Taught(seed=7))
