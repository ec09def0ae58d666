"""The search for a setting by latency, resuming, training on tiny images, and the page."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

import lightning_prune as lp
from benchmarks.accuracy_at_latency import __main__ as benchmark
from benchmarks.accuracy_at_latency.report import render
from benchmarks.accuracy_at_latency.selections import Bench, Point, nearest_below
from benchmarks.cifar_training import Settings, accuracy, adapted, images, scoring_batches, train
from tests.benchmarks.cifar_folder import make_folder, network

pytestmark = pytest.mark.slow  # no part of the package

PLAN = lp.Plan({}, "joint", True)
SETUP = {
    "model": "resnet20",
    "engine": "onnxruntime",
    "batch": 16,
    "threads": 2,
    "criterion": "taylor_fo",
    "epochs": 3,
    "lr": 0.02,
    "images": 0,
    "score_batches": 16,
    "cpu": "a CPU",
    "versions": {"torch": "2.14"},
    "dense": {"of": "resnet20.th", "settings": "Settings(epochs=12)", "before": 81.03, "accuracy": 89.5},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data"))


# --- the search


def test_the_search_ends_at_the_target_or_just_below():
    asked = []

    def attempt(setting):
        asked.append(setting)
        return Point(setting, setting**0.5, PLAN)

    found = nearest_below(attempt, 0.7)
    assert 0.99 * 0.7 <= found.share <= 0.7
    assert asked[0] == 0.7
    assert len(asked) <= 10


def test_the_search_takes_the_best_below_of_what_jumps(capsys):
    """Widths that an engine likes are islands: what was measured below the target counts, wherever it is."""
    found = nearest_below(lambda setting: Point(setting, 0.9 if setting > 0.4 else 0.5, PLAN), 0.7)
    assert found.share == 0.5
    assert "the nearest below 70% is 50.0%" in capsys.readouterr().out


def test_what_cannot_be_kept_is_not_found():
    with pytest.raises(lp.PruningError, match="70%"):
        nearest_below(lambda setting: Point(setting, 0.9, PLAN), 0.7)
    found = nearest_below(lambda setting: Point(setting, 0.0 if setting < 0.3 else setting, PLAN), 0.4)
    assert 0.396 <= found.share <= 0.4
    nothing = Point(0.2, 0.0, None)
    with pytest.raises(lp.PruningError, match="40%"):
        nearest_below(lambda setting: nothing if setting < 0.7 else Point(setting, 0.9, PLAN), 0.4)


@pytest.mark.parametrize("kind", ["flops", "flops_8", "layers", "layers_8"])
def test_a_selection_is_brought_to_a_share_of_the_time(folder, kind, monkeypatch):
    """The share of parameters stands for that of time: no machine disturbs it."""
    data = images(folder, 8)
    bench = Bench.of(network(), scoring_batches(data, 1), "taylor_fo", size=4, engine="eager", repeats=1)
    count = lp.measure.count_params
    monkeypatch.setattr(Bench, "share", lambda self, model: count(model) / count(self.dense))
    row = bench.chosen(kind, 0.6, folder / "none.json")
    small = bench.small(lp.Plan.from_dict(json.loads(json.dumps(row["plan"]))))
    assert row["share"] == row["params"] == count(small) / count(bench.dense) <= 0.6
    assert row["share"] > 0.3
    if kind.endswith("_8"):
        assert all(len(group["keep"]) % 8 == 0 for group in row["plan"]["groups"].values())


def test_shares_are_of_the_dense_models_time(folder):
    bench = Bench.of(network(), scoring_batches(images(folder, 8), 1), "taylor_fo", size=4, engine="eager", repeats=2)
    assert bench.inputs.shape == (4, 3, 32, 32)
    assert bench.share(bench.dense) > 0
    assert set(bench.compare({"dense": bench.dense, "again": bench.dense})) == {"dense", "again"}


# --- training


def test_training_is_the_same_for_a_seed_and_goes_on_after_a_kill(folder, tmp_path):
    data, settings = images(folder, 8), Settings(epochs=3, lr=0.02, batch=8)
    whole, again, killed = network(), network(), network()
    losses = [said["loss"] for said in train(whole, data, settings, seed=1)]
    assert losses[-1] < losses[0]
    assert [said["loss"] for said in train(again, data, settings, seed=1)] == losses
    assert [said["loss"] for said in train(network(), data, settings, seed=2)] != losses
    steps = train(killed, data, settings, seed=1, keep=tmp_path / "part.pt")
    next(steps)
    steps.close()
    with pytest.raises(SystemExit, match=r"part\.pt was begun with Settings\(epochs=3"):
        next(train(network(), data, Settings(epochs=4, lr=0.02, batch=8), seed=1, keep=tmp_path / "part.pt"))
    resumed = network(seed=5)
    assert [said["loss"] for said in train(resumed, data, settings, seed=1, keep=tmp_path / "part.pt")] == losses[1:]
    state = resumed.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in whole.state_dict().items())


def test_adapted_weights_are_made_once(folder, tmp_path, capsys):
    data, settings = images(folder, 8), Settings(epochs=1, lr=0.02, batch=8)
    path = tmp_path / "adapted.pt"
    made = adapted("resnet20", network, data, settings, path)
    model = network(seed=3)
    model.load_state_dict(made["state_dict"])
    assert accuracy(model, data) == made["made"]["accuracy"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapted.pt"]
    assert adapted("resnet20", None, data, settings, path)["made"] == made["made"]
    assert "trained; " in capsys.readouterr().out


def test_missing_data_and_weights_say_what_to_do(tmp_path):
    with pytest.raises(SystemExit, match=r"cifar10 is missing: .*unpack\.py"):
        images(tmp_path)
    with pytest.raises(SystemExit, match="--weights takes"):
        benchmark.main(["--data", str(tree_of(tmp_path)), "--weights", str(tmp_path), "--out", str(tmp_path / "x")])


def tree_of(root):
    for part in ("train", "test"):
        (root / "cifar10" / part / "a").mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(root / "cifar10" / part / "a" / "0.png")
    return root


# --- rows


def test_rows_of_the_same_set_up_are_found_again_and_cut_lines_are_not(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = benchmark.Rows(path, SETUP)
    rows.add(part="run", selection="table", budget=0.7, seed=0, accuracy=88.0)
    benchmark.Rows(path, {**SETUP, "epochs": 4}).add(part="run", selection="table", budget=0.7, seed=1, accuracy=1.0)
    with path.open("a") as stream:
        stream.write('{"setup": {"mod')
    again = benchmark.Rows(path, SETUP)
    assert again.find(part="run", selection="table", budget=0.7, seed=0)["accuracy"] == 88.0
    assert again.find(part="run", selection="table", budget=0.7, seed=1) is None


def test_a_second_call_measures_nothing_again(folder, tmp_path, monkeypatch, capsys):
    made = tmp_path / "adapted.pt"
    torch.save({"state_dict": network().state_dict(), "made": SETUP["dense"]}, made)
    monkeypatch.setattr(lp.models, "resnet20", network, raising=False)
    count = lp.measure.count_params
    monkeypatch.setattr(Bench, "share", lambda self, model: count(model) / count(self.dense))
    words = f"--data {folder} --adapted {made} --engine eager --batch 2 --repeats 1 --budgets 0.6 --selections layers"
    argv = [*words.split(), "--seeds", "0", "1", "--epochs", "1", "--score-batches", "1", "--threads", "1"]
    argv += ["--out", str(tmp_path / "rows.jsonl"), "--images", "128"]
    monkeypatch.setattr(benchmark, "train", lambda *of: iter([{"loss": 1.0}]))
    benchmark.main(argv)
    first = (tmp_path / "rows.jsonl").read_text()
    parts = [json.loads(line)["part"] for line in first.splitlines()]
    assert parts == ["plan", "latency", "run", "run", "run", "run"]
    benchmark.main(argv)
    assert (tmp_path / "rows.jsonl").read_text() == first
    benchmark.main(["--render", str(tmp_path / "rows.jsonl")])
    assert (tmp_path / "rows.png").is_file()
    assert "Runs finished: 4 of 4." in (tmp_path / "rows.md").read_text()


# --- the page


def rows_of(accuracies, times):
    cases = [("dense", 1.0), *(case for case in accuracies if case[0] != "dense")]
    yield {
        "setup": {**SETUP, "lr": 1.0},
        "part": "run",
        "selection": "table",
        "budget": 0.7,
        "seed": 0,
        "accuracy": 1.0,
    }
    for kind, budget in cases[1:]:
        found = {"setting": 0.31, "flops": 0.4, "params": 0.3, "before": 12.34}
        yield {"setup": SETUP, "part": "plan", "selection": kind, "budget": budget, **found}
    yield {"setup": SETUP, "part": "latency", "models": [list(case) for case in cases], "milliseconds": times}
    for (kind, budget), values in accuracies.items():
        for seed, value in enumerate(values):
            row = {"selection": kind, "budget": budget, "seed": seed, "accuracy": value}
            yield {"setup": SETUP, "part": "run", **row}


def test_the_page_says_means_deviations_and_who_wins(tmp_path):
    accuracies = {
        ("dense", 1.0): [90.0, 90.2, 90.4],
        ("table", 0.7): [89.0, 89.2, 89.4],
        ("flops", 0.7): [87.0, 87.1, 87.2],
        ("layers", 0.7): [88.0, 88.5],
    }
    times = [[2.0, 0.02], [1.4, 0.01], [1.36, 0.03], [1.3, 0.01]]
    page = render(list(rows_of(accuracies, times)), tmp_path / "page.png")
    cells = [[cell.strip() for cell in line.split("|")] for line in page.splitlines()]
    rows = {line[2]: line for line in cells if len(line) > 5}
    assert rows["Budget(latency_ms, table)"][4:7] == ["1.400", "0.010", "0.700"]
    assert rows["Budget(latency_ms, table)"][-5:-1] == ["89.40", "89.20", "0.20", "-1.00"]
    assert rows["LayerRatio"][-5:-1] == ["", "88.25", "0.35", "-1.95"]
    assert rows["dense"][-5:-1] == ["90.40", "90.20", "0.20", ""]
    assert "Runs finished: 11 of 12." in page
    assert "selection (1.40 ms) has +0.95 points against LayerRatio (1.30 ms)" in page
    assert "of the others: more than the larger deviation (0.35)" in page
    assert "batch 16, 2 threads, a CPU; torch 2.14" in page
    assert (tmp_path / "page.png").stat().st_size > 10_000


def test_a_page_needs_times(tmp_path):
    with pytest.raises(SystemExit, match="nothing was timed"):
        render([{"setup": SETUP, "part": "plan"}], tmp_path / "page.png")
