"""Knowledge distillation: the formula, the training it leads to, and the teacher that nothing touches."""

from __future__ import annotations

import copy
import math
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import Callback, LightningModule
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn

from lightning_prune.callbacks import DistillationCallback, GroupSparsityCallback, PruneCallback, ScoringCallback
from lightning_prune.compensation.distillation import distillation_loss
from lightning_prune.criteria import JRE
from lightning_prune.errors import CallbackError, DistillationError
from lightning_prune.selection import GlobalRatio
from tests.callbacks.helpers import Task, fit, loader, params, trainer
from tests.zoo import images


def test_the_loss_is_the_formula_worked_by_hand() -> None:
    student, teacher = torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 4.0]])
    expected = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = ([math.exp(x / 2) / sum(math.exp(y / 2) for y in z) for x in z] for z in (t, s))
        expected += 4 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / 2
    assert float(distillation_loss(student, teacher, 2.0)) == pytest.approx(expected, rel=1e-6)


def test_the_gradient_is_the_difference_of_the_probabilities() -> None:
    student = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: distillation_loss(s, teacher, 3.0), student)
    distillation_loss(student, teacher, 3.0).backward()
    expected = 3.0 * ((student / 3).softmax(1) - (teacher / 3).softmax(1)) / 3
    assert torch.allclose(student.grad, expected, rtol=1e-10)
    assert teacher.grad is None


def test_maps_are_averaged_over_positions_and_half_precision_is_computed_in_float32() -> None:
    student, teacher = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    pixels = [x.permute(0, 2, 3, 1).reshape(-1, 4) for x in (student, teacher)]
    assert torch.allclose(distillation_loss(student, teacher), distillation_loss(*pixels))
    assert distillation_loss(student.half(), teacher.half()).dtype == torch.float32


def by_hand(task: Task, teacher: nn.Module, weight: float, temperature: float) -> Task:
    task = copy.deepcopy(task)
    optimizer = task.configure_optimizers()
    for x, y in loader(shuffle=False):
        with torch.no_grad():
            soft = (teacher(x) / temperature).softmax(1)
        out = task.net(x)
        kl = F.kl_div((out / temperature).log_softmax(1), soft, reduction="batchmean")
        optimizer.zero_grad()
        ((1 - weight) * F.cross_entropy(out, y) + weight * temperature**2 * kl).backward()
        optimizer.step()
    return task


class Direct(Task):
    """Calls itself, and returns the loss alone."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])


@pytest.mark.parametrize(("kind", "module"), [(Task, "net"), (Direct, None)])
def test_training_with_a_given_teacher_is_that_by_hand(kind: type[Task], module: str | None) -> None:
    task, teacher = kind(), Task().net.eval()
    before = copy.deepcopy(teacher.state_dict())
    expected = by_hand(task, teacher, 0.7, 3.0)
    callback = DistillationCallback(0.7, 3.0, module=module, teacher=teacher)
    runner = trainer(callback, epochs=1)
    runner.fit(task, loader(shuffle=False), loader(8, shuffle=False))
    assert all(torch.allclose(v, expected.state_dict()[k], rtol=1e-9) for k, v in task.state_dict().items())
    assert all(torch.equal(v, before[k]) for k, v in callback.teacher.state_dict().items())
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in task.modules())
    assert runner.callback_metrics["distill_loss"] > 0


class Segmenting(LightningModule):
    """Returns a dict, as torchvision's segmentation models do, and skips a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.head = nn.Conv2d(8, 4, 1)
        self.example_input_array = torch.randn(2, 3, 6, 6)
        self.losses = []

    def forward(self, x):
        return {"out": self.head(self.net(x))}

    def training_step(self, batch, batch_idx):
        x, y = batch
        with torch.no_grad():
            self(x)  # not differentiated: nothing to learn from
        loss = F.cross_entropy(self(x)["out"], y[:, None, None].expand(-1, 6, 6) % 4)
        return None if batch_idx == 1 else {"loss": loss}

    def on_before_backward(self, loss):
        self.losses.append(float(loss.detach()))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_segmentation_models_and_skipped_batches() -> None:
    task, callback = Segmenting(), DistillationCallback(1.0, 2.0)
    data = torch.utils.data.TensorDataset(torch.randn(8, 3, 6, 6), torch.arange(8))
    batches = torch.utils.data.DataLoader(data, 2)
    trainer(callback, PruneCallback("l1", 0.5), epochs=1).fit(task, batches)
    assert len(task.losses) == 3
    student, teacher = copy.deepcopy(task).train(), callback.teacher
    assert teacher.head.weight.shape == (4, 8, 1, 1)
    for loss, (x, _) in zip(task.losses, [batch for i, batch in enumerate(batches) if i != 1], strict=True):
        expected = distillation_loss(student(x)["out"].detach(), teacher(x)["out"], 2.0)
        assert loss == pytest.approx(float(expected), rel=1e-5)


