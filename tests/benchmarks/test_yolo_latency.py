"""The latency benchmark of YOLOv3 runs, tiny, and its table says what it measured."""

from __future__ import annotations

import json

import pytest

import lightning_prune as lp
from benchmarks import yolo_latency
from lightning_prune.measure import Latency
from lightning_prune.models import YoloV3


def test_every_model_is_pruned_as_asked_and_timed_in_one_run(tmp_path, capsys):
    out = tmp_path / "rows.json"
    yolo_latency.main(f"--size 64 --width 0.125 --repeats 2 --threads 1 --no-onnx --ratios 0.5 0.9 --out {out}".split())
    rows = json.loads(out.read_text("utf-8"))["rows"]
    assert [row["model"] for row in rows] == ["yolov3", "yolov3 -50%", "yolov3 -90%", "yolov3-tiny"]
    dense, half, tenth, _ = rows
    assert dense["params"] == lp.measure.count_params(YoloV3(20, width=0.125))
    # Weights between two halved layers are a quarter; those of the heads, which stay whole, are half.
    assert 3 < dense["flops"] / half["flops"] < 4 < 15 < dense["flops"] / tenth["flops"]
    assert all(row["ms"] > 0 for row in rows)
    assert "8.2x" in capsys.readouterr().out  # the paper's, at 0.9


def test_the_table_sets_the_speed_up_beside_the_flops(capsys):
    latencies = {"yolov3": Latency(12.0, 1.0, ()), "yolov3 -50%": Latency(4.0, 0.5, ())}
    rows = yolo_latency._rows("torch", latencies, {"yolov3": (8, 30_000), "yolov3 -50%": (4, 7_500)})
    assert [(row["speed_up"], row["flops_ratio"]) for row in rows] == [(1, 1), (3, 4)]
    yolo_latency._show(rows, yolo_latency._options(["--threads", "1"]))
    half = capsys.readouterr().out.splitlines()[3].split()
    assert half == ["torch", "yolov3", "-50%", "0.000", "0.000", "4.0", "0.2", "3.00x", "4.00x", "75%", "3.2x"]


@pytest.mark.slow
def test_exported_models_are_checked_and_timed_in_onnxruntime(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    out = tmp_path / "rows.json"
    yolo_latency.main(f"--size 64 --width 0.0625 --repeats 2 --threads 1 --ratios 0.5 --out {out}".split())
    rows = json.loads(out.read_text("utf-8"))["rows"]
    assert [row["engine"] for row in rows] == ["torch"] * 3 + ["onnxruntime"] * 3
    assert all(row["ms"] > 0 for row in rows)
