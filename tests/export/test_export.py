"""Export: files that compute the same, in this process and in one that knows nothing of this package."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.engines import OnnxEngine, OnnxRuntime, Program
from lightning_prune.engines.onnx_file import onnx_bytes
from lightning_prune.errors import ExportError, PruningError
from lightning_prune.export import export, load_exported
from lightning_prune.export.metadata import SUFFIX
from lightning_prune.models import resnet18
from lightning_prune.tasks import ClassificationTask


class Small(nn.Module):
    """A residual block, so that what is exported has been cut along an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        return self.head(torch.relu(x + self.block(x)).mean((2, 3)))


def pruned() -> nn.Module:
    return lp.prune(Small().eval(), torch.randn(2, 3, 8, 8), criterion="l1", ratio=0.5).model


@pytest.mark.parametrize("format", ["onnx", "torch_export"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_the_file_computes_what_the_model_computes(tmp_path, format, dynamic):
    model, images = pruned(), torch.randn(1, 3, 8, 8)
    report = export(model, images, tmp_path / f"net{SUFFIX[format]}", format=format, dynamic_batch=dynamic, repeats=2)
    assert report.max_rel_error < 1e-5
    assert report.batch_sizes == ((1, 2) if dynamic else (1,))
    assert report.inputs >= 32
    assert report.agreement == 1
    assert report.exported_latency.median > 0
    assert [path.name for path in tmp_path.iterdir()] == [f"net{SUFFIX[format]}"]
    assert report.size_bytes == report.path.stat().st_size
    runner = load_exported(report.path)
    if dynamic:
        many = torch.randn(7, 3, 8, 8)
        found = runner(many)
        torch.testing.assert_close(found[0] if isinstance(found, list) else found, model(many), atol=1e-5, rtol=1e-5)


def test_a_program_of_a_reconstructed_model_runs_where_this_package_cannot_be_imported(tmp_path):
    task = ClassificationTask(resnet18(), num_classes=10, input_size=(3, 16, 16)).eval()
    images = torch.randn(2, 3, 16, 16)
    small = lp.prune(task, images, criterion="l1", ratio=0.5).model
    export(small, images, tmp_path / "net.pt2", format="torch_export", repeats=1)
    torch.save(images, tmp_path / "images.pt")
    code = """
import sys
class Refuse:
    def find_spec(self, name, *rest):
        if name.partition(".")[0] in ("lightning_prune", "pytorch_lightning"):
            raise ImportError(f"{name} is not installed here")
sys.meta_path.insert(0, Refuse())
import torch
try:
    import lightning_prune
except ImportError:
    pass
else:
    sys.exit("lightning_prune could be imported")
program = torch.export.load("net.pt2").module()
with torch.no_grad():
    torch.save(program(torch.load("images.pt")), "outputs.pt")
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "outputs.pt"), small.eval()(images), atol=0, rtol=1e-6)


def test_several_inputs_and_outputs_by_name(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(5, 3)

        def forward(self, left, right):
            return {"sum": self.a(left) + self.b(right), "left": self.a(left)}

    inputs = {"right": torch.randn(2, 5), "left": torch.randn(2, 4)}
    report = export(Two(), inputs, tmp_path / "two.onnx", dynamic_batch=True, repeats=1)
    assert report.max_rel_error < 1e-5


def test_masks_are_exported_as_the_zeros_they_hold(tmp_path):
    model, images = Small().eval(), torch.randn(2, 3, 8, 8)
    graph = lp.trace(model, images)
    with lp.mask_(model, graph, lp.GlobalRatio(0.5).select(graph, lp.score(model, graph, "l1"))):
        hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
        report = export(model, images, tmp_path / "net.pt2", format="torch_export", repeats=1)
        assert report.max_rel_error == 0
        assert hooks == sum(len(module._forward_pre_hooks) for module in model.modules()) > 0


def test_the_model_is_left_as_it_was(tmp_path):
    model = Small().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export(model, torch.randn(2, 3, 8, 8), tmp_path / "net.pt2", format="torch_export", repeats=1)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Branching(nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("model", "name", "options", "said"),
    [
        (nn.ReLU(), "net.onnx", {"format": "tflite"}, "one of onnx, torch_export, got 'tflite'"),
        (nn.ReLU(), "net.pt", {"format": "torch_export"}, "must end in .pt2"),
        (nn.ReLU(), "net.pt2", {"format": "onnx"}, "must end in .onnx"),
        (Branching(), "net.pt2", {"format": "torch_export"}, "Branching cannot be exported to torch_export"),
        (
            nn.Conv2d(4, 2, 1),
            "net.pt2",
            {"format": "torch_export"},
            "Conv2d does not run on the example inputs: .*4 channels",
        ),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(tmp_path, capfd, model, name, options, said):
    with pytest.raises(ExportError, match=said) as refused:
        export(model, torch.randn(2, 3, 8, 8), tmp_path / name, **options)
    assert not list(tmp_path.iterdir())
    assert ("decides by computed values" in str(refused.value)) == isinstance(model, Branching)
    assert capfd.readouterr() == ("", "")  # torch would dump the graph
    assert len(str(refused.value)) < 450


@pytest.mark.parametrize("name", ["onnx", "onnxruntime"])
def test_missing_packages_are_named_with_the_way_to_get_them(tmp_path, monkeypatch, name):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked: None if asked == name else found(asked))
    with pytest.raises(PruningError, match=rf'needs {name}: pip install "lightning-prune\[export\]"'):
        export(nn.ReLU(), torch.randn(1, 3), tmp_path / "net.onnx")
    if name == "onnx":
        with pytest.raises(PruningError, match=r'needs onnx: pip install "lightning-prune\[openvino\]"'):
            export(nn.ReLU(), torch.randn(1, 3), tmp_path / "net.onnx", engine="openvino")
        with pytest.raises(PruningError, match=r'needs onnx: pip install "lightning-prune\[export\]"'):
            export(nn.ReLU(), torch.randn(1, 3), tmp_path / "net.onnx", engine=Off(0))

        def lacking(*of, **how):
            raise ModuleNotFoundError("No module named 'onnxscript'")

        monkeypatch.setattr(torch.onnx, "export", lacking)
        with pytest.raises(PruningError, match=r'onnxscript.*: pip install "lightning-prune\[export\]"'):
            onnx_bytes(nn.ReLU(), torch.randn(1, 3))


class Off(OnnxEngine):
    """ONNX Runtime whose first output is wrong from some pass on."""

    name = "off"

    def __init__(self, start: int) -> None:
        self.start = start

    def check(self) -> None: ...

    def load(self, onnx: bytes) -> Program:
        right, start = OnnxRuntime().load(onnx), self.start

        class Wrong(Program):
            passes = 0

            def run(self, inputs):
                self.passes += 1
                first, *others = right.run(inputs)
                return [first + 0.01 if self.passes > start else first, *others]

        return Wrong()


@pytest.mark.parametrize("start", [0, 31])
def test_a_file_that_computes_something_else_is_refused_if_only_for_the_last_of_32_inputs(tmp_path, start):
    path = tmp_path / "net.onnx"
    path.write_bytes(b"what was there")
    with pytest.raises(ExportError, match=r"computes something else in off: relative error .* over 32 inputs"):
        export(nn.ReLU(), torch.randn(1, 3), path, engine=Off(start))
    assert path.read_bytes() == b"what was there"
    assert list(Path(tmp_path).iterdir()) == [path]
    export(nn.ReLU(), torch.randn(1, 3), path, engine=Off(100), repeats=1)


def test_a_file_that_returns_other_shapes_is_refused(tmp_path):
    class Cut(Off):
        def load(self, onnx):
            class Half(Program):
                def run(self, inputs):
                    return inputs[:, :1]

            return Half()

    with pytest.raises(ExportError, match=r"returns \[1, 1\] where the model returns \[1, 3\], for inputs of \[1, 3\]"):
        export(nn.ReLU(), torch.randn(1, 3), tmp_path / "net.onnx", engine=Cut(0))


def test_only_files_of_an_export_are_opened(tmp_path):
    with pytest.raises(ExportError, match=r"ends in \.onnx or \.pt2, got '.*net\.pt'"):
        load_exported(tmp_path / "net.pt")


def test_an_onnx_file_names_its_outputs_and_its_batch(tmp_path) -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 4, 3)

        def forward(self, images: Tensor, scale: Tensor) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
            x = self.layer(images) * scale
            return {"out": x, "aux": (x.mean(1), x.mean(2))}

    inputs = {"images": torch.rand(2, 3, 8, 8), "scale": torch.rand(2, 1, 1, 1)}
    lp.export(Heads(), inputs, tmp_path / "net.onnx", dynamic_batch=True, repeats=1)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    assert [(one.name, one.shape[0]) for one in session.get_inputs()] == [("images", "batch"), ("scale", "batch")]
    assert [one.name for one in session.get_outputs()] == ["out", "aux_0", "aux_1"]
    lp.export(nn.Conv2d(3, 4, 1), torch.rand(1, 3, 4, 4), tmp_path / "net.onnx", repeats=1)
    assert [one.name for one in onnxruntime.InferenceSession(tmp_path / "net.onnx").get_outputs()] == ["output"]


def test_nan_is_not_the_same_as_nan(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU()).eval()
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    with pytest.raises(ExportError, match=r"the model computes NaN on \d+ of the inputs, .* nothing was written"):
        lp.export(model, torch.randn(2, 3), tmp_path / "net.pt2", format="torch_export")
    assert not list(tmp_path.iterdir())
