"""What a file says about itself, to this package and to others."""

from __future__ import annotations

import json

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import lightning_prune as lp
from lightning_prune.errors import ExportError
from lightning_prune.export import read_metadata

IMAGES = torch.rand(2, 3, 8, 8)


@pytest.mark.parametrize("name", ["net.onnx", "net.pt2"])
def test_plan_and_metrics_are_in_the_file(tmp_path, name):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    result = lp.prune(net, IMAGES, criterion="l1", ratio=0.5)
    given = {"acc": 91.2, "classes": ["a", "b"], "note": "1.0", "normalisation": {"mean": [0.5], "std": [0.25]}}
    kind = "onnx" if name == "net.onnx" else "torch_export"
    path = tmp_path / name
    options = {"plan": result.plan, "metadata": given, "dynamic_batch": True, "repeats": 1, "samples": 1}
    lp.export(result.model, IMAGES, path, format=kind, **options)
    found = read_metadata(path)
    assert {key: found[key] for key in given} == given
    assert lp.Plan.from_dict(found["plan"]) == result.plan
    assert (found["producer"], found["version"]) == ("lightning-prune", lp.__version__)
    assert found["inputs"] == {"input": {"shape": ["batch", 3, 8, 8], "dtype": "float32"}}
    assert [(tensor["shape"], tensor["dtype"]) for tensor in found["outputs"].values()] == [
        (["batch", 4, 6, 6], "float32")
    ]
    if name == "net.onnx":
        known = onnxruntime.InferenceSession(path).get_modelmeta()
        assert known.producer_name == "lightning-prune"
        assert json.loads(known.custom_metadata_map["acc"]) == 91.2
    else:
        extra = {"metadata.json": ""}
        torch.export.load(path, extra_files=extra)
        assert json.loads(extra["metadata.json"])["acc"] == 91.2


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"plan": {}}, "'plan' is written by the export itself"),
        ({"acc": torch.tensor(1.0)}, r"'acc' must be plain data \(.*\), got Tensor"),
        ({"acc": float("nan")}, "'acc' must be plain data"),
    ],
)
def test_what_cannot_be_kept_is_refused(tmp_path, metadata, said):
    with pytest.raises(ExportError, match=said):
        lp.export(nn.ReLU(), IMAGES, tmp_path / "net.pt2", format="torch_export", metadata=metadata)
    assert not list(tmp_path.iterdir())


def test_files_of_others_are_read_as_they_are(tmp_path):
    lp.export(nn.ReLU(), IMAGES, tmp_path / "net.onnx", repeats=1, samples=1)
    model = onnx.load(tmp_path / "net.onnx")
    onnx.helper.set_model_props(model, {"author": "somebody", "stride": "32"})
    onnx.save(model, tmp_path / "other.onnx")
    assert read_metadata(tmp_path / "other.onnx") == {"author": "somebody", "stride": 32}
    with pytest.raises(ExportError, match=r"there is no file .*none\.pt2"):
        read_metadata(tmp_path / "none.pt2")
    with pytest.raises(ExportError, match=r"ends in \.onnx or \.pt2"):
        read_metadata(tmp_path / "net.pt")
