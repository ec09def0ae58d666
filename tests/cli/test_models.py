"""`lightning-prune prune`, `measure` and `export`: what they print, write and refuse."""

from __future__ import annotations

import errno
import io
import logging
import re
from pathlib import Path

import pytest
import torch
import yaml
from pytorch_lightning import LightningDataModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_prune as lp
from lightning_prune.cli import main
from lightning_prune.cli import prune as prune_command
from lightning_prune.export import load_exported
from lightning_prune.graph.recording import tensors_in
from lightning_prune.measure import Latency
from lightning_prune.report.table import TIMES
from lightning_prune.tasks import ClassificationTask

NET = f"{__name__}.tiny_net"
MODEL = ["--model", NET, "--input", "2", "3", "8", "8"]


def tiny_net(width: int = 16, classes: int = 3) -> nn.Module:
    body = [nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


class TinyData(LightningDataModule):
    def __init__(self, shuffle: bool = False):
        super().__init__()
        self.shuffle = shuffle

    def train_dataloader(self):
        images = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(images, torch.arange(12) % 3), 6, shuffle=self.shuffle)


@pytest.fixture(autouse=True)
def _workplace(tmp_path, monkeypatch):
    """A working directory with a state dict, a recipe, and a wide terminal."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    torch.manual_seed(0)
    torch.save(tiny_net().state_dict(), "dense.pt")
    content = {
        "model": {
            "class_path": "lightning_prune.tasks.ClassificationTask",
            "init_args": {"model": {"class_path": NET}, "num_classes": 3, "input_size": [3, 8, 8]},
        },
        "data": {"class_path": f"{__name__}.TinyData"},
    }
    Path("task.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")


@pytest.fixture
def trained() -> ClassificationTask:
    """The recipe's task with weights of its own, in a Lightning checkpoint."""
    task = ClassificationTask(tiny_net(), num_classes=3, input_size=(3, 8, 8))
    trainer = Trainer(max_epochs=0, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(task)
    trainer.save_checkpoint("dense.ckpt")
    return task


def files() -> set[str]:
    return {path.name for path in Path().iterdir()}


def refused(capsys, *argv: str) -> str:
    """Standard error of a command that must fail; one line, and nothing is written."""
    before = files()
    try:
        status = main(list(argv))
    except SystemExit as stop:
        status = stop.code
    assert status in (1, 2)
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert files() == before
    return err


# --- prune


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


def test_a_latency_budget_is_of_one_sample(capsys, monkeypatch, trained) -> None:
    timed = []

    def once(model, inputs, **options):
        timed.append(len(inputs))
        return Latency(lp.measure.count_params(model) / 1e3, 0.0, ())

    monkeypatch.setattr("lightning_prune.selection.budget.measure_latency", once)
    assert main(["prune", "dense.ckpt", "--config", "task.yaml", "--budget", "latency_ms=1"]) == 0
    assert set(timed) == {1}  # the task's example has 2
    assert re.search(r"\d+ of 35 channels removed by l1, --budget latency_ms=1, ", capsys.readouterr().out)


def test_a_result_that_cannot_be_written_is_refused_before_the_work(capsys, monkeypatch) -> None:
    monkeypatch.setattr(prune_command, "architecture", None)
    Path("folder").mkdir()
    assert "cannot write folder: Is a directory" in refused(capsys, "prune", "dense.pt", *MODEL, "--out", "folder")
    assert "cannot write" in refused(capsys, "prune", "dense.pt", *MODEL, "--out", "dense.pt/x/y.pt")


def test_a_full_disk_is_said_in_one_line(capsys, monkeypatch) -> None:
    def full(*args, **extra):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(prune_command, "save", full)
    assert "cannot write pruned.pt: No space left" in refused(capsys, "prune", "dense.pt", *MODEL)


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
    nearest = re.search(r"--budget (flops=0\.\d+) ", err)
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
        (["prune", "task.pt", *MODEL], "names have 'model.' in front; it is of the whole task"),
        (["prune", "dense.pt", "--config", "task.yaml"], "names lack 'model.' in front; it is of a part"),
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
        (["prune", "dense.pt", *MODEL, "--budget", "flops=0.5", "--ratio", "0.3"], "leave out --ratio"),
        (["prune", "dense.pt", *MODEL, "--out", "dense.pt"], "is the checkpoint itself"),
        (["prune", "dense.pt", *MODEL, "--out", "task.yaml/x.pt"], "cannot write task.yaml/x.pt"),
        (["prune", "dense.pt", *MODEL, "--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["prune", "dense.pt", "--model", NET, "--input", "1", "-3", "8", "8"], "positive numbers"),
        (["measure", "no.such.Net"], "No module named 'no'"),
        (["measure", "no.pt"], "there is no file no.pt"),
        (["measure", "a", "b", "c"], "at most two models"),
        (["measure", NET, "--batch-sizes", "1,0"], "at least 1, got '0'"),
        (["measure", NET, "--threads", "x"], "at least 1, got 'x'"),
        (["export", NET, "--out", "net.pt2"], "must end in .onnx"),
        (["export", NET], "required: --out"),
        (["export", NET, "--out", "dense.pt/net.onnx"], "cannot write dense.pt/net.onnx: Not a directory"),
        (["prune", "dense.pt", *MODEL, "--round-to", "64"], "nothing is removed by --ratio 0.5 --round-to 64"),
        (["export", NET, "--out", "net.tflite", "--format", "tflite"], "invalid choice: 'tflite'"),
    ],
)
def test_errors_are_one_line_and_nothing_is_written(capsys, argv, said) -> None:
    torch.save({f"model.{name}": value for name, value in tiny_net().state_dict().items()}, "task.pt")
    Path("cut.pt").write_bytes(Path("dense.pt").read_bytes()[:500])
    assert said in refused(capsys, *argv)


def test_a_file_that_holds_code_is_not_run(capsys) -> None:
    torch.save({"model": tiny_net()}, "pickled.pt")
    said = refused(capsys, "prune", "pickled.pt", *MODEL)
    assert "it holds torch.nn.modules" in said
    assert "container.Sequential" in said
    assert "save the weights alone" in said


def test_a_missing_checkpoint_is_said_beside_an_older_result(capsys) -> None:
    Path("pruned.pt").touch()
    assert "there is no file no.pt" in refused(capsys, "prune", "no.pt", *MODEL)


def test_scores_on_a_part_of_shuffled_data_are_the_same_every_time(monkeypatch, trained) -> None:
    seen = []

    def watched(graph, scores, *others):
        seen.append(scores)
        return planned(graph, scores, *others)

    planned = prune_command._plan
    monkeypatch.setattr(prune_command, "_plan", watched)
    argv = ["prune", "dense.ckpt", "--config", "task.yaml", "--criterion", "gre", "--score-batches", "1"]
    for seed in range(2):
        torch.manual_seed(seed)
        assert main([*argv, "--data.shuffle=true"]) == 0
    first, second = seen
    assert all(torch.equal(first[group], second[group]) for group in first)


def test_a_pruned_file_is_not_pruned_again(capsys) -> None:
    main(["prune", "dense.pt", *MODEL])
    assert "is pruned already" in refused(capsys, "prune", "pruned.pt", *MODEL, "--out", "more.pt")


# --- measure


def test_before_and_after_for_every_batch_size_and_number_of_threads(capsys) -> None:
    main(["prune", "dense.pt", *MODEL])
    capsys.readouterr()
    argv = ["measure", NET, "pruned.pt", "--batch-sizes", "1,3", "--threads", "1,2", "--repeats", "2"]
    assert main(argv) == 0  # the input's shape is that of the file
    out = capsys.readouterr().out
    assert re.findall(r"^([13]) +([12]) +[\d.]+ ± [\d.]+ +[\d.]+ ± [\d.]+ +[\d.]+. +\d+ %", out, re.MULTILINE) == [
        ("1", "1"),
        ("1", "2"),
        ("3", "1"),
        ("3", "2"),
    ]
    small = tiny_net()
    lp.load("pruned.pt", small)
    images = torch.rand(1, 3, 8, 8)
    macs = lp.measure.count_flops(tiny_net(), images) / lp.measure.count_flops(small, images)
    assert re.search(rf"times less +[\d.]+{TIMES} +{macs:.2f}{TIMES}", out)


def test_layers_and_what_sets_the_pace(capsys) -> None:
    main(["prune", "dense.pt", *MODEL])
    capsys.readouterr()
    assert main(["measure", "pruned.pt", *MODEL, "--layers", "--repeats", "2", "--top", "3"]) == 0
    out = capsys.readouterr().out
    assert "5 other layers" in out
    assert "layer by layer, batch size 2, " in out
    assert "between layers" in out
    assert "this machine on" in out
    assert "of what the FLOPs promise" in out
    assert "timers around the layers changed a pass by" in out


@pytest.mark.parametrize("columns", ["60", "80", "120"])
def test_tables_fit_the_terminal(capsys, monkeypatch, columns) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    main(["prune", "dense.pt", *MODEL])
    capsys.readouterr()
    main(["measure", "dense.pt", "pruned.pt", *MODEL, "--layers", "--repeats", "2"])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= int(columns)
    tables = out.partition("this machine")[0]
    assert all(f"{name} " in tables for name in ("times less", "together", "batch"))  # no word is broken
    assert ("GFLOP/s" in tables) == (columns == "120")


def test_a_log_in_ascii_is_no_reason_to_fail(monkeypatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stream)
    assert main(["measure", NET, "--input", "2", "3", "8", "8", "--layers", "--repeats", "1"]) == 0
    stream.seek(0)
    assert "+-" in stream.read()


def test_one_sample_unless_a_shape_is_asked_for(capsys, trained) -> None:
    def sizes(*argv: str) -> list[str]:
        assert main(["measure", *argv, "--repeats", "1"]) == 0
        return re.findall(r"^(\d+) +\d+ +[\d.]+ ±", capsys.readouterr().out, re.MULTILINE)

    assert sizes("dense.ckpt", "--config", "task.yaml") == ["1"]  # the task's example has 2
    assert sizes("dense.ckpt", "--config", "task.yaml", "--input", "3", "3", "8", "8") == ["3"]


def test_small_models_are_counted_in_thousands(capsys) -> None:
    assert main(["measure", NET, "--repeats", "1"]) == 0
    out = capsys.readouterr().out
    assert f"{lp.measure.count_params(tiny_net()) / 1e3:.2f}" in out
    assert re.search(r" k +M +ptflops, M +paper, M ", out)


def test_more_threads_than_cores_is_said(capsys, monkeypatch) -> None:
    monkeypatch.setattr("lightning_prune.cli.cost_table.core_count", lambda: 1)
    for threads, said in (("1", False), ("1,2", True)):
        assert main(["measure", NET, "--input", "1", "3", "8", "8", "--threads", threads, "--repeats", "1"]) == 0
        assert ("more threads than the 1 core of this process" in capsys.readouterr().out) == said


def test_one_model_alone(capsys) -> None:
    assert main(["measure", NET, "--input", "2", "3", "8", "8", "--layers", "--repeats", "1"]) == 0
    out = capsys.readouterr().out
    assert "pruned" not in out
    assert "ReLU" in out
    assert "times" not in out.partition("limit:")[0].partition("of limit")[0]


def test_a_pruned_file_says_what_it_was_made_of(capsys) -> None:
    main(["prune", "dense.pt", *MODEL, "--arg", "classes=3"])
    capsys.readouterr()
    said = refused(capsys, "measure", "pruned.pt")
    assert f"It was pruned with: --model {NET} --arg classes=3" in said


def test_a_checkpoint_of_a_recipe(capsys, trained) -> None:
    assert main(["measure", "dense.ckpt", "--config", "task.yaml", "--repeats", "1"]) == 0
    assert "pruned" not in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no:UserWarning")
def test_a_lightning_checkpoint_of_a_pruned_run_is_compared_with_its_dense_model(capsys) -> None:
    task = ClassificationTask(tiny_net(), num_classes=3, input_size=(3, 8, 8))
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=1, callbacks=[lp.PruneCallback("l1", 0.25)], enable_model_summary=False, **options)
    trainer.fit(task, TinyData())
    trainer.save_checkpoint("run.ckpt")
    capsys.readouterr()
    assert main(["measure", "run.ckpt", "--config", "task.yaml", "--repeats", "1"]) == 0
    macs = lp.measure.count_flops(tiny_net(), torch.rand(1, 3, 8, 8)) / lp.measure.count_flops(
        task, torch.rand(1, 3, 8, 8)
    )
    assert f"{macs:.2f}{TIMES}" in capsys.readouterr().out