class Halving(nn.Module):
    """Changes its inputs in place."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Task().net

    def forward(self, x):
        return self.net(x.mul_(0.5))


class Twice(Task):
    """Calls a network that changes its inputs, on two views of them, and nothing but the teacher counts."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.losses = Halving(), []

    def training_step(self, batch, batch_idx):
        return 0 * (self.net(batch[0].clone()) + self.net(batch[0].flip(3))).sum()

    def on_before_backward(self, loss):
        self.losses.append(float(loss.detach()))


def test_teacher_and_student_see_the_same_inputs_at_every_call() -> None:
    task, teacher = Twice(), Halving().eval()
    student = copy.deepcopy(task.net).train()
    runner = trainer(DistillationCallback(1.0, 2.0, module="net", teacher=teacher), epochs=1, limit_train_batches=1)
    runner.fit(task, batches := loader(shuffle=False), loader(8, shuffle=False))
    x = next(iter(batches))[0]
    terms = [distillation_loss(student(v.clone()), teacher(v.clone()), 2.0).item() for v in (x, x.flip(3))]
    assert task.losses == [pytest.approx(sum(terms) / 2, rel=1e-10)]
    assert terms[0] != pytest.approx(terms[1], rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_and_accumulated_gradients(precision: str) -> None:
    task = Task()
    task.net.float()
    task.example_input_array = images(2).float()
    data = torch.utils.data.TensorDataset(images(16).float(), torch.arange(16) % 5)
    batches = torch.utils.data.DataLoader(data, 4)
    callback = DistillationCallback(module="net", teacher=Task().net.float())
    runner = trainer(callback, epochs=1, precision=precision, accumulate_grad_batches=2)
    runner.fit(task, batches, batches)
    assert next(callback.teacher.parameters()).dtype == (torch.bfloat16 if "true" in precision else torch.float32)
    assert runner.callback_metrics["distill_loss"].isfinite()


def test_the_teacher_is_the_dense_model_and_stays_as_it_is() -> None:
    task = Task("adamw")
    dense = copy.deepcopy(task.net.state_dict())
    callback = DistillationCallback(module="net")
    fit(task, callback, PruneCallback(JRE(), 0.5))
    assert params(task.net) < params(callback.teacher)
    assert all(torch.equal(v, dense[k]) for k, v in callback.teacher.state_dict().items())
    assert not callback.teacher.training
    assert not any(parameter.requires_grad for parameter in callback.teacher.parameters())
    assert not any(name.startswith("teacher") for name in task.state_dict())


@pytest.mark.parametrize("options", [{}, {"update_weights": True}])
def test_scores_are_those_of_the_task_alone(options) -> None:
    task = Task()
    alone = copy.deepcopy(task)
    first, second = PruneCallback(JRE(), 0.5, **options), PruneCallback(JRE(), 0.5, **options)
    fit(alone, first)
    fit(task, DistillationCallback(module="net"), second)
    assert all(torch.equal(values, first.scoring.scores[name]) for name, values in second.scoring.scores.items())
    assert not all(torch.equal(v, alone.state_dict()[k]) for k, v in task.state_dict().items())


def test_warm_up_makes_the_teacher() -> None:
    seen = {}

    class Look(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen[trainer.current_epoch] = copy.deepcopy(pl_module.net.state_dict())

    task, callback = Task(), DistillationCallback(module="net")
    runner = fit(task, callback, Look(), PruneCallback("l1", 0.5, start=2), epochs=3)
    assert all(torch.equal(v, seen[1][k]) for k, v in callback.teacher.state_dict().items())
    assert "distill_loss" in runner.callback_metrics


def run(task, folder, callback, epochs, ckpt=None):
    torch.manual_seed(0)
    saving = ModelCheckpoint(folder, save_last=True)
    runner = trainer(callback, PruneCallback(JRE(), 0.5), saving, epochs=epochs, enable_checkpointing=True)
    runner.fit(task, loader(), loader(8, shuffle=False), ckpt_path=ckpt)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # so that the broken run's checkpoint stays
def test_a_resumed_run_needs_its_teacher_and_then_ends_the_same(tmp_path) -> None:
    whole, broken = Task("adamw"), Task("adamw")
    broken.load_state_dict(whole.state_dict())
    torch.save(whole.state_dict(), tmp_path / "dense.pt")
    run(whole, tmp_path / "whole", DistillationCallback(module="net"), 4)
    run(broken, tmp_path / "broken", DistillationCallback(module="net"), 2)
    last = tmp_path / "broken" / "last.ckpt"
    saved = torch.load(last, weights_only=True)
    assert not any("Distillation" in key for key in saved["callbacks"])
    assert saved["state_dict"].keys() == whole.state_dict().keys()
    with pytest.raises(CallbackError, match="checkpoints do not hold the teacher; pass teacher="):
        run(Task("adamw"), tmp_path / "a", DistillationCallback(module="net"), 4, last)
    with pytest.raises(CallbackError, match=re.escape("last.ckpt does not hold the weights of a dense Task")):
        run(Task("adamw"), tmp_path / "b", DistillationCallback(module="net", teacher=last), 4, last)
    with pytest.raises(CallbackError, match="there is no file"):
        run(Task("adamw"), tmp_path / "c", DistillationCallback(module="net", teacher="nowhere.pt"), 4, last)
    resumed = Task("adamw")
    run(resumed, tmp_path / "d", DistillationCallback(module="net", teacher=tmp_path / "dense.pt"), 4, last)
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in resumed.state_dict().items())


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("sparse_first", [True, False])
def test_the_teacher_is_the_model_before_it_was_made_sparse(sparse_first: bool, tmp_path) -> None:
    class Before(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                self.net = copy.deepcopy(pl_module.net.state_dict())

    def callbacks():
        teacher = DistillationCallback(module="net")
        sparse = GroupSparsityCallback(1.0, selection=GlobalRatio(0.5), start=1)
        prune = PruneCallback("l2", 0.5, start=3)
        return teacher, [sparse, teacher, prune] if sparse_first else [teacher, sparse, prune]

    before, (distill, own) = Before(), callbacks()
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, monitor="val_loss")
    fit(Task(), before, *own, saving, epochs=4, enable_checkpointing=True)
    assert all(torch.equal(value, before.net[name]) for name, value in distill.teacher.state_dict().items())
    distill, own = callbacks()
    with pytest.raises(CallbackError, match="trained to be sparse, and checkpoints do not hold the teacher"):
        trainer(*own, epochs=4).fit(Task(), loader(), loader(8), ckpt_path=tmp_path / "epoch=1.ckpt")


def test_fit_called_twice_keeps_the_teacher() -> None:
    task, callback = Task(), DistillationCallback(module="net")
    runner = fit(task, callback, PruneCallback("l1", 0.5), epochs=1)
    teacher = callback.teacher
    runner.fit_loop.max_epochs = 2
    runner.fit(task, loader(), loader(8, shuffle=False))
    assert callback.teacher is teacher
    assert "training_step" not in vars(runner.strategy)


def test_copies_of_the_module_bring_neither_the_trainer_nor_the_teacher() -> None:
    sizes = []

    class Copies(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            with pytest.raises(RuntimeError, match="is not attached to a `Trainer`"):
                _ = copy.deepcopy(pl_module).trainer
            sizes.append(len(pickle.dumps(copy.deepcopy(pl_module))))

    task = Task()
    fit(task, DistillationCallback(module="net"), PruneCallback("l1", 0.5), Copies(), epochs=1)
    plain = Task()
    fit(plain, PruneCallback("l1", 0.5), Copies(), epochs=1)
    assert sizes[3] < sizes[-1] + 1000


class ByHand(Task):
    """Optimizes by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Odd(Task):
    """Returns no logits."""

    def forward(self, x):
        return [self.net(x)]

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0])[0], batch[1])


REFUSED = {
    "after": (
        Task,
        lambda: [PruneCallback("l1"), DistillationCallback()],
        CallbackError,
        "put it before PruneCallback",
    ),
    "after scoring": (
        Task,
        lambda: [ScoringCallback("l1"), DistillationCallback()],
        CallbackError,
        "must see the dense",
    ),
    "alone": (Task, lambda: [DistillationCallback()], CallbackError, "would be its own teacher"),
    "twice": (Task, lambda: [DistillationCallback(), DistillationCallback()], CallbackError, "twice"),
    "manual": (ByHand, lambda: [DistillationCallback(), PruneCallback("l1")], CallbackError, "manual optimization"),
    "no such module": (
        Task,
        lambda: [DistillationCallback(module="model"), PruneCallback("l1")],
        CallbackError,
        "has no such submodule; it has net",
    ),
    "not called": (
        Task,
        lambda: [DistillationCallback(), PruneCallback("l1")],
        DistillationError,
        re.escape("training_step calls self.net(...), not self(...)"),
    ),
    "no logits": (Odd, lambda: [DistillationCallback(), PruneCallback("l1")], DistillationError, "got list"),
    "another shape": (
        Task,
        lambda: [DistillationCallback(module="net", teacher=nn.Sequential(Task().net, nn.Linear(5, 7).double()))],
        DistillationError,
        re.escape("got [4, 5] and [4, 7]"),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_distilled_is_refused(case: str) -> None:
    kind, callbacks, error, match = REFUSED[case]
    task = kind()
    with pytest.raises(error, match=match):
        fit(task, *callbacks(), epochs=1)
    assert not any(part._forward_hooks for part in task.modules())


@pytest.mark.parametrize("options", [{"weight": -0.1}, {"weight": 1.5}, {"weight": float("nan")}, {"temperature": 0}])
def test_settings_out_of_range_are_refused(options) -> None:
    with pytest.raises(DistillationError, match=f"{next(iter(options))} must be"):
        DistillationCallback(**options)


def test_the_teacher_may_be_the_module_that_is_pruned() -> None:
    task = Task()
    dense = params(task.net)
    callback = DistillationCallback(module="net", teacher=task.net)
    fit(task, callback, PruneCallback("l1", 0.5), epochs=1)
    assert params(callback.teacher) == dense > params(task.net)
    assert all(parameter.requires_grad for parameter in task.parameters())
    assert task.net(images()).isfinite().all()
