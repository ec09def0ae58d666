"""What is deployed of a model: no auxiliary head, boxes instead of maps; names, open dimensions, opsets."""

from __future__ import annotations

import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torchvision.models.segmentation import lraspp_mobilenet_v3_large
from torchvision.models.segmentation._utils import _SimpleSegmentationModel
from torchvision.models.segmentation.fcn import FCNHead

import lightning_prune as lp
from lightning_prune.data import Scenes
from lightning_prune.engines import OnnxRuntime, OpenVINO
from lightning_prune.errors import ExportError
from lightning_prune.export import load_exported
from lightning_prune.models import YoloV3, YoloV3Tiny
from lightning_prune.models.yolo_boxes import decode
from lightning_prune.models.yolo_parts import YoloNetwork
from lightning_prune.tasks import ClassificationTask, DetectionTask, SegmentationTask, YoloDetector


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))

    def forward(self, x):
        first = self.first(x)
        return {"aux": first, "out": self.second(first)}


def fcn(classes: int = 5) -> nn.Module:
    torch.manual_seed(0)
    return _SimpleSegmentationModel(Backbone(), FCNHead(8, classes), FCNHead(8, classes)).eval()


def parameters_in(path) -> int:
    if path.suffix == ".onnx":
        return sum(onnx.numpy_helper.to_array(entry).size for entry in onnx.load(path).graph.initializer)
    return sum(tensor.numel() for tensor in torch.export.load(path).state_dict.values())


IMAGES = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


# Segmentation


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", ["net.onnx", "net.pt2"])
def test_the_auxiliary_head_is_not_in_the_file(tmp_path, wrapped, name):
    net = fcn()
    model = SegmentationTask(net, 5, input_size=(3, 32, 32)).eval() if wrapped else net
    kind = "onnx" if name == "net.onnx" else "torch_export"
    report = lp.export(model, IMAGES, tmp_path / name, format=kind, repeats=1)
    assert report.output_names == ("out",)
    assert report.left_out == (() if wrapped else ("aux",))
    assert report.agreement == (1 if wrapped else None)
    whole = sum(p.numel() for p in net.parameters())
    head = sum(p.numel() for p in net.aux_classifier.parameters())
    assert parameters_in(report.path) < whole - head + 100  # statistics of the batch norms
    found = load_exported(report.path)(IMAGES)
    torch.testing.assert_close(found["out"] if name == "net.pt2" else found[0], net(IMAGES)["out"], atol=1e-5, rtol=0)
    if name == "net.onnx":
        convolutions = [node.op_type for node in onnx.load(report.path).graph.node].count("Conv")
        assert convolutions == 4


def test_outputs_are_chosen_by_name(tmp_path):
    net = fcn()
    report = lp.export(net, IMAGES, tmp_path / "net.onnx", outputs=["aux", "out"], repeats=1)
    assert (report.output_names, report.left_out) == (("aux", "out"), ())
    torch.testing.assert_close(load_exported(report.path)(IMAGES)[0], net(IMAGES)["aux"], atol=1e-5, rtol=0)
    with pytest.raises(ExportError, match="_SimpleSegmentationModel returns out, aux; there is no output 'logits'"):
        lp.export(net, IMAGES, tmp_path / "no.onnx", outputs=["logits"])


def test_a_dict_of_ones_own_is_exported_whole(tmp_path):
    class Heads(nn.Module):
        def forward(self, x):
            return {"out": x + 1, "aux": x * 2}

    report = lp.export(Heads(), torch.rand(2, 3), tmp_path / "net.pt2", format="torch_export", repeats=1)
    assert (report.output_names, report.left_out) == (("out", "aux"), ())


def test_a_task_deploys_what_torchvision_returns_under_out():
    net = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=5).eval()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        found = SegmentationTask(net, 5, input_size=(3, 64, 64)).eval().deployed()(images)
        assert list(found) == ["out"]
        assert torch.equal(found["out"], net(images)["out"])


# Detection


class Coarse(YoloNetwork):
    """Two heads on the means of patches: what is tested is what comes behind the network."""

    strides, coco_anchors, numbers = YoloV3Tiny.strides, YoloV3Tiny.coco_anchors, ()

    def _build(self, width: float) -> None:
        self.patches, self.pairs = nn.AvgPool2d(16), nn.AvgPool2d(2)
        self.coarse, self.fine = nn.Conv2d(3, self.outputs, 1), nn.Conv2d(3, self.outputs, 1)

    def _maps(self, images):
        x = self.patches(images)
        return self.coarse(self.pairs(x)), self.fine(x)


