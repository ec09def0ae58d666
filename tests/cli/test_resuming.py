"""`--ckpt_path` is read and judged before a run writes; runs do not overwrite one another; rows are not lost."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest
import torch
import yaml

from lightning_prune.cli import main
from lightning_prune.cli.training import run_lightning
from tests.cli.tiny import NET, TinyData, refused, tiny_net

FIT = ["fit", "--config", "task.yaml"]


class Data(TinyData):
    def val_dataloader(self):
        return self.train_dataloader()

    test_dataloader = val_dataloader


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = {
        "trainer": {
            "max_epochs": 2,
            "accelerator": "cpu",
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [
                {"class_path": "pytorch_lightning.callbacks.ModelCheckpoint", "init_args": {"save_last": True}}
            ],
        },
        "model": {
            "class_path": "lightning_prune.tasks.ClassificationTask",
            "init_args": {"model": {"class_path": NET}, "num_classes": 3, "input_size": [3, 8, 8]},
        },
        "data": {"class_path": f"{__name__}.Data"},
    }
    Path("task.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")


@pytest.fixture
def run(recipe) -> dict[Path, bytes]:
    """All that a first run has written."""
    assert main(FIT) == 0
    return content()


def content() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}


def rows(folder: str) -> list[dict[str, str]]:
    with Path("runs/task", folder, "metrics.csv").open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize("begun", [False, True], ids=["the new file is not there", "it has no rows yet"])
def test_rows_that_a_kill_has_left_on_their_way_are_taken_over(run, begun: bool) -> None:
    before, path = rows("fit"), Path("runs/task/fit/metrics.csv")
    path.rename(path.with_name("metrics.csv.before"))
    if begun:
        path.touch()
    assert main([*FIT, "--ckpt_path", "last", "--trainer.max_epochs", "3"]) == 0
    assert [row["step"] for row in rows("fit")][: len(before)] == [row["step"] for row in before]
    assert not path.with_name("metrics.csv.before").exists()


def test_a_pruned_run_goes_on_with_the_recipe_that_pruned_it(recipe, capsys) -> None:
    content = yaml.safe_load(Path("task.yaml").read_text(encoding="utf-8"))
    prune = {"criterion": {"class_path": "lightning_prune.L1"}, "track": False}
    content["trainer"]["callbacks"].append({"class_path": "lightning_prune.PruneCallback", "init_args": prune})
    Path("pruning.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    assert main(["fit", "--config", "pruning.yaml"]) == 0
    assert main(["fit", "--config", "pruning.yaml", "--ckpt_path", "last", "--trainer.max_epochs", "3"]) == 0
    last = torch.load("runs/pruning/fit/checkpoints/last.ckpt", weights_only=True)
    assert last["epoch"] == 2
    assert last["state_dict"]["model.0.weight"].shape[0] < 16
    assert main([*FIT, "--ckpt_path", "runs/pruning/fit/checkpoints/last.ckpt"]) == 1
    assert "is of a run that pruned" in capsys.readouterr().err


class Trap:
    def __reduce__(self):
        return os.mkdir, ("trap",)


def bad(kind: str) -> None:
    last = torch.load("runs/task/fit/checkpoints/last.ckpt", weights_only=True)
    state = last["state_dict"]
    if kind == "other shapes":
        state["model.0.weight"] = torch.zeros(8, 3, 3, 3)
    elif kind == "other names":
        state["model.9.weight"] = state.pop("model.0.weight")
    elif kind == "nan":
        state["model.0.weight"][0] = torch.nan
    elif kind == "damaged":
        last["loops"] = [1]
    elif kind == "damaged state":
        last["state_dict"] = {"model.0.weight": 3}
    elif kind == "weights":
        last = state
    torch.save({**last, "hyper_parameters": Trap()} if kind == "code" else last, "bad.ckpt")
    if kind == "cut short":
        Path("bad.ckpt").write_bytes(Path("bad.ckpt").read_bytes()[:-500])


SAID = {
    "code": "it holds posix.mkdir, and reading that would run code from the file",
    "cut short": "bad.ckpt cannot be read: damaged, cut short",
    "other shapes": "'model.0.weight' is [8, 3, 3, 3] in the file and [16, 3, 3, 3] in the model",
    "other names": "belongs to another model: 1 missing (model.0.weight), 1 unexpected (model.9.weight)",
    "nan": "holds NaN in 1 of ",
    "damaged": "'loops' is a list in it",
    "damaged state": "belongs to another model",
    "weights": "holds weights without the state of a training",
    "best": "which one is best only the run knows",
    "hpc": "of which run is not said",
}


@pytest.mark.parametrize("kind", SAID)
def test_a_bad_checkpoint_is_refused_and_the_earlier_run_is_whole(run, capsys, kind: str) -> None:
    bad(kind)
    capsys.readouterr()
    path = kind if kind in ("best", "hpc") else "bad.ckpt"
    assert SAID[kind] in refused(capsys, *FIT, "--ckpt_path", path)
    if kind not in ("damaged", "weights"):  # which validation does not look at
        assert SAID[kind] in refused(capsys, "validate", "--config", "task.yaml", "--ckpt_path", path)
    assert content() == run
    assert sorted(path.name for path in Path("runs/task").iterdir()) == ["fit"]
    assert not Path("trap").exists()


def test_a_second_run_leaves_the_first_whole_and_says_where_it_is(run, capsys) -> None:
    capsys.readouterr()
    assert main([*FIT, "--seed_everything", "1"]) == 0
    out = capsys.readouterr().out
    assert "runs/task/fit holds an earlier run, which stays: this one is in runs/task/fit-2\n" in out
    assert f"checkpoint: {Path('runs/task/fit-2')}" in out
    after = content()
    assert {path: after[path] for path in run} == run
    assert {path.relative_to("runs/task/fit-2") for path in after if "fit-2" in path.parts} == {
        path.relative_to("runs/task/fit") for path in run
    }


@pytest.mark.parametrize("path", ["last", "runs/task/fit/checkpoints/last.ckpt"])
def test_a_run_that_goes_on_keeps_its_rows(run, path: str) -> None:
    before = rows("fit")
    assert main([*FIT, "--ckpt_path", path, "--trainer.max_epochs", "4"]) == 0
    assert {path.name for path in Path("runs/task").iterdir()} == {"fit"}
    assert {path.name for path in Path("runs/task/fit").iterdir()} == {
        "checkpoints",
        "config.yaml",
        "config-2.yaml",
        "metrics.csv",
    }
    check_rows(before, rows("fit"))
    assert Path("runs/task/fit/config.yaml").read_bytes() == run[Path("runs/task/fit/config.yaml")]


def test_a_run_that_prunes_goes_on(recipe) -> None:
    task = yaml.safe_load(Path("task.yaml").read_text(encoding="utf-8"))
    prune = {"class_path": "lightning_prune.PruneCallback", "init_args": {"criterion": "l1", "ratio": 0.5}}
    task["trainer"]["callbacks"].append(prune)
    Path("task.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    assert main(FIT) == 0
    assert main([*FIT, "--ckpt_path", "last", "--trainer.max_epochs", "3"]) == 0
    assert {path.name for path in Path("runs/task").iterdir()} == {"fit"}
    last = torch.load("runs/task/fit/checkpoints/last.ckpt", weights_only=True)
    assert last["epoch"] == 2
    assert len(last["state_dict"]["model.0.weight"]) < 16


def test_what_slurm_requeues_is_kept_with_its_run(recipe) -> None:
    """Lightning saves to, and goes on from, `default_root_dir` there, whatever run it is of."""
    trainer = run_lightning("fit", FIT[1:]).trainer
    assert Path(trainer.default_root_dir).absolute() == Path("runs/task/fit").absolute()


def check_rows(before, after) -> None:
    assert after[: len(before)] == before
    assert [row["step"] for row in after if row["train_loss"]] == ["1", "3", "5", "7"]
    assert [row["epoch"] for row in after if row["val_loss"]] == ["0", "1", "2", "3"]


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # true, and for the user to know
def test_from_an_earlier_checkpoint_a_new_run_begins_with_its_rows(run) -> None:
    before = rows("fit")
    saved = next(Path("runs/task/fit/checkpoints").glob("epoch=*.ckpt"))
    assert main([*FIT, "--ckpt_path", str(saved), "--trainer.max_epochs", "4"]) == 0
    check_rows(before, rows("fit-2"))
    after = content()
    assert {path: after[path] for path in run} == run


def test_a_folder_that_was_named_and_is_in_use_is_refused(run, capsys) -> None:
    assert main([*FIT, "--trainer.logger.init_args.version", "mine"]) == 0
    before = content()
    capsys.readouterr()
    said = refused(capsys, *FIT, "--trainer.logger.init_args.version", "mine")
    assert f"{Path('runs/task/fit/mine')} holds the metrics.csv of an earlier run" in said
    assert content() == before


def test_a_printed_configuration_runs_as_often_as_one_likes(recipe, capsys) -> None:
    with pytest.raises(SystemExit):
        main([*FIT, "--print_config"])
    Path("printed.yaml").write_text(capsys.readouterr().out, encoding="utf-8")
    for command in ("fit", "validate", "validate"):
        assert main([command, "--config", "printed.yaml"]) == 0
    assert {path.as_posix() for path in Path("runs").glob("*/*")} == {
        f"runs/task/{folder}" for folder in ("fit", "validate", "validate-2")
    }


def test_without_a_logger_configurations_lie_side_by_side(recipe) -> None:
    for _ in range(2):
        assert main([*FIT, "--trainer.logger", "false", "--trainer.max_epochs", "1"]) == 0
    assert {path.name for path in Path("runs").glob("*.yaml")} == {"config.yaml", "config-2.yaml"}


def test_a_configuration_is_whole_or_not_there(recipe, monkeypatch, capsys) -> None:
    def full_disk(parser: object, config: object, path: str, **options: object) -> None:
        Path(path).write_text("seed_ever", encoding="utf-8")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("pytorch_lightning.cli.LightningArgumentParser.save", full_disk)
    assert "No space left on device" in refused(capsys, *FIT)
    assert not list(Path("runs").rglob("config*.yaml"))


def test_pruned_files_and_weights_are_validated_and_tested_too(recipe, capsys) -> None:
    torch.save(tiny_net().state_dict(), "dense.pt")
    assert main(["prune", "dense.pt", "--config", "task.yaml", "--out", "small.pt"]) == 0
    for file in ("dense.pt", "small.pt"):
        assert main(["test", "--config", "task.yaml", "--ckpt_path", file]) == 0
    assert "start from these weights by --weights small.pt" in refused(capsys, *FIT, "--ckpt_path", "small.pt")


@pytest.mark.parametrize("file", ["dense.pt", "runs/task/fit/checkpoints/last.ckpt"])
def test_training_starts_from_weights(run, capsys, file: str) -> None:
    torch.save({name: value + 1 for name, value in tiny_net().state_dict().items()}, "dense.pt")
    state = torch.load(file, weights_only=True)
    expected = state.get("state_dict", {f"model.{name}": value for name, value in state.items()})
    found = run_lightning("fit", [*FIT[1:], "--weights", file, "--trainer.limit_train_batches", "0"]).model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    found = run_lightning("test", [*FIT[1:], "--weights", file]).model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    resumed = ["--weights", "dense.pt", "--ckpt_path", "last", "--trainer.max_epochs", "2"]  # nothing is left to do
    found = run_lightning("fit", [*FIT[1:], *resumed]).model.state_dict()
    last = torch.load("runs/task/fit/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(found[name], value) for name, value in last.items())


def test_weights_that_training_cannot_start_from_are_refused(recipe, capsys) -> None:
    torch.save(tiny_net().state_dict(), "dense.pt")
    assert main(["prune", "dense.pt", "--config", "task.yaml", "--out", "small.pt"]) == 0
    said = refused(capsys, *FIT, "--config", "prune/l1", "--weights", "small.pt")
    assert "small.pt is pruned already: leave out the recipe that prunes" in said
    assert "there is no file nowhere.pt" in refused(capsys, *FIT, "--weights", "nowhere.pt")
    torch.save({"other": torch.ones(1)}, "other.pt")
    assert "other.pt" in refused(capsys, *FIT, "--weights", "other.pt")
    assert not Path("runs").exists()
    for key in ("--weights", "--ckpt_path"):
        said = refused(capsys, "prune", "dense.pt", "--config", "task.yaml", key, "dense.pt")
        assert f"unrecognized arguments: {key}" in said


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_pruned_file_is_fine_tuned_resumed_and_evaluated(recipe) -> None:
    torch.save(tiny_net().state_dict(), "dense.pt")
    assert main(["prune", "dense.pt", "--config", "task.yaml", "--out", "small.pt"]) == 0
    whole = run_lightning("fit", [*FIT[1:], "--weights", "small.pt", "--trainer.max_epochs", "3"]).model.state_dict()
    assert len(whole["model.0.weight"]) < 16
    # Killed after its second epoch, as it were
    saving = ["--trainer.callbacks.init_args.every_n_epochs", "2", "--trainer.callbacks.init_args.save_top_k", "-1"]
    assert main([*FIT, *saving, "--weights", "small.pt", "--trainer.max_epochs", "3"]) == 0
    half = next(Path("runs/task/fit-2/checkpoints").glob("epoch=1-*.ckpt"))
    options = [*FIT[1:], *saving, "--ckpt_path", str(half), "--trainer.max_epochs", "3"]
    resumed = run_lightning("fit", options).model.state_dict()
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    last = "runs/task/fit/checkpoints/last.ckpt"
    for command in ("test", "validate"):
        found = run_lightning(command, [*FIT[1:], "--ckpt_path", last]).model.state_dict()
        assert all(torch.equal(found[name], value) for name, value in whole.items())
    assert main(["measure", last, "--config", "task.yaml", "--repeats", "1"]) == 0


def test_a_pruned_file_of_the_network_alone_is_taken_too(recipe) -> None:
    torch.save({name.removeprefix("model."): value for name, value in tiny_net().state_dict().items()}, "net.pt")
    options = ["--model", NET, "--input", "1", "3", "8", "8", "--out", "net-small.pt"]
    assert main(["prune", "net.pt", *options]) == 0
    assert main([*FIT, "--weights", "net-small.pt"]) == 0
    for file in ("net-small.pt", "runs/task/fit/checkpoints/last.ckpt"):
        assert main(["test", "--config", "task.yaml", "--ckpt_path", file]) == 0


def test_the_configuration_of_a_run_serves_every_command(run) -> None:
    saved, dense = "runs/task/fit/config.yaml", "runs/task/fit/checkpoints/last.ckpt"
    assert main(["prune", dense, "--config", saved, "--out", "small.pt"]) == 0
    assert main(["test", "--config", saved, "--ckpt_path", "small.pt"]) == 0
    assert main(["fit", "--config", saved, "--weights", dense]) == 0
    assert Path("runs/task/fit-2/metrics.csv").is_file()  # a run of the same name, beside the first
    again = yaml.safe_load(Path("runs/task/fit-2/config.yaml").read_text("utf-8"))
    assert again.pop("weights") == dense
    first = yaml.safe_load(Path(saved).read_text("utf-8"))
    assert again == {name: value for name, value in first.items() if name != "weights"}
    assert not {"logger", "default_root_dir"} & first["trainer"].keys()
    Path("others.yaml").write_text(yaml.safe_dump({**first, "ckpt_path": None}), "utf-8")  # as LightningCLI saves it
    assert main(["prune", dense, "--config", "others.yaml", "--out", "again.pt"]) == 0
