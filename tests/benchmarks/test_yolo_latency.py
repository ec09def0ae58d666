"""The latency benchmark of YOLOv3 runs, tiny, and its table says what it measured."""

from __future__ import annotations

import json

import pytest

import lightning_prune as lp
from benchmarks import yolo_latency
from lightning_prune.models import YoloV3


def test_the_benchmark_times_every_model_in_one_run(tmp_path, capsys):
    out = tmp_path / "rows.json"
    yolo_latency.main(f"--size 64 --width 0.125 --repeats 2 --threads 1 --no-onnx --ratios 0.5 0.9 --out {out}".split())
    rows = json.loads(out.read_text("utf-8"))["rows"]
    assert [row["model"] for row in rows] == ["yolov3", "yolov3 -50%", "yolov3 -90%", "yolov3-tiny"]
    dense, half, tenth, _ = rows
    assert dense["params"] == lp.measure.count_params(YoloV3(20, width=0.125))
    assert dense["speed_up"] == dense["flops_ratio"] == 1
    assert 3 < half["flops_ratio"] < 4 < 15 < tenth["flops_ratio"]
    assert half["speed_up"] == pytest.approx(dense["ms"] / half["ms"])
    assert half["flops_ratio"] == pytest.approx(dense["flops"] / half["flops"])
    table = capsys.readouterr().out
    assert "8.2x" in table
    assert f"{half['flops_ratio']:.2f}x" in table


@pytest.mark.slow
def test_exported_models_are_checked_and_timed_in_onnxruntime(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    out = tmp_path / "rows.json"
    yolo_latency.main(f"--size 64 --width 0.0625 --repeats 2 --threads 1 --ratios 0.5 --out {out}".split())
    rows = json.loads(out.read_text("utf-8"))["rows"]
    assert [row["engine"] for row in rows] == ["torch"] * 3 + ["onnxruntime"] * 3
    assert all(row["ms"] > 0 for row in rows)
