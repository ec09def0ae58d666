"""Pruning to the same MACs, the same images for all, the start from public weights, and the page."""

from __future__ import annotations

import json
import sys

import pytest
import torch

import lightning_prune as lp
from benchmarks.cifar_training import Settings, Training, images, scoring_batches
from benchmarks.field import __main__ as benchmark
from benchmarks.field.methods import ALL, CRITERIA, METHODS, Method, named
from benchmarks.field.pruning import macs_of_a_channel, projected, prune
from benchmarks.field.report import control_of, render
from lightning_prune.criteria import Criterion
from lightning_prune.criteria.base import _leaves
from lightning_prune.measure import count_flops
from tests.benchmarks.cifar_folder import make_folder, network

pytestmark = pytest.mark.slow  # no part of the package


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def batches(folder):
    return scoring_batches(images(folder, 8), 1)


def test_every_criterion_is_a_method():
    own = [of for of in _leaves(Criterion) if of.__module__.startswith("lightning_prune.")]  # other tests have theirs
    assert len(CRITERIA) == len(own) == 14
    assert {*CRITERIA} < {*METHODS["criteria"]}
    assert {*named(["control", "l1"])} == {*METHODS["control"], "l1"}
    with pytest.raises(SystemExit, match="no method or set 'l3'"):
        named(["l3"])


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("repair", ["none", "batch norm", "least squares"])
def test_a_network_is_pruned_to_the_macs(batches, uniform, repair):
    model, inputs = network().eval(), batches[0][0][:1]
    wanted = count_flops(model, inputs) / 2
    small = prune(model, Method("lightning-prune", "taylor_fo", uniform=uniform, repair=repair), wanted, batches)
    assert 0.97 * wanted < count_flops(small, inputs) <= wanted
    assert count_flops(model, inputs) == 2 * wanted


def test_a_channel_costs_what_the_network_saves_without_it(batches):
    model, inputs = network().eval(), batches[0][0][:1]
    graph = lp.trace(model, inputs)
    costs = macs_of_a_channel(model, graph, inputs)
    assert costs["layer1.0.conv1"] == 2 * 9 * 16 * 32 * 32  # written once, read once
    assert costs["layer1.0.conv1"] > costs["layer2.0.conv1"] > costs["layer3.0.conv1"]
    kept = []
    for per_mac in (False, True):
        small = prune(
            model, Method("lightning-prune", "random", per_mac=per_mac), count_flops(model, inputs) / 2, batches
        )
        kept.append(small.layer1[0].conv1.out_channels)
    assert kept[1] < kept[0]  # what is dear goes first


def test_several_steps_score_what_the_one_before_has_left(batches, monkeypatch):
    model, seen, score = network(), [], lp.score
    macs = count_flops(model, batches[0][0][:1])
    monkeypatch.setattr(
        lp, "score", lambda net, *of, **how: (seen.append(net.conv1.out_channels), score(net, *of, **how))[1]
    )
    method = Method("lightning-prune", "l1", uniform=True, steps=3, repair="least squares")
    small = prune(model, method, macs / 2, batches)
    assert seen[0] > seen[1] > seen[2]
    assert 0.4 < count_flops(small, batches[0][0][:1]) / macs <= 0.5


def test_projection_shortcuts_compute_the_same_as_padded_ones(batches):
    model = network(depth=14)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -1, 1)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    model = model.double().eval()
    other = projected(model.float(), batches).double()
    x = torch.rand(3, 3, 40, 24, dtype=torch.float64)
    torch.testing.assert_close(other(x), model.double()(x), rtol=1e-4, atol=1e-4)
    norm = other.layer2[0].shortcut[1]
    assert not torch.equal(norm.running_mean, torch.zeros_like(norm.running_mean))  # what training will find


def test_all_see_the_same_images_whatever_happens_between(folder):
    data, settings = images(folder, 8), Settings(epochs=2, lr=0.02, batch=8)
    plain, paused = (Training(network(), data, settings, seed=1) for _ in range(2))
    expected = [plain._batch()[0].clone() for plain.step in range(plain.total)]
    found = []
    for step in range(paused.total):
        paused.step = step
        found.append(paused._batch()[0].clone())
        with torch.random.fork_rng(devices=[]):
            torch.rand(7)
    assert all(map(torch.equal, found, expected))


def _options(folder, out, *words):
    sizes = ["--images", "16", "--batch", "8", "--epochs", "2", "--score-batches", "1", "--threads", "1"]
    return ["--data", str(folder), "--out", str(out), "--seeds", "0", "--speed-ups", "1.5", *sizes, *words]


