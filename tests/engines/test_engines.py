"""Every engine computes what the model computes, leaves the model alone, and refuses what it cannot do."""

import importlib.metadata
import sys

import pytest
import torch
from torch import nn
from torch.torch_version import TorchVersion

import lightning_prune as lp
from lightning_prune.engines import (
    ENGINES,
    ChannelsLast,
    Compile,
    CudaGraphs,
    Engine,
    OnnxRuntime,
    OpenVINO,
    Program,
    TensorRT,
    engine_from,
    onnx_file,
)
from lightning_prune.errors import EngineError, PruningError, TraceError
from lightning_prune.measure import compare_latency, measure_latency

HERE = ["eager", "channels_last", "onnxruntime", "openvino"]


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1)
        self.norm = nn.BatchNorm2d(5)
        self.unused_in_eval = nn.Dropout(0.5)

    def forward(self, image, scale):
        out = self.unused_in_eval(self.norm(self.conv(image)).relu())
        return out - scale, out.mean((2, 3))


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = TwoInputs()
    model.norm.running_mean.uniform_()
    return model.eval(), (torch.rand(2, 3, 6, 7), torch.rand(2, 5, 1, 1))


@pytest.mark.parametrize("name", HERE)
def test_an_engine_computes_what_the_model_computes(net, name):
    model, inputs = net
    before = {key: value.clone() for key, value in model.state_dict().items()}
    program = engine_from(name).prepare(model, inputs)
    others = tuple(torch.rand_like(x) for x in inputs)
    for given in (inputs, others):
        for found, right in zip(program.run(given), model(*given), strict=True):
            torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.conv.weight.is_contiguous()
    assert not program.run(inputs)[0].requires_grad


@pytest.mark.parametrize("name", HERE)
def test_inputs_go_by_keyword_too(net, name):
    model, (image, scale) = net
    found = engine_from(name).prepare(model, {"image": image, "scale": scale}).run({"image": image, "scale": scale})
    torch.testing.assert_close(found[0], model(image, scale)[0], atol=1e-5, rtol=1e-5)


def test_two_results_of_one_program_do_not_share_memory(net):
    model, inputs = net
    for name in HERE:
        program = engine_from(name).prepare(model, inputs)
        first = program.run(inputs)[0]
        kept = first.clone()
        program.run(tuple(x + 1 for x in inputs))
        assert torch.equal(first, kept), name


def test_channels_last_takes_weights_and_images_into_that_format():
    seen = []

    class Looks(nn.Conv2d):
        def forward(self, x):
            seen.append([t.is_contiguous(memory_format=torch.channels_last) for t in (x, self.weight)])
            return super().forward(x)

    model, x = Looks(4, 4, 3).eval(), torch.rand(1, 4, 8, 8)
    ChannelsLast().prepare(model, x).run(x)
    assert seen == [[True, True]]


def test_more_models_than_the_compiler_remembers_are_compiled_each(monkeypatch):
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    x = torch.rand(1, 2)
    programs = []
    for size in range(3, 14):  # eleven models; torch keeps eight of one function
        model = nn.Sequential(nn.Linear(2, size), nn.ReLU()).eval()
        programs.append((Compile({"backend": backend}).prepare(model, x), model))
    assert len(compiled) == 11
    for program, model in programs:
        assert torch.equal(program.run(x), model(x))
    assert len(compiled) == 11


