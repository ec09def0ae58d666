"""ClassificationTask: loss, metrics against scikit-learn, and what it refuses."""

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


def test_logits_of_another_width_are_refused():
    task = ClassificationTask(nn.Sequential(nn.Flatten(), nn.Linear(192, 7)), CLASSES)
    with pytest.raises(ValueError, match=r"logits of shape \(2, 4\), got \(2, 7\)"):
        task.training_step((torch.rand(2, 3, 8, 8), torch.tensor([0, 1])), 0)


@pytest.mark.parametrize("kwargs", [{"label_smoothing": 1.0}, {"label_smoothing": -0.1}])
def test_bad_label_smoothing_is_refused(kwargs):
    with pytest.raises(ValueError, match="label_smoothing"):
        make_task(**kwargs)


def test_predict_step_takes_images_with_and_without_labels():
    task = make_task().eval()
    images = torch.rand(3, 3, 8, 8)
    bare, labelled = task.predict_step(images, 0), task.predict_step((images, torch.zeros(3)), 0)
    torch.testing.assert_close(bare, labelled)
    torch.testing.assert_close(bare.sum(dim=1), torch.ones(3))
