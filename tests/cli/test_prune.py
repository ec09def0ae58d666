"""`lightning-prune prune`: what it prints, writes and refuses."""

from __future__ import annotations

import errno
import logging
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lightning_prune as lp
from lightning_prune.cli import main
from lightning_prune.engines import Eager, Program
from lightning_prune.measure import latency
from lightning_prune.measure.table_making import make_table
from lightning_prune.report.table import TIMES
from lightning_prune.tasks import ClassificationTask
from tests.cli.tiny import MODEL, NET, TinyData, files, refused, tiny_net

pytestmark = pytest.mark.usefixtures("workplace")


def test_a_state_dict_is_pruned_and_can_be_loaded(capsys) -> None:
    assert main(["prune", "dense.pt", *MODEL, "--ratio", "0.25", "--out", "small.pt"]) == 0
    out = capsys.readouterr().out
    dense, small = tiny_net(), tiny_net()
    dense.load_state_dict(torch.load("dense.pt"))
    plan = lp.load("small.pt", small)
    expected = lp.prune(dense.eval(), torch.rand(2, 3, 8, 8), criterion="l1", ratio=0.25)
    assert plan == expected.plan
    images = torch.rand(4, 3, 8, 8)
    torch.testing.assert_close(small.eval()(images), expected.model.eval()(images))
    assert re.search(r"lossless: max relative error \d\.\de-\d\d in float64", out)
    before, after = sum(p.numel() for p in dense.parameters()), sum(p.numel() for p in small.parameters())
    assert f"{before / after:.2f}{TIMES}" in out
    assert "pruned model: small.pt" in out
    assert files() == {"dense.pt", "task.yaml", "small.pt"}


def test_a_lightning_checkpoint_is_scored_on_the_loss_of_its_task(capsys, trained) -> None:
    argv = ["prune", "dense.ckpt", "--config", "task.yaml", "--criterion", "gre", "--ratio", "0.5"]
    assert main(argv) == 0
    assert "channels removed by gre, --ratio 0.5, coupling joint" in capsys.readouterr().out
    scores = lp.score(
        trained,
        graph := lp.trace(trained, trained.example_input_array),
        "gre",
        batches=TinyData().train_dataloader(),
        loss=lambda task, batch: nn.functional.cross_entropy(task(batch[0]), batch[1]),
    )
    fresh = ClassificationTask(tiny_net(), num_classes=3, input_size=(3, 8, 8))
    assert lp.load("pruned.pt", fresh) == lp.GlobalRatio(0.5).select(graph, scores)
    assert files() == {"dense.pt", "dense.ckpt", "task.yaml", "pruned.pt"}  # no logs, no checkpoints of Lightning's