def test_what_an_engine_refuses_names_the_way_out(net, monkeypatch):
    model, inputs = net
    with pytest.raises(EngineError, match=r"one of eager, channels_last, compile, .*got 'onyx'"):
        engine_from("onyx")
    with pytest.raises(EngineError, match="needs a model on a GPU of NVIDIA, and this one is on cpu"):
        CudaGraphs().prepare(model, inputs)
    with pytest.raises(EngineError, match="pip install onnxruntime-gpu"):
        OnnxRuntime("cuda").prepare(model, inputs)
    with pytest.raises(EngineError, match="device must be one of cpu, cuda"):
        OnnxRuntime("gpu")
    for engine, module, line in (
        (TensorRT(), "tensorrt", r'pip install "lightning-prune\[tensorrt\]"'),
        (OpenVINO(), "openvino", r'pip install "lightning-prune\[openvino\]"'),
        (OnnxRuntime(), "onnxruntime", r'pip install "lightning-prune\[export\]"'),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.setattr("importlib.util.find_spec", lambda name, missing=module: None if name == missing else name)
        with pytest.raises(EngineError, match=f"'{engine.name}' needs {module}: {line}"):
            engine.prepare(model, inputs)


def test_a_file_that_is_none_is_refused():
    for engine in (OnnxRuntime(), OpenVINO()):
        with pytest.raises(EngineError, match="refuses the file"):
            engine.load(b"no model")


def test_packages_that_are_too_new_for_the_exporter_of_torch_are_named(net, monkeypatch):
    def fail(*_, **__):
        raise torch.onnx.OnnxExporterError("no")

    monkeypatch.setattr(torch.onnx, "export", fail)
    monkeypatch.setattr(onnx_file, "version_of", {"onnxscript": "0.5.4", "onnx-ir": "1.1.0"}.get)
    refusals = []
    for installed in ("2.6.0+cu124", "2.7.1"):
        monkeypatch.setattr(torch, "__version__", TorchVersion(installed))
        with pytest.raises(EngineError) as refused:
            OnnxRuntime().prepare(*net)
        refusals.append(str(refused.value).partition("OnnxExporterError: no")[2])
    way = '; the exporter of torch 2.6.0+cu124 is older: pip install "onnxscript<0.5.4" "onnx-ir<0.1.16"'
    assert refusals == [way, ""]
    monkeypatch.setattr(onnx_file, "version_of", {"onnxscript": "0.5.3"}.get)
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.6.0"))
    assert onnx_file.export_failure(torch.onnx.OnnxExporterError("no")) == "OnnxExporterError: no"


def test_a_model_that_no_exporter_follows_is_refused():
    class Counts(nn.Module):
        def forward(self, x):
            return x[: int(x.sum())]

    with pytest.raises(EngineError, match=r"Counts cannot be exported to onnx: .*computed values"):
        measure_latency(Counts(), torch.ones(3), engine="onnxruntime")


def test_versions_are_those_that_decide_the_time():
    assert set(engine_from("openvino").versions) == {"openvino"}
    assert engine_from("eager").versions == {"torch": importlib.metadata.version("torch")}
    assert all(ENGINES[name].name == name for name in ENGINES)


class Counted(Engine):
    """Runs eagerly and counts."""

    name = "counted"

    def __init__(self):
        self.prepared, self.passes = 0, 0

    def prepare(self, model, example_inputs):
        engine = self
        engine.prepared += 1

        class Once(Program):
            def run(self, inputs):
                engine.passes += 1
                assert not model.training
                return model(inputs)

        return Once()


def test_latency_is_timed_on_an_engine_of_ones_own():
    engine = Counted()
    model = nn.Linear(3, 2).train()
    found = lp.measure(model, torch.zeros(1, 3), engine=engine, repeats=4)
    assert engine.prepared == 0  # until the latency is read
    assert len(found.latency.samples) == 4
    assert found.latency is found.latency
    assert engine.prepared == 1
    assert engine.passes >= 4
    assert model.training
    compare_latency({"a": (model, torch.zeros(1, 3)), "b": (model, torch.zeros(2, 3))}, engine=engine, repeats=1)
    assert engine.prepared == 3


def test_an_unknown_engine_is_refused_before_anything_is_measured():
    with pytest.raises(EngineError, match="got 'fast'"):
        lp.measure(nn.Linear(1, 1), torch.zeros(1, 1), engine="fast")


def test_inputs_that_do_not_fit_are_an_error_of_this_package():
    for name in HERE:
        with pytest.raises(PruningError):
            measure_latency(nn.Linear(3, 2), torch.zeros(1, 4), engine=name)
    with pytest.raises(TraceError, match="does not run on the example inputs"):
        measure_latency(nn.Linear(3, 2), torch.zeros(1, 4))
