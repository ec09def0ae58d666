"""The benchmark of latency budgets writes a row per budget, once, and a page of them."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from benchmarks import latency_budgets
from benchmarks.c2f_net import C2fNet
from lightning_prune.measure import count_params
from lightning_prune.report.table import TIMES

pytestmark = pytest.mark.slow  # no part of the package

ROW = {
    "model": "net",
    "engine": "eager",
    "size": 8,
    "threads": 1,
    "share": 0.5,
    "dense_ms": 10.0,
    "target_ms": 5.0,
    "measured_ms": 4.9,
    "of_target": [0.97, 0.98, 1.2],
    "flops_ratio": 3.0,
    "speed_up": 2.04,
    "efficiency": 0.52,
    "score": 0.8,
    "gap": 0.012,
    "models": 3,
    "seconds": 12.0,
}


def test_every_budget_gets_a_row_and_is_not_done_again(tmp_path, monkeypatch, capsys) -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 4, 1))

    monkeypatch.setitem(latency_budgets.MODELS, "net", (net, 12))
    asked = (
        f"--models net --engines eager --budgets .9,.6 --threads 1 --repeats 2 --out {tmp_path} --no-ordinary".split()
    )
    latency_budgets.main(asked)
    lines = (tmp_path / "latency_budgets.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["share"] for line in lines] == [0.9, 0.6]
    assert all({"measured_ms", "efficiency"} <= {*row} or "refused" in row for row in map(json.loads, lines))
    latency_budgets.main(asked)
    assert (tmp_path / "latency_budgets.jsonl").read_text("utf-8").splitlines() == lines
    capsys.readouterr()
    latency_budgets.main([*asked, "--render"])
    assert capsys.readouterr().out.count("| net | eager | 1 |") == 2


def test_the_page_says_what_was_met() -> None:
    other = {"of_target": [1.3], "flops_ratio": 2.0, "speed_up": 1.5, "efficiency": None, "score": 0.7}
    rows = [ROW, {**ROW, "of_target": [1.06], "ordinary": other}, {**ROW, "refused": "no"}]
    lines = latency_budgets.rendered(rows).splitlines()
    assert len({line.count("|") for line in lines[-5:]}) == 1
    met, missed, refused = lines[-3:]
    assert f"| 98.0 % | yes | 3.00{TIMES} | 2.04{TIMES} | 0.52 | 80.0 % | 1.2 % | 3 | 12 |" in met
    assert "| 106.0 % | **no** |" in missed
    assert missed.endswith(f"| 130.0 % | 1.50{TIMES} |  | 70.0 % |")
    assert "refused" in refused


def test_the_net_is_as_large_as_the_one_it_is_like() -> None:
    net = C2fNet().eval()
    assert [list(maps.shape) for maps in net(torch.zeros(1, 3, 64, 64))] == [[1, 144, n, n] for n in (8, 4, 2)]
    assert 3.1e6 < count_params(net) < 3.2e6  # 3.16 million of YOLOv8n