def test_a_kill_costs_one_run_and_failures_are_lines(folder, tmp_path, monkeypatch, capsys):
    out, ran, run = tmp_path / "rows.jsonl", [], benchmark.Bench.run
    made = {"of": "x", "settings": "y", "before": 50.0, "accuracy": 50.0}
    monkeypatch.setattr(benchmark, "_dense", lambda *_: (network(shortcut="B").eval(), made))
    wanted = ["dense", "dense, distilled", "l1", "taylor_fo, 4 rounds, distilled", "taylor_fo, sparse learning"]
    wanted += ["bn_scale"]

    def killed(self, method, speed_up, seed):
        ran.append(method)
        if len(ran) == 3:
            raise KeyboardInterrupt
        return run(self, method, speed_up, seed)

    def fails(model, method, *of):
        if method.criterion == "bn_scale":
            raise RuntimeError("no batch norm")
        return prune(model, method, *of)

    monkeypatch.setattr(benchmark.Bench, "run", killed)
    monkeypatch.setattr(benchmark, "prune", fails)
    with pytest.raises(KeyboardInterrupt):
        benchmark.main(_options(folder, out, "--methods", *wanted))
    benchmark.main(_options(folder, out, "--methods", *wanted))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["method"] for row in rows] == wanted
    assert [row["speed_up"] for row in rows] == [1.0, 1.0, 1.5, 1.5, 1.5, 1.5]
    assert len(ran) == 7  # the third twice
    assert rows[0]["macs"] == 1
    assert all(0.6 < row["macs"] <= 1 / 1.5 for row in rows[2:5])
    assert rows[4]["seconds"]["sparse"] > 0
    assert rows[5]["error"] == "RuntimeError: no batch norm"
    assert "taylor_fo, sparse learning, 1.5 x, seed 0" in capsys.readouterr().out


def test_a_missing_peer_is_said_before_anything_runs(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    monkeypatch.setattr(benchmark, "_dense", None)
    with pytest.raises(SystemExit, match=r"pip install torch-pruning==1\.6\.1"):
        benchmark.main(_options(folder, tmp_path / "rows.jsonl", "--methods", "dense", "TP L1"))


def test_the_page_ranks_methods_and_names_failures(tmp_path):
    dense = {"of": "public", "settings": "Settings()", "before": 81.0, "accuracy": 89.5}
    setup = {"model": "resnet56", "dense": dense, "epochs": 2, "images": 0, "lr": 0.02}
    setup |= {"bf16": False, "batch": 128, "score_batches": 16, "cpu": "a CPU", "threads": 2, "torch": "2.14"}
    rows = []
    for seed in (0, 1):
        for name, speed_up, accuracy in (
            ("dense", 1.0, 90.0), ("dense, distilled", 1.0, 90.4), ("l1", 2.57, 88.0), ("TP L1", 2.57, 87.0),
            ("taylor_fo, distilled", 2.57, 89.4), ("TP Taylor, distilled", 2.57, 88.0),
        ):  # fmt: skip
            rows.append(
                {"setup": setup, "method": name, "speed_up": speed_up, "seed": seed, "macs": 0.389, "params": 0.4,
                 "before": 20.0, "accuracy": accuracy + 0.1 * seed, "seconds": {"prune": 1.0, "train": 60.0}}
            )  # fmt: skip
    rows.append({"setup": setup, "method": "dcp", "speed_up": 2.57, "seed": 0, "error": "ScoreError: no head"})
    page = render(rows, tmp_path / "page.png")
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    order = [line.split("|")[1].strip() for line in lines[2:8]]
    assert order == ["dense", "dense, distilled", "taylor_fo, distilled", "l1", "TP Taylor, distilled", "TP L1"]
    assert "(l1) loses 2.00 points to its dense control, the best of Torch-Pruning (TP L1) 3.00" in page
    assert "(taylor_fo, distilled) loses 1.00 points" in page  # to the distilled one
    assert "(TP Taylor, distilled) 2.40: a difference of +1.40, more than the larger deviation (0.07)" in page
    assert "- dcp: ScoreError: no head" in page
    assert "ResRep" in page
    assert (tmp_path / "page.png").stat().st_size > 10_000
    assert control_of(ALL["taylor_fo, sparse learning"], {}) is None


def test_relative_scores_spare_no_layer_for_its_size(batches):
    model, inputs = network().eval(), batches[0][0][:1]
    wanted = count_flops(model, inputs) / 2
    shares = []
    for relative in (False, True):
        small = prune(model, Method("lightning-prune", "taylor_fo", relative=relative), wanted, batches)
        pairs = zip(small.modules(), model.modules(), strict=True)
        kept = [of.out_channels / dense.out_channels for of, dense in pairs if isinstance(of, torch.nn.Conv2d)]
        shares.append(torch.tensor(kept))
    assert shares[1].std() < shares[0].std()


def test_what_the_network_does_not_need_goes_first_under_the_same_tolerance(batches):
    model, inputs = network().eval(), batches[0][0][:1]
    torch.nn.init.zeros_(model.layer2[0].bn2.weight)  # the block adds nothing, whatever its first layer computes
    wanted, kept = count_flops(model, inputs) * 0.7, []
    for options in ({"uniform": True}, {"tolerant": True}):
        small = prune(model, Method("lightning-prune", "l2", **options), wanted, batches)
        assert count_flops(small, inputs) <= wanted
        kept.append(small.layer2[0].conv1.out_channels)
    assert kept[1] == 4 < kept[0]  # of 32, the least that was tried
