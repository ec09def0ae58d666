"""ClassificationTask: loss, metrics against scikit-learn, optimizer and schedule, and what it refuses."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score, roc_curve
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune.tasks import ClassificationTask
from tests.tasks.helpers import make_trainer

CLASSES = 4


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def make_task(**kwargs) -> ClassificationTask:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, CLASSES))
    return ClassificationTask(net, CLASSES, input_size=(3, 8, 8), **kwargs)


def make_loader(labels: torch.Tensor, batch_size: int = 8) -> DataLoader:
    return DataLoader(TensorDataset(torch.rand(len(labels), 3, 8, 8), labels), batch_size)


def fit(trainer, task: ClassificationTask, images: int) -> None:
    loader = make_loader(torch.arange(images) % CLASSES)
    trainer.fit(task, loader, loader)


def test_training_step_returns_the_smoothed_cross_entropy():
    task = make_task(label_smoothing=0.2).eval()
    images, labels = torch.rand(5, 3, 8, 8), torch.tensor([0, 1, 2, 3, 0])
    logs: dict[str, float] = {}
    task.log = lambda name, value, **_: logs.update({name: value.detach().item()})

    loss = task.training_step((images, labels), 0)

    target = F.one_hot(labels, CLASSES) * 0.8 + 0.2 / CLASSES
    expected = -(target * task(images).log_softmax(dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(loss, expected)
    assert loss.requires_grad
    assert logs == {"train_loss": pytest.approx(expected.detach().item())}


def test_metrics_of_a_test_run_equal_scikit_learn(tmp_path):
    task = make_task()
    loader = make_loader(torch.randint(CLASSES, (57,)))  # the last batch is smaller: a mean over batches is wrong

    (logged,) = make_trainer(tmp_path).test(task, loader, verbose=False)

    images, labels = loader.dataset.tensors
    with torch.no_grad():
        logits = task.eval()(images)
    probabilities = logits.softmax(dim=1)
    areas = [roc_auc_score(labels == c, probabilities[:, c]) for c in range(CLASSES)]
    assert logged["test_acc"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert logged["test_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert task.test_roc.auc.tolist() == pytest.approx(areas, abs=1e-6)
    assert [logged[f"test_auc_class_{c}"] for c in range(CLASSES)] == pytest.approx(areas, abs=1e-6)
    assert logged["test_auc"] == pytest.approx(sum(areas) / CLASSES, abs=1e-6)
    fpr, tpr, _ = roc_curve(labels == 2, probabilities[:, 2], drop_intermediate=False)
    assert task.test_roc.fpr[2].tolist() == pytest.approx(fpr.tolist(), abs=1e-6)
    assert task.test_roc.tpr[2].tolist() == pytest.approx(tpr.tolist(), abs=1e-6)


def test_a_class_that_is_absent_has_no_area_and_does_not_count(tmp_path):
    task = make_task()
    loader = make_loader(torch.tensor([0, 1, 2] * 6))

    (logged,) = make_trainer(tmp_path).test(task, loader, verbose=False)

    assert math.isnan(task.test_roc.auc[3])
    present = task.test_roc.auc[:3]
    assert present.isfinite().all()
    assert logged["test_auc"] == pytest.approx(present.mean().item())


def test_fit_logs_and_leaves_no_metric_state_behind(tmp_path):
    task = make_task()
    loader = make_loader(torch.arange(24) % CLASSES)
    trainer = make_trainer(tmp_path, max_epochs=2)

    trainer.fit(task, loader, loader)

    assert {"train_loss", "val_loss", "val_acc", "val_auc"} <= set(trainer.callback_metrics)
    assert all(name.startswith("model.") for name in task.state_dict())
    assert task.val_roc is not None
    assert task.curve["val"].preds == []
    twin = copy.deepcopy(task)
    twin.load_state_dict(task.state_dict(), strict=True)
    torch.testing.assert_close(twin(task.example_input_array), task(task.example_input_array))


def test_cosine_falls_over_the_epochs_of_the_trainer(tmp_path):
    task = make_task()
    trainer = make_trainer(tmp_path, max_epochs=3)
    fit(trainer, task, images=8)

    (optimizer,) = trainer.optimizers
    assert isinstance(optimizer, torch.optim.SGD)
    assert {k: optimizer.defaults[k] for k in ("momentum", "weight_decay", "nesterov")} == {
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "nesterov": False,
    }
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("epochs_run", [1, 2, 3])
def test_a_scheduler_of_ones_own_steps_once_an_epoch(tmp_path, epochs_run):
    task = make_task(
        optimizer=lambda params: torch.optim.AdamW(params, lr=0.01),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [2], gamma=0.1),
    )
    trainer = make_trainer(tmp_path, max_epochs=epochs_run)
    fit(trainer, task, images=24)

    (optimizer,) = trainer.optimizers
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001 if epochs_run >= 2 else 0.01)


def test_constant_leaves_the_learning_rate(tmp_path):
    task = make_task(lr_scheduler="constant")
    trainer = make_trainer(tmp_path, max_epochs=2)
    fit(trainer, task, images=8)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.1


def test_a_plateau_scheduler_passes_its_monitor_on():
    from pytorch_lightning.cli import ReduceLROnPlateau

    task = make_task(lr_scheduler=lambda optimizer: ReduceLROnPlateau(optimizer, monitor="val_loss"))
    assert task.configure_optimizers()["lr_scheduler"]["monitor"] == "val_loss"


def test_cosine_without_an_end_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, max_epochs=-1, max_steps=1)
    with pytest.raises(ValueError, match="max_epochs"):
        fit(trainer, make_task(), images=8)


def test_logits_of_another_width_are_refused():
    task = ClassificationTask(nn.Sequential(nn.Flatten(), nn.Linear(192, 7)), CLASSES)
    with pytest.raises(ValueError, match=r"logits of shape \(2, 4\), got \(2, 7\)"):
        task.training_step((torch.rand(2, 3, 8, 8), torch.tensor([0, 1])), 0)


@pytest.mark.parametrize("kwargs", [{"label_smoothing": 1.0}, {"label_smoothing": -0.1}])
def test_bad_label_smoothing_is_refused(kwargs):
    with pytest.raises(ValueError, match="label_smoothing"):
        make_task(**kwargs)


def test_one_class_is_refused():
    with pytest.raises(ValueError, match="num_classes"):
        ClassificationTask(nn.Flatten(), 1)


def test_predict_step_takes_images_with_and_without_labels():
    task = make_task().eval()
    images = torch.rand(3, 3, 8, 8)
    bare, labelled = task.predict_step(images, 0), task.predict_step((images, torch.zeros(3)), 0)
    torch.testing.assert_close(bare, labelled)
    torch.testing.assert_close(bare.sum(dim=1), torch.ones(3))


def test_example_input_follows_input_size_and_touches_no_global_rng():
    state = torch.get_rng_state()
    task = ClassificationTask(nn.Flatten(), 3, input_size=(1, 5, 7))
    assert task.example_input_array.shape == (2, 1, 5, 7)
    assert torch.equal(torch.get_rng_state(), state)
