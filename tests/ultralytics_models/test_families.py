"""Every family, built from its YAML: how much goes, and the same outputs at two sizes in both modes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import lightning_prune as lp
from benchmarks.zoo.models import randomise_
from lightning_prune.graph.running import tensors_in
from tests.ultralytics_models import tree  # noqa: F401  # before ultralytics

ultralytics = pytest.importorskip("ultralytics")
pytestmark = pytest.mark.ultralytics

# Share of the parameters that may be left where half of the channels of every layer go; rtdetr: half of it is a
# transformer whose width is held by layer norms.
KEPT = {
    "yolov5n": 0.36,
    "yolov6n": 0.30,
    "yolov8n": 0.35,
    "yolov9t": 0.34,
    "yolov10n": 0.40,
    "yolo11n": 0.38,
    "yolo12n": 0.34,
    "yolo26n": 0.45,
    "yolov8n-seg": 0.36,
    "yolov8n-pose": 0.36,
    "yolov8n-obb": 0.36,
    "yolov8n-cls": 0.40,
    "yolo26n-seg": 0.45,
    "yolov8n-rtdetr": 0.56,
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    kind = ultralytics.RTDETR if "rtdetr" in name else ultralytics.YOLO
    model = kind(f"{name}.yaml").model
    randomise_(model, torch.rand(2, 3, 96, 96))
    return model


def difference(first: nn.Module, second: nn.Module, x: Tensor, *, training: bool) -> float:
    """Largest relative error of any tensor that they return in float64."""
    outputs = []
    for model in (first, second):
        model.double().train(training)
        torch.manual_seed(0)
        with torch.no_grad():
            outputs.append(tensors_in(model(x.double())))
    assert [a.shape for a in outputs[0]] == [b.shape for b in outputs[1]]
    pairs = [(a, b) for a, b in zip(*outputs, strict=True) if a.is_floating_point()]
    assert all(a.isfinite().all() for a, _ in pairs)
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.filterwarnings("ignore:no trace has reached:lightning_prune.errors.UnreachedWarning")
def test_a_family_is_pruned_without_loss(name: str) -> None:
    model = build(name)
    graph = lp.trace(model, torch.rand(2, 3, 96, 96))
    plan = lp.LayerRatio(0.5).select(graph, lp.score(model, graph, lp.L1()))
    small, masked = lp.reconstruct(model, graph, plan), copy.deepcopy(model)
    lp.mask_(masked, graph, plan)
    kept = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in model.parameters())
    assert kept <= KEPT[name]
    for x in (torch.rand(1, 3, 64, 64), torch.rand(3, 3, 96, 128)):
        assert difference(model, small, x, training=False) > 1e-3  # the comparison can tell
        assert difference(masked, small, x, training=False) < 1e-10
    assert difference(masked, small, torch.rand(3, 3, 96, 128), training=True) < 1e-10

    x, fused = torch.rand(1, 3, 96, 64).double(), copy.deepcopy(small).eval().fuse(verbose=False)
    with torch.no_grad():
        torch.testing.assert_close(tensors_in(fused(x))[0], tensors_in(small.eval()(x))[0], rtol=1e-6, atol=1e-6)