def yolo(network: nn.Module | None = None, **options) -> DetectionTask:
    torch.manual_seed(0)
    network = network or Coarse(10, objectness_prior=0.1)
    for head in network.modules():  # so that boxes are of different certainty, and lie on one another
        if isinstance(head, nn.Conv2d) and head.bias is not None:
            nn.init.normal_(head.weight, std=1 / head.in_channels**0.5)
            head.bias.data.view(3, -1)[:, 2:4] = 0.5
    return DetectionTask(network, 10, detector=YoloDetector(64, **options), input_size=(3, 64, 64)).eval()


def scenes(count: int) -> torch.Tensor:
    part = Scenes("val", count, size=64)
    images = torch.stack([torch.from_numpy(part[i].image) for i in range(count)])
    return images.permute(0, 3, 1, 2).float() / 255


def test_suppression_in_the_file_finds_the_boxes_that_the_task_finds(tmp_path):
    task, images = yolo(min_score=0.09), scenes(8)
    report = lp.export(
        task, images[:1], tmp_path / "yolo.onnx", nms=True, dynamic_batch=True, dynamic_size=True, repeats=1, samples=8
    )
    assert report.output_names == ("boxes", "scores", "labels", "count")
    assert (report.agreement, report.decisions) == (1, "boxes")
    assert "NonMaxSuppression" in {node.op_type for node in onnx.load(report.path).graph.node}
    with torch.no_grad():
        expected = task.predict_step(images, 0)
        candidates = task.deployed()(images)["scores"]
    for engine in (OnnxRuntime(), OpenVINO()):
        boxes, scores, labels, counts = load_exported(report.path, engine=engine)(images)
        assert 8 < int(counts.sum()) < 0.9 * int((candidates > 0.09).sum())  # the others are suppressed
        for number, wanted in enumerate(expected):
            count = int(counts[number])
            assert count == len(wanted["boxes"])
            assert (labels[number, count:] == -1).all()
            assert (scores[number, count:] == 0).all()
            torch.testing.assert_close(scores[number, :count], wanted["scores"], atol=1e-5, rtol=1e-4)
            assert torch.equal(labels[number, :count], wanted["labels"])
            torch.testing.assert_close(boxes[number, :count], wanted["boxes"], atol=2e-3, rtol=1e-4)
    wide = torch.rand(3, 3, 96, 160)
    found = load_exported(report.path)(wide)
    with torch.no_grad():
        known = list(task.deployed(nms=True)(wide).values())
    assert torch.equal(found[3], known[3])
    torch.testing.assert_close(found[1], known[1], atol=1e-5, rtol=1e-4)


def test_without_suppression_the_best_candidates_are_in_the_file(tmp_path):
    task = yolo(max_candidates=50)
    report = lp.export(task, scenes(2), tmp_path / "yolo.onnx", repeats=1, samples=4)
    boxes, scores, labels = load_exported(report.path)(scenes(2))
    assert (boxes.shape, scores.shape, labels.shape) == ((2, 50, 4), (2, 50), (2, 50))
    assert (scores.diff(dim=1) <= 0).all()
    assert labels.min() >= 0
    assert labels.max() < 10
    with torch.no_grad():
        every = decode(task(scenes(2)), task.model)[1].flatten(1)
    torch.testing.assert_close(scores, every.sort(descending=True).values[:, :50], atol=1e-6, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [YoloV3, YoloV3Tiny])
def test_real_networks(tmp_path, kind):
    task = yolo(kind(10, width=0.125, objectness_prior=0.1))
    open_dimensions = {"dynamic_batch": True, "dynamic_size": True}
    report = lp.export(task, scenes(1), tmp_path / "yolo.onnx", nms=True, **open_dimensions, repeats=1)
    assert report.agreement > 0.99


def test_boxes_that_lie_elsewhere_are_not_taken_for_the_same():
    task, images = yolo(), scenes(2)
    module = task.deployed()
    with torch.no_grad():
        known = list(module(images).values())
    pairs, same, of = module.compared_outputs(known, known)
    assert same == of == known[1].numel()
    assert all(torch.equal(one, other) for one, other in pairs)
    backwards = [known[0].flip(1), known[1].flip(1), known[2].flip(1)]
    assert module.compared_outputs(known, backwards)[1] > 0.99 * of  # boxes of equal scores come as they may
    pairs, same, _ = module.compared_outputs(known, [known[0] + 0.5, *known[1:]])
    assert same > 0.9 * of
    assert max(float((one - other).abs().max()) for one, other in pairs) > 0.499
    for wrong in ([known[0] + 500, *known[1:]], [known[0], known[1], known[2] + 10]):
        assert module.compared_outputs(known, wrong)[1] == 0
    fewer = [tensor[:, :10] for tensor in known]
    assert module.compared_outputs(known, fewer)[1:] == (20, of)