class Counted(Eager):
    """Passes take a nanosecond per multiply-accumulate, on a clock of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.samples: list[int] = []
        self._now = 0.0
        monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=self.tick))
        monkeypatch.setattr("lightning_prune.selection.stopwatch.engine_from", lambda _: self)

    def __repr__(self) -> str:
        return "Eager()"  # as a table knows the engine

    def tick(self) -> float:
        self._now += 1e-12
        return self._now

    def prepare(self, model: nn.Module, example_inputs: torch.Tensor) -> Program:
        engine, macs = self, lp.measure.count_flops(model, example_inputs)

        class Waits(Program):
            def run(self, inputs: torch.Tensor) -> None:
                engine.samples.append(len(inputs))
                engine._now += 1e-9 * macs * len(inputs)

        return Waits()


def test_a_latency_budget_is_of_one_sample(capsys, monkeypatch, trained) -> None:
    engine = Counted(monkeypatch)
    milliseconds = f"latency_ms={0.5e-6 * lp.measure.count_flops(trained, torch.zeros(1, 3, 8, 8)):.6f}"
    assert main(["prune", "dense.ckpt", "--config", "task.yaml", "--budget", milliseconds]) == 0
    assert {*engine.samples} == {1}  # the task's example has 2
    assert re.search(r"\d+ of 35 channels removed by l1, --budget latency_ms=0.\d+, ", capsys.readouterr().out)


def test_a_latency_table_is_asked_and_its_answer_told(capsys, monkeypatch, trained) -> None:
    engine = Counted(monkeypatch)
    table = make_table(trained, torch.zeros(1, 3, 8, 8), engine=engine, coarse=True, clock=engine.tick)
    table.save("table.json")
    milliseconds = f"latency_ms={0.6e-6 * lp.measure.count_flops(trained, torch.zeros(1, 3, 8, 8)):.6f}"
    asked = ["prune", "dense.ckpt", "--config", "task.yaml", "--latency-table", "table.json", "--budget", milliseconds]
    told = r"the most score kept within [\d.e-]+ ms by the table: [\d.]+ of at most [\d.]+ \(gap [\d.]+ %\), measured"
    assert main([*asked, "--explain"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert re.search(told, out)
    assert "Nothing was done" in out
    assert main(asked) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert re.search(told, out)
    assert re.search(r"--latency-table table.json, coupling joint", out)
    assert "engine: eager there, onnxruntime here" in refused(capsys, *asked, "--engine", "onnxruntime", "--overwrite")


def test_an_engine_without_a_latency_is_refused(capsys) -> None:
    for words in (["--engine", "onnxruntime"], ["--latency-table", "no.json", "--budget", "flops=0.5"]):
        message = refused(capsys, "prune", "dense.pt", *MODEL, *words)
        assert "--engine and --latency-table are for --budget latency_ms=MILLISECONDS" in message
    words = ["--latency-table", "no.json", "--budget", "latency_ms=1"]
    assert "there is no file no.json" in refused(capsys, "prune", "dense.pt", *MODEL, *words)


def test_a_result_that_cannot_be_written_is_refused_before_the_work(capsys) -> None:
    Path("folder").mkdir()
    work = ["prune", "dense.pt", "--model", "no.such.Net"]  # the work would fail at once
    for folder in ("folder", "folder/", "new/"):
        assert f"'{folder}' is a folder; name a file in it" in refused(capsys, *work, "--out", folder)
    for file in ("net.onnx", "net.PT2"):
        said = refused(capsys, *work, "--out", file)
        assert f"--out {file}: prune writes weights; of these, lightning-prune export writes such a file" in said
    assert "cannot write" in refused(capsys, *work, "--out", "dense.pt/x/y.pt")


def test_a_full_disk_is_said_in_one_line(capsys, monkeypatch) -> None:
    def full(*args, **extra):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert "cannot write pruned.pt: No space left" in refused(capsys, "prune", "dense.pt", *MODEL)


def test_a_recipe_for_training_is_not_taken_for_options(capsys, trained) -> None:
    asked = ["prune", "dense.ckpt", "--config", "task.yaml", "--overwrite"]
    for more, said in ((["--config", "prune/jre"], True), ([], False)):
        assert main([*asked, *more]) == 0
        assert ("PruneCallback of --config is for fit" in capsys.readouterr().out) == said


def test_a_seed_of_the_recipe_is_not_announced(monkeypatch, trained) -> None:
    said = []
    monkeypatch.setattr(logging.getLogger("lightning_fabric"), "handlers", [handler := logging.Handler()])
    monkeypatch.setattr(handler, "emit", said.append)
    Path("task.yaml").write_text("seed_everything: 0\n" + Path("task.yaml").read_text())
    assert main(["prune", "dense.ckpt", "--config", "task.yaml", "--explain"]) == 0
    assert said == []


def test_a_budget_with_constraints(capsys) -> None:
    argv = ["--budget", "flops=0.6", "--round-to", "4", "--ignore", "3", "--coupling", "union"]
    assert main(["prune", "dense.pt", *MODEL, *argv]) == 0
    plan = lp.load("pruned.pt", tiny_net())
    assert len(plan.groups["0"].keep) % 4 == 0
    assert plan.groups["0"].removed
    assert "3" not in plan.groups or not plan.groups["3"].removed
    assert plan.coupling == "union"


def test_the_same_share_of_every_layer(capsys) -> None:
    assert main(["prune", "dense.pt", *MODEL, "--per-layer", "--ratio", "0.25"]) == 0
    assert [len(group.removed) for group in lp.load("pruned.pt", tiny_net()).groups.values()] == [4, 4]
    assert main(["prune", "dense.pt", *MODEL, "--per-layer", "--budget", "params=0.5", "--overwrite"]) == 0
    first, second = (len(group.removed) for group in lp.load("pruned.pt", tiny_net()).groups.values())
    assert 4 < min(first, second) <= max(first, second) <= min(first, second) + 1  # one more fits into the budget


def test_every_group_keeps_so_many_channels(capsys) -> None:
    argv = ["prune", "dense.pt", *MODEL, "--ratio", "0.9", "--overwrite", "--min-channels"]
    for words, kept in (("5", 5), ("0.5", 8)):
        assert main([*argv, words]) == 0
        assert [len(group.keep) for group in lp.load("pruned.pt", tiny_net()).groups.values()] == [kept, kept]
        assert f"--ratio 0.9 --min-channels {words}, coupling" in " ".join(capsys.readouterr().out.split())
    message = refused(capsys, "prune", "dense.pt", *MODEL, "--plan", "no.json", "--min-channels", "2", "--overwrite")
    assert "--plan says all; leave out --per-layer, --round-to, --min-channels, " in message


def normed_net() -> nn.Module:
    body = [nn.Conv2d(3, 8, 3), nn.GroupNorm(1, 8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


@pytest.mark.parametrize("criterion", ["l1", "taylor"])
def test_what_is_under_a_statistic_goes_with_loss_where_it_is_asked_for(capsys, criterion: str) -> None:
    task = ClassificationTask(normed_net(), num_classes=3, input_size=(3, 8, 8))
    torch.save(task.state_dict(), "normed.pt")
    Path("task.yaml").write_text(Path("task.yaml").read_text().replace(NET, f"{__name__}.normed_net"))
    asked = ["prune", "normed.pt", "--config", "task.yaml", "--criterion", criterion, "--per-layer", "--overwrite"]
    for words, kept, said in (([], [2], "lossless: "), (["--statistics"], [4, 2], "NOT lossless, by choice of --stat")):
        assert main([*asked, *words]) == 0
        assert re.search(rf"^{said}", capsys.readouterr().out, re.MULTILINE)
        plan = lp.Plan.from_dict(torch.load("pruned.pt", weights_only=True)["plan"])
        assert sorted((len(group.keep) for group in plan.groups.values() if group.removed), reverse=True) == kept
    assert main([*asked, "--statistics", "--explain"]) == 0
    assert "lossless: NO" in capsys.readouterr().out


def test_a_lossy_plan_is_called_so(capsys) -> None:
    assert main(["prune", "dense.pt", *MODEL, "--coupling", "intersection"]) == 0
    assert "NOT lossless, by choice of the plan" in capsys.readouterr().out


def test_explaining_does_nothing(capsys) -> None:
    before = files()
    assert main(["prune", "dense.pt", *MODEL, "--budget", "params=0.5", "--explain"]) == 0
    out = capsys.readouterr().out
    assert "not prunable: reaches the model's output" in out
    assert "can be met" in out
    assert out.endswith("Nothing was done.\n")
    assert files() == before


def test_a_budget_out_of_reach_is_explained_with_the_nearest(capsys) -> None:
    argv = ["prune", "dense.pt", *MODEL, "--ignore", "3", "--budget", "flops=0.01"]
    assert main([*argv, "--explain"]) == 1
    err = capsys.readouterr().err
    assert "CANNOT be met" in err
    nearest = re.search(r"Budget\((flops=0\.\d+)\)", err)
    assert nearest is not None
    assert main([*argv[:-1], nearest[1], "--explain"]) == 0
    assert refused(capsys, *argv) == err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["prune"], "required: CHECKPOINT"),
        (["prune", "dense.pt"], "weights, not code: pass --config TASK.yaml or --model NAME"),
        (["prune", "dense.pt", "--model", NET, "--config", "task.yaml"], "exclude each other"),
        (["prune", "no.pt", *MODEL], "there is no file no.pt"),
        (["prune", "task.yaml", *MODEL], "task.yaml cannot be read"),
        (["prune", "dense.pt", "--model", "resnet19"], "Did you mean 'resnet1"),
        (["prune", "dense.pt", "--model", "resnet18"], "another model: 122 missing (bn1.bias, "),
        (["prune", "cut.pt", *MODEL], "cut.pt cannot be read: damaged, cut short, or not a checkpoint"),
        (["prune", "task.pt", *MODEL], "names have 'model.' in front, beside loss.weight; it is of the whole task"),
        (["prune", "dense.pt", "--config", "task.yaml", "--ration", "0.4"], "--ration. Did you mean '--ratio'?"),
        (
            ["prune", "dense.pt", *MODEL, "--arg", "width=8"],
            "'0.weight' is [16, 3, 3, 3] in the file and [8, 3, 3, 3] in the model",
        ),
        (["prune", "dense.pt", *MODEL, "--criterion", "l3"], "l1"),
        (["prune", "dense.pt", *MODEL, "--criterion", "jre"], "pass --config TASK.yaml"),
        (["prune", "dense.pt", *MODEL, "--ratio", "1.5"], "ratio"),
        (["prune", "dense.pt", *MODEL, "--ratio", "0"], "nothing"),
        (["prune", "dense.pt", *MODEL, "--budget", "flops"], "COST=NUMBER, such as flops=0.5, got 'flops'"),
        (["prune", "dense.pt", *MODEL, "--budget", "speed=2"], "flops, params and latency_ms, got 'speed'"),
        (
            ["prune", "dense.pt", *MODEL, "--budget", "flops=0.5", "--ratio", "0.3"],
            "not allowed with argument --budget",
        ),
        (["prune", "dense.pt", *MODEL, "--out", "dense.pt", "--overwrite"], "--out dense.pt is what is read"),
        (["prune", "dense.pt", *MODEL, "--out", "task.yaml/x.pt"], "cannot write task.yaml/x.pt"),
        (["prune", "dense.pt", *MODEL, "--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["prune", "dense.pt", "--model", NET, "--input", "1", "-3", "8", "8"], "at least 1, got '-3'"),
        (["prune", "dense.pt", *MODEL, "--min-channels", "0"], "at least 1, or a share below 1, got '0'"),
        (["prune", "dense.pt", *MODEL, "--round-to", "64"], "nothing is removed by --ratio 0.5 --round-to 64"),
    ],
)
def test_errors_are_one_line_and_nothing_is_written(capsys, argv, said) -> None:
    state = tiny_net().state_dict()
    torch.save({"loss.weight": torch.ones(1), **{f"model.{name}": value for name, value in state.items()}}, "task.pt")
    Path("cut.pt").write_bytes(Path("dense.pt").read_bytes()[:500])
    assert said in refused(capsys, *argv)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--criterion l11", "one of apoz, bn_scale, .*, got 'l11'. Did you mean 'l1'?"),
        ("--criterion next_layer", "Did you mean 'next_layer_taylor'?"),
        ("--engine onnxrutime", "'onnxrutime' .*. Did you mean 'onnxruntime'?"),
        ("--coupling jiont", "choice: 'jiont' .choose from joint, union, intersection.. Did you mean 'joint'?"),
        ("--budget flop=0.5", "got 'flop'. Did you mean 'flops'?"),
        ("--coupling x", "choice: 'x' .choose from joint, union, intersection.. See lightning-prune prune --help.$"),
        ("--ratio 1.5", "a share from 0 to below 1, such as 0.5, got '1.5'"),
        ("--ratio half", "a share from 0 to below 1, such as 0.5, got 'half'"),
        ("--budget flops=2", "flops is a share of the dense model's, between 0 and 1, got '2'"),
        ("--budget latency_ms=0", "latency_ms is milliseconds above 0, got '0'"),
        ("--arg width", "expected KEY=VALUE, got 'width'"),
        ("--config task.yaml", "--config and --model exclude each other"),
        ("--score-batches 2", "--score-batches does nothing for l1"),
        ("--engine onnxruntime", "--engine and --latency-table are for --budget"),
    ],
)
def test_a_mistake_in_the_command_line_is_answered_with_2(capsys, words: str, said: str) -> None:
    try:
        status = main(["prune", "dense.pt", *MODEL, *words.split()])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert re.search(said.replace("?", "[?]"), capsys.readouterr().err)


def test_no_model_is_such_a_mistake(capsys) -> None:
    assert main(["prune", "dense.pt"]) == 2
    assert "pass --config TASK.yaml or --model NAME" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["prune dense.pt", "measure dense.pt", "export dense.pt --out net.onnx"])
def test_an_input_that_the_model_does_not_take_is_named_as_the_command_line_does(capsys, command: str) -> None:
    said = refused(capsys, *command.split(), "--model", NET, "--input", "1", "1", "8", "8")
    assert said.endswith("The input was 1 1 8 8; --input names another shape.\n")
    assert "Pass inputs as" not in said


def test_a_file_that_holds_code_is_not_run(capsys) -> None:
    torch.save({"model": tiny_net()}, "pickled.pt")
    said = refused(capsys, "prune", "pickled.pt", *MODEL)
    assert "it holds torch.nn.modules" in said
    assert "container.Sequential" in said
    assert "save the weights alone" in said


def test_a_missing_checkpoint_is_said_beside_an_older_result(capsys) -> None:
    Path("pruned.pt").touch()
    assert "there is no file no.pt" in refused(capsys, "prune", "no.pt", *MODEL, "--overwrite")


def test_a_pruned_file_is_not_pruned_again(capsys) -> None:
    main(["prune", "dense.pt", *MODEL])
    assert "is pruned already" in refused(capsys, "prune", "pruned.pt", *MODEL, "--out", "more.pt")


OWN = """
from dataclasses import dataclass
from lightning_prune.criteria import WeightCriterion

