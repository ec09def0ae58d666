"""A model in 8 bits: what the file holds, how far it is from the model, and what is refused."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.ao.quantization as torch_quantization
from onnx import numpy_helper
from torch import nn
from torch.torch_version import TorchVersion

import lightning_prune as lp
from lightning_prune.engines import OnnxRuntime, OpenVINO
from lightning_prune.errors import PruningError, QuantizationError
from lightning_prune.quantization import quantize
from tests.zoo import randomise_


class Net(nn.Module):
    """Two convolutions with batch norms, added and joined, pooled over the image, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.pool(torch.cat([torch.relu(x + self.body(x)), x], 1)).flatten(1))


NEWER = pytest.mark.skipif(
    TorchVersion(torch.__version__) < "2.7", reason="the exporter of torch 2.6 leaves means and a batch norm in float"
)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return randomise_(Net()).float().eval()


@pytest.fixture
def images() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 3, 12, 12, generator=generator) for _ in range(4)]


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "net.int8.onnx"


@NEWER
def test_every_operator_computes_in_8_bits_and_the_outputs_stay_close(net, images, out, capfd, caplog) -> None:
    caplog.set_level(logging.INFO)
    report = quantize(net, images[0][:1], images, out)
    assert (report.samples, report.float_operators) == (16, {})
    assert report.agreement == 1.0
    assert report.size_bytes == out.stat().st_size
    with torch.no_grad():
        expected = torch.cat([net(image[None]) for image in torch.cat(images)])
    for engine in (OnnxRuntime(), OpenVINO()):
        program = engine.load(out.read_bytes())
        found = torch.cat([program.run(image[None])[0].clone() for image in torch.cat(images)])
        error = float((found - expected).norm() / expected.norm())
        assert 1e-4 < error < 0.05  # else nothing was rounded
        if isinstance(engine, OnnxRuntime):
            assert error == pytest.approx(report.rel_error, rel=1e-3)
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def weights_and_scales(path: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of every layer: the stored weight and its scales."""
    graph = onnx.load(path).graph
    values = {value.name: numpy_helper.to_array(value) for value in graph.initializer}
    inputs = [node.input for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in values]
    found = [(values[of[0]], values[of[1]]) for of in inputs]
    return [(weight, scale) for weight, scale in found if weight.ndim > 1]


def activation_types(path: Path) -> set[np.dtype]:
    graph = onnx.load(path).graph
    values = {value.name: numpy_helper.to_array(value) for value in graph.initializer}
    return {values[node.input[2]].dtype for node in graph.node if node.op_type == "QuantizeLinear"}


@pytest.mark.parametrize(
    ("cpu", "largest", "activations"), [("vnni", 127, "uint8"), ("x86", 63, "uint8"), ("arm", 127, "int8")]
)
def test_types_are_what_the_cpu_computes_fast_and_without_overflow(net, images, out, cpu, largest, activations) -> None:
    report = quantize(net, images[0][:1], images, out, cpu=cpu)
    layers = weights_and_scales(out)
    assert len(layers) == 3
    assert all(weight.dtype == np.int8 for weight, _ in layers)
    assert {int(np.abs(weight).max()) for weight, _ in layers} <= {largest, largest + 1}
    assert activation_types(out) == {np.dtype(activations)}
    assert report.weight_bits == (7 if cpu == "x86" else 8)


def test_a_scale_per_output_channel_unless_told_otherwise(net, images, out) -> None:
    for per_channel, expected in ((True, [4, 8, 8]), (False, [1, 1, 1])):
        quantize(net, images[0][:1], images, out, per_channel=per_channel)
        assert sorted(scale.size for _, scale in weights_and_scales(out)) == expected


def test_the_model_is_left_as_it_is(net, images, out) -> None:
    net.train()
    before = copy.deepcopy(net.state_dict())
    quantize(net, images[0][:1], images, out)
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_pruned_model_becomes_a_smaller_file(net, images, out) -> None:
    dense = quantize(net, images[0][:1], images, out)
    small = lp.prune(net, images[0], ratio=0.5).model
    pruned = quantize(small, images[0][:1], images, out)
    assert pruned.size_bytes < dense.size_bytes
    assert pruned.rel_error < 0.05


# Calibration


def test_a_loss_shows_what_the_model_is_called_with(net, images, out) -> None:
    quantize(net, images[0][:1], images, out)
    expected = out.read_bytes()
    labelled = [(batch, torch.zeros(4)) for batch in images]

    def loss(model, batch):
        return model(batch[0] * 9 if model.training else batch[0]).sum()  # as training at several scales would

    report = quantize(net.train(), images[0][:1], labelled, out, loss=loss)
    assert report.samples == 16
    assert out.read_bytes() == expected


def test_batches_are_cut_to_the_shape_of_the_file(net, images, out) -> None:
    report = quantize(net, images[0][:3], images, out)
    assert report.samples == 12  # the fourth of each batch is left over
    assert OnnxRuntime().load(out.read_bytes()).run(images[0][:3])[0].shape == (3, 4)


class Difference(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

    def forward(self, first, second):
        return self.a(first) - self.b(second)


def test_named_inputs_are_told_apart_by_their_names(out) -> None:
    torch.manual_seed(0)
    net, large, small = Difference(), torch.randn(4, 3, 4, 4) * 50, torch.randn(4, 3, 4, 4)
    example = {"first": large[:1], "second": small[:1]}
    quantize(net, example, [{"first": large, "second": small}], out)
    expected = out.read_bytes()
    quantize(net, example, [{"second": small, "first": large}], out)
    assert out.read_bytes() == expected
    quantize(net, example, [0], out, loss=lambda model, _: model(second=small, first=large))
    assert out.read_bytes() == expected


def first_scale(path: Path) -> float:
    graph = onnx.load(path).graph
    values = {value.name: numpy_helper.to_array(value) for value in graph.initializer}
    (scale,) = (values[node.input[1]] for node in graph.node if node.input[0] == graph.input[0].name)
    return float(scale)


def test_percentiles_leave_out_an_outlier(out) -> None:
    net = nn.Sequential(nn.Conv2d(3, 2, 1))
    batches = [torch.rand(2, 3, 256, 256), torch.rand(2, 3, 256, 256)]
    batches[1][1, 0, 5, 5] = 20.0
    quantize(net, batches[0][:1], batches, out)
    assert first_scale(out) == pytest.approx(20 / 255, rel=1e-3)  # of the whole range: all batches were seen
    quantize(net, batches[0][:1], batches, out, method="percentile")
    assert first_scale(out) < 2 / 255


# What stays in float


@NEWER
def test_ignored_layers_at_either_end_stay_in_float(net, images, out) -> None:
    report = quantize(net, images[0][:1], images, out, ignore=["*m.0", "head"])
    assert [weight.shape for weight, _ in weights_and_scales(out)] == [net.body[0].weight.shape]
    assert {"stem.0.weight", "head.weight"} <= {value.name for value in onnx.load(out).graph.initializer}
    assert report.float_operators == {"Conv": 1, "Gemm": 1}


@NEWER
def test_an_ignored_layer_that_the_engine_quantizes_by_itself_is_refused(net, images, out) -> None:
    with pytest.raises(QuantizationError, match=r"in 8 bits all the same.*up to the network's input or output"):
        quantize(net, images[0][:1], images, out, ignore=["body"])
    assert not out.exists()


def test_a_batch_norm_that_folds_into_nothing_stays_in_float(images, out) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.ReLU(), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)]
    report = quantize(randomise_(nn.Sequential(*layers)).float(), images[0][:1], images, out)
    assert report.float_operators["BatchNormalization"] == 1
    assert "Conv" not in report.float_operators
    assert report.rel_error < 0.05


def test_answers_of_several_outputs_are_not_compared(images, out) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return {"out": self.a(x), "aux": self.b(x)}

    torch.manual_seed(0)
    report = quantize(Two(), images[0][:1], images, out)
    assert report.agreement is None
    assert 0 < report.rel_error < 0.05


# Refusals


def labelled(batches):
    return [(batch, torch.zeros(4)) for batch in batches]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"batches": []}, "batches is empty"),
        ({"batches": torch.zeros(4, 3, 12, 12)}, "got one tensor"),
        ({"batches": labelled([torch.zeros(4, 3, 12, 12)])}, r"\[4, 3, 12, 12\] float32, \[4\] float32 where.*loss="),
        (
            {"batches": [torch.zeros(4, 3, 8, 8)]},
            r"\[4, 3, 8, 8\] float32 where the example inputs hold \[1, 3, 12, 12\]",
        ),
        ({"batches": [torch.zeros(4, 3, 12, 12).double()]}, "float64 where"),
        ({"example_inputs": torch.zeros(5, 3, 12, 12)}, "fewer samples than the example inputs, which hold 5"),
        ({"loss": lambda model, batch: None}, "loss never called Net"),
        ({"method": "mean"}, "method must be one of minmax, percentile, got 'mean'"),
        ({"cpu": "6502"}, "cpu must be one of vnni, x86, arm, got '6502'"),
        ({"ignore": ["tail"]}, "no layer matches 'tail'; layers are body, body.0"),
        ({"path": "net.int8"}, "must end in .onnx"),
        pytest.param(
            {"model": nn.Sequential(nn.Softplus())}, "nothing in this model can be computed in 8 bits", marks=NEWER
        ),
    ],
)
def test_what_cannot_be_done_is_said_and_nothing_is_written(net, images, out, change, said) -> None:
    given = {"model": net, "example_inputs": images[0][:1], "batches": images, "path": out} | change
    with pytest.raises(QuantizationError, match=said):
        quantize(**given)
    assert not list(out.parent.iterdir())


def test_a_failure_leaves_the_older_file_alone(net, images, out, monkeypatch) -> None:
    def fails(*_, **__):
        raise RuntimeError("out of bits")

    out.write_text("older")
    monkeypatch.setattr("onnxruntime.quantization.quantize_static", fails)
    with pytest.raises(QuantizationError, match="ONNX Runtime cannot quantize Net: RuntimeError: out of bits"):
        quantize(net, images[0][:1], images, out)
    assert out.read_text() == "older"
    with pytest.raises(PruningError, match="Not a directory"):
        quantize(net, images[0][:1], images, out / "net.onnx")


# torch's own quantization


def prepared(net: Net) -> Net:
    net.train().qconfig = torch_quantization.get_default_qat_qconfig("x86")
    torch_quantization.fuse_modules_qat(net, [["stem.0", "stem.1", "stem.2"], ["body.0", "body.1"]], inplace=True)
    return torch_quantization.prepare_qat(net, inplace=True)


@pytest.mark.filterwarnings("ignore")
def test_a_model_prepared_for_torchs_quantization_is_refused_in_every_state(net, images, out) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3)).eval()
    model.qconfig = torch_quantization.get_default_qconfig("x86")
    observed = torch_quantization.prepare(model)
    observed(images[0])
    trained = prepared(net)
    trained(images[0])
    for state in (observed, trained):
        with pytest.raises(
            QuantizationError, match=r"prepared for torch's own .*Quantize the float model.*prune, prepare_qat"
        ):
            quantize(state, images[0][:1], images, out)
    with pytest.raises(QuantizationError, match=r"0 is Conv2d of torch\.ao.*quantized already"):
        quantize(torch_quantization.convert(observed), images[0][:1], images, out)
    assert not out.exists()


class Stubs(nn.Module):
    """What torch needs around a model that it quantizes."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.enter, self.net, self.leave = torch_quantization.QuantStub(), net, torch_quantization.DeQuantStub()

    def forward(self, x):
        return self.leave(self.net(self.enter(x)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif("x86" not in torch.backends.quantized.supported_engines, reason="torch was built without it")
def test_prune_then_prepare_train_and_convert_works(images) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
    dense = randomise_(nn.Sequential(*layers, nn.Conv2d(8, 4, 1))).float()
    small = lp.prune(dense, images[0], ratio=0.5).model.train()
    assert small[0].out_channels + small[3].out_channels == 8
    torch_quantization.fuse_modules_qat(small, [["0", "1", "2"], ["3", "4", "5"]], inplace=True)
    model = Stubs(small)
    model.qconfig = torch_quantization.get_default_qat_qconfig("x86")
    torch_quantization.prepare_qat(model, inplace=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for batch in images:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
    expected = model.eval()(images[0])
    converted = torch_quantization.convert(model)
    assert converted.net[0].weight().dtype == torch.qint8
    assert converted.net[0].weight().shape[0] == small[0].out_channels
    assert float((converted(images[0]) - expected).norm() / expected.norm()) < 0.05


def test_the_logger_of_onnx_runtime_is_loud_again(net, images, out, monkeypatch) -> None:
    levels = []
    monkeypatch.setattr(onnxruntime, "set_default_logger_severity", levels.append)
    quantize(net, images[0][:1], images, out)
    assert levels == [3, 2]
    assert not logging.root.manager.disable