def test_a_file_that_decides_otherwise_is_refused(tmp_path):
    class Stubborn(nn.ReLU):
        def compared_outputs(self, expected, found):
            return [], 49, 50

    with pytest.raises(ExportError, match="decides otherwise in onnxruntime: 1568 of 1600 decisions are the same"):
        lp.export(Stubborn(), torch.rand(1, 3), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        (nn.ReLU(), {"nms": True}, "nms: ReLU has no boxes to suppress: a DetectionTask has"),
        (ClassificationTask(nn.Linear(3, 2), 2), {"nms": True}, "nms: ClassificationTask has no boxes"),
        (yolo(), {"nms": True, "format": "torch_export"}, "nms is for format 'onnx'"),
        (nn.ReLU(), {"opset": 3}, r"opset must lie in 17\.\.26, got 3"),
        (nn.ReLU(), {"engine": "eager"}, "the engine 'eager' runs no ONNX files: onnxruntime, openvino, tensorrt do"),
        (nn.ReLU(), {"engine": "openvino", "format": "torch_export"}, "a torch_export runs in torch alone"),
        (nn.ReLU(), {"input_names": ["a", "b"]}, r"input_names: 1 different names are needed, got \['a', 'b'\]"),
        (nn.ReLU(), {"output_names": "scores"}, "output_names: 1 different names are needed, got 'scores'"),
        (nn.ReLU(), {"dynamic_size": True}, r"dynamic_size: there are no images \(N, C, H, W\)"),
        (nn.ReLU(), {"inputs": []}, "inputs: there are none"),
        (
            nn.ReLU(),
            {"inputs": [torch.rand(2, 4)]},
            r"inputs\[0\] is \[2, 4\] float32, and the file takes \[2, 3\] float32",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(tmp_path, model, options, said):
    suffix = ".pt2" if "format" in options else ".onnx"
    with pytest.raises(ExportError, match=said):
        lp.export(model, torch.rand(2, 3), tmp_path / f"net{suffix}", **options)
    assert not list(tmp_path.iterdir())


# Names, sizes, opsets


def test_names_and_opset_are_those_that_were_asked_for(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    for opset in (18, 21, 23):
        names = {"input_names": ["images"], "output_names": ["maps"]}
        report = lp.export(
            net, IMAGES, tmp_path / "net.onnx", opset=opset, dynamic_size=True, **names, repeats=1, samples=1
        )
        written = onnx.load(report.path)
        assert report.opset == opset == written.opset_import[0].version
        session = onnxruntime.InferenceSession(report.path)
        assert [(entry.name, entry.shape) for entry in session.get_inputs()] == [("images", [1, 3, "height", "width"])]
        assert [(entry.name, entry.shape) for entry in session.get_outputs()] == [("maps", [1, 4, "height", "width"])]


def test_an_opset_that_the_exporter_cannot_write_is_refused(tmp_path):
    class Mean(nn.Module):
        def forward(self, x):
            return x.mean((2, 3))

    with pytest.raises(ExportError, match="could not convert this model to 17 and wrote 18; leave opset out"):
        lp.export(Mean(), IMAGES, tmp_path / "net.onnx", opset=17)


def test_a_size_that_the_model_fixes_cannot_be_left_open(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 32 * 32, 2))
    with pytest.raises(ExportError, match=r"Sequential does not run on .*\[1, 3, 64, 96\]|cannot be exported"):
        lp.export(net, IMAGES, tmp_path / "net.onnx", dynamic_size=True)


@pytest.mark.parametrize("side", [17, 32])
def test_any_size_may_be_open_not_only_multiples_of_32(tmp_path, side: int):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1))
    net = net.eval()
    lp.export(net, torch.rand(1, 3, side, side), tmp_path / "net.onnx", dynamic_size=True, repeats=1, samples=1)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    for images in (torch.rand(1, 3, side + 3, side + 8), torch.rand(1, 3, 9, 11)):
        (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), net(images))


def test_no_path_of_this_machine_is_in_the_file(tmp_path):
    report = lp.export(fcn(), IMAGES, tmp_path / "net.onnx", repeats=1, samples=1)
    assert b".py" not in report.path.read_bytes()