# --- export


@pytest.mark.parametrize(("format", "name"), [("onnx", "net.onnx"), ("torch_export", "net.pt2")])
def test_a_pruned_checkpoint_is_exported(capsys, format, name) -> None:
    main(["prune", "dense.pt", *MODEL])
    capsys.readouterr()
    argv = ["export", "pruned.pt", "--model", NET, "--format", format, "--out", name, "--dynamic-batch"]
    assert main([*argv, "--repeats", "2"]) == 0
    out = capsys.readouterr().out
    small, images = tiny_net(), torch.rand(5, 3, 8, 8)
    lp.load("pruned.pt", small)
    (found,) = tensors_in(load_exported(name)(images))
    torch.testing.assert_close(found, small.eval()(images), atol=1e-6, rtol=1e-5)
    assert re.search(r"same outputs: max relative error \d\.\de[-+]\d\d at batch size 1 and 2", out)
    assert {"onnx": "ONNX Runtime", "torch_export": "torch.export"}[format] in out


def test_a_recipe_is_exported_too(capsys, trained) -> None:
    argv = ["export", "dense.ckpt", "--config", "task.yaml", "--format", "torch_export", "--out", "task.pt2"]
    assert main([*argv, "--repeats", "1"]) == 0
    images = torch.rand(2, 3, 8, 8)
    program = torch.export.load("task.pt2").module()
    torch.testing.assert_close(program(images[:1]), trained.eval()(images[:1]))
