"""best.pt pruned, fine-tuned by ultralytics' own trainer, saved, loaded in another process, exported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lightning_prune as lp
from lightning_prune.export import load_exported
from lightning_prune.schedule import Gradual
from tests.ultralytics_models.tree import SIDE, TRAINING, make_tree

ultralytics = pytest.importorskip("ultralytics")
pytestmark = [
    pytest.mark.ultralytics,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:Exporting aten..index"),  # of its exporter
]

ROOT = Path(__file__).parents[2]
IMAGES = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
MODELS = {
    "yolov8n": "detect",
    "yolov10n": "detect",
    "yolov8n-rtdetr": "detect",
    "yolo11n-seg": "segment",
    "yolov8n-pose": "pose",
    "yolo11n-obb": "obb",
    "yolov8n-cls": "classify",
}
ELSEWHERE = """
import sys, torch
from tests.ultralytics_models import tree
import ultralytics
kind = ultralytics.RTDETR if "rtdetr" in sys.argv[2] else ultralytics.YOLO
images = torch.load(sys.argv[3])
with torch.no_grad():
    torch.save(kind(sys.argv[1]).model.eval()(images)[0], sys.argv[3])
if sys.argv[2] in ("yolov8n", "yolov8n-pose", "yolov8n-cls"):  # without attention, whose sizes follow by our code
    assert "lightning_prune" not in sys.modules
"""


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import ultralytics_pruning

    return ultralytics_pruning


def kind(name: str) -> Any:
    return ultralytics.RTDETR if "rtdetr" in name else ultralytics.YOLO


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def first(outputs: Any) -> torch.Tensor:
    """Predictions, of what a model in eval mode returns."""
    while not isinstance(outputs, torch.Tensor):
        outputs = outputs[0]
    return outputs


def dense(folder: Path, name: str) -> tuple[Any, dict[str, Any]]:
    """A dense best.pt, loaded, and what its training was told."""
    settings = {**TRAINING, "data": make_tree(folder / "tree", MODELS[name]), "project": str(folder / "runs")}
    yolo = kind(name)(f"{name}.yaml")
    yolo.train(name="dense", **settings)
    return kind(name)(folder / "runs/dense/weights/best.pt"), settings


@pytest.mark.parametrize("name", MODELS)
def test_from_best_to_pruned_and_back(name: str, tmp_path: Path, recipe: Any) -> None:
    yolo, settings = dense(tmp_path, name)
    before = shapes(yolo.model)
    result = lp.prune(yolo.model, IMAGES, selection=lp.LayerRatio(0.5))
    assert result.lossless.passed
    assert not result.lossless.left
    yolo.model = result.model
    yolo.save(tmp_path / "pruned.pt")

    pruned = kind(name)(tmp_path / "pruned.pt")
    small = shapes(pruned.model)
    assert small == shapes(result.model) != before
    first_weights = next(pruned.model.parameters()).clone()
    pruned.train(name="tuned", trainer=recipe.trainer_for(pruned), **settings)
    tuned = kind(name)(tmp_path / "runs/tuned/weights/best.pt")
    assert shapes(pruned.model) == shapes(tuned.model) == small
    assert not torch.equal(next(tuned.model.parameters()), first_weights)

    with torch.no_grad():
        expected = first(tuned.model.eval()(IMAGES))
    torch.save(IMAGES, tmp_path / "images.pt")
    command = [sys.executable, "-c", ELSEWHERE, str(tuned.ckpt_path), name, str(tmp_path / "images.pt")]
    subprocess.run(command, cwd=ROOT, check=True)
    assert torch.equal(first(torch.load(tmp_path / "images.pt")), expected)

    exported = load_exported(tuned.export(format="onnx", imgsz=SIDE, batch=2, simplify=False, opset=17))
    found = first(exported(IMAGES))
    assert found.shape == expected.shape
    if name == "yolov10n" or "rtdetr" in name:  # whose rows are sorted by scores, which are alike
        found, expected = found[..., 4], expected[..., 4]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_without_the_recipe_a_dense_model_is_trained(tmp_path: Path) -> None:
    yolo, settings = dense(tmp_path, "yolov8n")
    before = shapes(yolo.model)
    yolo.model = lp.prune(yolo.model, IMAGES, selection=lp.LayerRatio(0.5)).model
    yolo.train(name="naive", **settings)
    assert {name: shape for name, shape in shapes(yolo.model).items() if ".cv3." not in name} == {
        name: shape for name, shape in before.items() if ".cv3." not in name
    }


def test_pruning_goes_on_while_it_trains_and_can_be_resumed(tmp_path: Path, recipe: Any) -> None:
    yolo, settings = dense(tmp_path, "yolov8n")
    before = shapes(yolo.model)
    steps = recipe.PruneWhileTraining(
        yolo, start=1, selection=lp.LayerRatio(0.5), schedule=Gradual(2), criterion="taylor", batches=1
    )

    def watch(trainer: Any) -> None:
        model, average = trainer.model.state_dict(), trainer.ema.ema.state_dict()
        assert shapes(trainer.model) == shapes(trainer.ema.ema)
        assert not torch.equal(model["model.0.conv.weight"], average["model.0.conv.weight"])
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                assert trainer.optimizer.state[parameter]["momentum_buffer"].shape == parameter.shape
        if trainer.epoch == 2:  # the last average was made of the small model
            newest.append((average["model.0.conv.weight"].clone(), steps.session.done))
        if trainer.epoch == 3:
            assert not torch.equal(average["model.0.conv.weight"], newest[0][0])
            raise KeyboardInterrupt

    newest: list[Any] = []
    yolo.add_callback("on_train_epoch_end", watch)
    with pytest.raises(KeyboardInterrupt):
        yolo.train(name="gradual", trainer=recipe.trainer_for(yolo), **{**settings, "epochs": 5})
    assert newest[0][1]
    assert steps.session.plan.ratio == pytest.approx(0.5, abs=0.01)
    last = tmp_path / "runs/gradual/weights/last.pt"
    small = shapes(ultralytics.YOLO(last).model)
    assert small != before
    again = ultralytics.YOLO(last)
    with pytest.raises(RuntimeError, match="size mismatch"):
        again.train(resume=True)
    again = ultralytics.YOLO(last)
    again.train(resume=True, trainer=recipe.trainer_for(again))
    assert again.trainer.start_epoch == 3
    assert shapes(again.model) == small


def test_another_number_of_classes_is_refused(tmp_path: Path, recipe: Any) -> None:
    yolo = kind("yolov8n")("yolov8n.yaml")
    yolo.save(tmp_path / "eighty.pt")
    yolo = kind("yolov8n")(tmp_path / "eighty.pt")
    with pytest.raises(ValueError, match="80 classes and the data 3"):
        yolo.train(trainer=recipe.trainer_for(yolo), data=make_tree(tmp_path / "tree", "detect"), **TRAINING)