@dataclass(frozen=True, kw_only=True)
class Largest(WeightCriterion):
    power: float

    def channel_scores(self, rows):
        return rows.abs().amax(1) ** self.power

squared = Largest(power=2)
other = 3
"""


def test_a_criterion_of_the_users_own_is_named_as_models_are(capsys) -> None:
    Path("largest.py").write_text(OWN)
    assert main(["prune", "dense.pt", *MODEL, "--criterion", "largest.py:squared"]) == 0
    assert "channels removed by largest.py:squared, --ratio 0.5" in capsys.readouterr().out
    weight = torch.load("dense.pt")["0.weight"]
    kept = torch.load("pruned.pt", weights_only=True)["plan"]["groups"]["0"]["keep"]
    assert set(kept) <= set(weight.abs().flatten(1).amax(1).topk(len(kept)).indices.tolist())
    for word, said in (
        ("largest.py:Largest", "cannot be built without arguments: TypeError"),
        ("largest.py:other", "'largest.py:other' is no criterion but a int"),
        ("largest.py", "name what builds the criterion in it: largest.py:Largest"),
        ("largest.py:Lagest", "Did you mean 'Largest'?"),
    ):
        assert said in refused(capsys, "prune", "dense.pt", *MODEL, "--criterion", word, "--out", "new.pt")
