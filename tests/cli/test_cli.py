"""The command line: dispatch, recipes by name, composition of configurations, and errors that help."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml
from pytorch_lightning import Callback, LightningDataModule
from pytorch_lightning.callbacks import LearningRateMonitor
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune.cli import COMMANDS, main
from lightning_prune.cli.options import PARSERS
from lightning_prune.cli.recipes import find_recipe, recipe_paths, resolve
from lightning_prune.cli.training import run_lightning
from lightning_prune.errors import PruningError, UnknownRecipeError


def tiny_net(num_classes: int = 3, width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))


class TinyData(LightningDataModule):
    def __init__(self, batch_size: int = 6, seed: int = 0):
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.rand(12, 3, 8, 8), torch.arange(12) % 3), self.batch_size)

    val_dataloader = test_dataloader = train_dataloader


class Ranking:
    """Stands in for a criterion."""


class Energy(Ranking):
    def __init__(self, alpha: float = 1.0):
        self.alpha = alpha


class Pruner(Callback):
    """Stands in for PruneCallback: the same kind of signature, a nested class among the arguments."""

    fits = 0

    def __init__(self, criterion: Ranking | str, ratio: float = 0.5):
        if not 0 <= ratio < 1:
            raise PruningError(f"ratio must lie in [0, 1), got {ratio}.")
        self.criterion, self.ratio = criterion, ratio

    def on_fit_start(self, trainer, pl_module):
        Pruner.fits += 1


def dense() -> dict:
    return {
        "trainer": {
            "max_epochs": 1,
            "accelerator": "cpu",
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [{"class_path": "pytorch_lightning.callbacks.LearningRateMonitor"}],
        },
        "model": {
            "class_path": "lightning_prune.tasks.ClassificationTask",
            "init_args": {
                "model": {"class_path": f"{__name__}.tiny_net", "init_args": {"num_classes": 3}},
                "num_classes": 3,
                "input_size": [3, 8, 8],
                "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
            },
        },
        "data": {"class_path": f"{__name__}.TinyData"},
    }


def prune() -> dict:
    arguments = {
        "criterion": {"class_path": f"{__name__}.Energy", "init_args": {"alpha": 0.3}},
        "ratio": 0.25,
    }
    return {"trainer": {"callbacks+": [{"class_path": f"{__name__}.Pruner", "init_args": arguments}]}}


@pytest.fixture
def configs(tmp_path, monkeypatch):
    """A working directory with dense.yaml and pruned.yaml; returns a function that rewrites one of them."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, content: dict) -> None:
        Path(name).write_text(yaml.safe_dump(content), encoding="utf-8")

    write("dense.yaml", dense())
    write("pruned.yaml", prune())
    return write


def fit_error(capsys, *options: str, files=("dense.yaml", "pruned.yaml")) -> str:
    """Standard error of a `fit` that must end with status 2."""
    with pytest.raises(SystemExit) as stop:
        main(["fit", *(word for name in files for word in ("--config", name)), *options])
    assert stop.value.code == 2
    return capsys.readouterr().err


# --- dispatch


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help_lists_every_command(capsys, argv):
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert all(name in out and summary in out for name, (summary, _) in COMMANDS.items())


def test_an_unknown_command_is_answered_with_the_closest(capsys):
    assert main(["fitt"]) == 2
    assert "Did you mean 'fit'?" in capsys.readouterr().err


def test_ctrl_c_ends_in_one_line(capsys, monkeypatch):
    def stop(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_prune.cli.recipes.show", stop)
    assert main(["recipes"]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


@pytest.mark.parametrize(
    ("signal", "said", "status"), [(KeyboardInterrupt, "interrupted", 130), (SIGTERMException, "terminated", 143)]
)
def test_a_signal_that_lightning_met_is_told_too(capsys, monkeypatch, signal, said: str, status: int) -> None:
    def stop(argv):
        try:
            raise signal
        except KeyboardInterrupt:  # as its Trainer does
            sys.exit(1)

    monkeypatch.setattr("lightning_prune.cli.recipes.show", stop)
    assert main(["recipes"]) == status
    assert capsys.readouterr().err == f"error: {said}\n"


def test_modules_beside_the_user_are_found_by_the_script(tmp_path):
    (tmp_path / "own.py").write_text("from torch import nn\n\ndef net():\n    return nn.Conv2d(3, 4, 1)\n")
    code = "import sys; sys.path.remove(''); from lightning_prune.cli import main; sys.exit(main())"
    argv = [sys.executable, "-c", code, "graph", "own.net"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "start", ["import lightning_prune", "from lightning_prune.cli import main; main(['--help']); main(['recipes'])"]
)
def test_the_package_its_help_and_the_recipes_start_without_torch(start):
    heavy = {"torch", "torchvision", "pytorch_lightning", "jsonargparse", "matplotlib", "numpy"}
    code = f"import sys; {start}; sys.exit(', '.join({heavy} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_recipes_lists_each_with_its_first_line(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")  # no terminal: nothing is wrapped, for grep
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, path in recipe_paths().items():
        description = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        (line,) = [line for line in lines if line.startswith(f"{name.removesuffix('.yaml')}  ")]
        assert line.endswith(f"  {description}")


def test_recipes_fit_a_terminal_of_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes the stream for a terminal
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in lines]
    assert max(map(len, shown)) <= 80
    assert len(shown) < 2.3 * len(recipe_paths())  # hardly any needs three lines


def test_recipes_takes_no_options(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["recipes", "jre"])
    assert stop.value.code == 2
    assert "unrecognized arguments: jre" in capsys.readouterr().err


def test_a_pruning_error_ends_with_its_message_and_no_traceback(configs, capsys):
    status = main(["fit", "--config", "dense.yaml", "--config", "pruned.yaml", "--trainer.callbacks.ratio", "2"])
    assert status == 1
    assert "error: ratio must lie in [0, 1), got 2.0." in capsys.readouterr().err


# --- recipes by name


def test_a_file_in_the_working_directory_wins_over_a_recipe(configs):
    Path("prune").mkdir()
    Path("prune/jre.yaml").write_text("seed_everything: 1\n", encoding="utf-8")
    assert find_recipe("prune/jre.yaml") == Path("prune/jre.yaml")
    assert find_recipe("prune/l1.yaml") == recipe_paths()["prune/l1.yaml"]
    assert find_recipe("prune/l1") == recipe_paths()["prune/l1.yaml"]


def test_an_unknown_recipe_is_answered_with_all_names(configs, capsys):
    with pytest.raises(UnknownRecipeError, match=r"Did you mean 'prune/jre\.yaml'"):
        find_recipe("prune/jrr.yaml")
    assert main(["fit", "--config", "prune/jrr.yaml"]) == 2
    err = capsys.readouterr().err
    assert all(name in err for name in recipe_paths())


@pytest.mark.parametrize("form", [["--config", "prune/l1"], ["--config=prune/l1"], ["-c", "prune/l1"]])
def test_resolve_replaces_only_the_values_of_config(configs, form):
    argv, stems = resolve([*form, "--trainer.max_epochs", "3", "prune/l1"])
    assert stems == ["l1"]
    assert argv[-3:] == ["--trainer.max_epochs", "3", "prune/l1"]
    assert argv[-4].endswith(str(recipe_paths()["prune/l1.yaml"]))


# --- composition


def test_a_prune_file_appends_its_callback(configs):
    Pruner.fits = 0
    cli = run_lightning("fit", ["--config", "dense.yaml", "--config", "pruned.yaml"])
    callbacks = cli.trainer.callbacks
    (pruner,) = (c for c in callbacks if isinstance(c, Pruner))
    assert any(isinstance(c, LearningRateMonitor) for c in callbacks)  # that of dense.yaml is still there
    assert isinstance(pruner.criterion, Energy)
    assert (pruner.criterion.alpha, pruner.ratio, Pruner.fits) == (0.3, 0.25, 1)
    assert cli.trainer.global_step == 2


def test_without_plus_the_list_is_replaced(configs):
    configs("pruned.yaml", {"trainer": {"callbacks": prune()["trainer"]["callbacks+"]}})
    cli = run_lightning("fit", ["--config", "dense.yaml", "--config", "pruned.yaml"])
    kinds = [type(c) for c in cli.trainer.callbacks]
    assert Pruner in kinds
    assert LearningRateMonitor not in kinds


def test_options_override_nested_values(configs):
    options = [
        "--trainer.callbacks.ratio",
        "0.7",
        "--model.optimizer.lr",
        "0.3",
        "--model.lr_scheduler=constant",
    ]
    cli = run_lightning("fit", ["--config", "dense.yaml", "--config", "pruned.yaml", *options])
    (pruner,) = (c for c in cli.trainer.callbacks if isinstance(c, Pruner))
    assert pruner.ratio == 0.7
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == 0.3


def test_a_torchvision_function_serves_as_model(configs):
    content = dense()
    content["model"]["init_args"]["model"] = {
        "class_path": "torchvision.models.resnet18",
        "init_args": {"num_classes": 3},
    }
    configs("dense.yaml", content)
    cli = run_lightning("fit", ["--config", "dense.yaml"])
    assert type(cli.model.model).__name__ == "ResNet"
    assert cli.model.model.fc.out_features == 3


def test_outputs_lie_in_one_folder_and_a_checkpoint_can_be_tested(configs):
    run_lightning("fit", ["--config", "dense.yaml", "--config", "pruned.yaml"])
    assert [p.name for p in Path("runs").iterdir()] == ["dense-pruned"]
    assert {p.name for p in Path("runs/dense-pruned/fit").iterdir()} == {
        "checkpoints",
        "config.yaml",
        "metrics.csv",
    }
    saved = yaml.safe_load(Path("runs/dense-pruned/fit/config.yaml").read_text(encoding="utf-8"))
    assert saved["seed_everything"] == 0
    assert len(saved["trainer"]["callbacks"]) == 2

    checkpoint = next(Path("runs/dense-pruned/fit/checkpoints").glob("*.ckpt"))
    assert main(["test", "--config", "dense.yaml", "--ckpt_path", str(checkpoint)]) == 0
    assert main(["validate", "--config", "dense.yaml", "--ckpt_path", str(checkpoint)]) == 0
    assert Path("runs/dense/test/metrics.csv").is_file()


# --- errors


def wrong(path: str, old: str, new: str) -> dict:
    """The dense or pruned content with one key renamed; `path` is the place of the key."""
    content = prune() if "callbacks+" in path else dense()
    place = content
    for key in filter(None, path.split("/")):
        place = place[int(key) if key.isdigit() else key]
    place[new] = place.pop(old)
    return content


@pytest.mark.parametrize(
    ("path", "old", "new", "shown", "valid"),
    [
        ("", "model", "modell", "modell", "data, model, seed_everything, trainer"),
        ("trainer", "max_epochs", "max_epoch", "trainer.max_epoch", "logger"),
        ("model/init_args", "num_classes", "nam_classes", "model.nam_classes", "label_smoothing"),
        (
            "model/init_args/model/init_args",
            "num_classes",
            "n_classes",
            "model.model.n_classes",
            "num_classes, width",
        ),
        ("model/init_args/optimizer/init_args", "lr", "lrr", "model.optimizer.lrr", "momentum"),
        ("trainer/callbacks+/0/init_args", "ratio", "ration", "trainer.callbacks.ration", "criterion, ratio"),
        (
            "trainer/callbacks+/0/init_args/criterion/init_args",
            "alpha",
            "alhpa",
            "trainer.callbacks.criterion.alhpa",
            "alpha",
        ),
    ],
)
def test_a_wrong_key_is_answered_with_path_and_choices(configs, capsys, path, old, new, shown, valid):
    configs("pruned.yaml" if "callbacks+" in path else "dense.yaml", wrong(path, old, new))
    err = fit_error(capsys)
    first, second, *original = err.strip().splitlines()
    assert first.startswith(f"error: '{shown}' is not accepted")
    assert first.endswith(f"Did you mean '{old}'?")
    assert second.startswith("  Valid here: ")
    assert valid in second
    assert "params" not in second.split(", ")  # what the task passes to the optimizer itself
    if original:  # the cause lies deeper than the command's own keys: jsonargparse's message follows as it is
        assert f"Option '{new}' is not accepted" in "\n".join(original)
        assert "Valid here" not in "\n".join(original)


@pytest.mark.parametrize(
    ("option", "shown"),
    [
        ("--trainer.max_epoch=3", "trainer.max_epoch"),
        ("--model.optimizer.lrr=3", "model.optimizer.lrr"),
        ("--trainer.callbacks.ration=0.1", "trainer.callbacks.ration"),
        ("--data.batchsize=2", "data.batchsize"),
    ],
)
def test_a_wrong_option_is_answered_alike(configs, capsys, option, shown):
    err = fit_error(capsys, option)
    assert err.startswith(f"error: '{shown}' is not accepted")
    assert "Valid here: " in err


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        (f"--model.model={__name__}.tiny_nt", "'tiny_net'"),
        ("--model=lightning_prune.tasks.ClassificationTsk", "'ClassificationTask'"),
        ("--trainer.callbacks=ModelCheckpont", "'ModelCheckpoint'"),
        ("--trainer.callbacks=lightning_prune.PruneCallbak", "'PruneCallback'"),  # a module that imports on demand
    ],
)
def test_a_wrong_class_is_answered_with_the_closest(configs, capsys, option, hint):
    assert f"Did you mean {hint}?" in fit_error(capsys, option)


def test_a_wrong_value_keeps_its_path(configs, capsys):
    err = fit_error(capsys, "--trainer.max_epochs=three")
    assert "trainer.max_epochs" in err
    assert "three" in err
    assert "usage:" not in err


def test_a_value_that_a_class_refuses_is_told_in_its_words(configs, capsys):
    assert main(["fit", "--config", "dense.yaml", "--model.label_smoothing=1.5"]) == 1
    assert capsys.readouterr().err.endswith("error: label_smoothing must lie in [0, 1), got 1.5.\n")


def test_fit_says_where_the_weights_are(configs, capsys):
    task = dense()
    task["trainer"]["callbacks"] = [{"class_path": "pytorch_lightning.callbacks.ModelCheckpoint"}]
    configs("dense.yaml", task)
    assert main(["fit", "--config", "dense.yaml"]) == 0
    (said,) = re.findall(r"^checkpoint: (.+)$", capsys.readouterr().out, re.MULTILINE)
    assert Path(said).is_file()
    assert not Path(said).is_absolute()


@pytest.mark.parametrize("command", COMMANDS)
def test_how_a_command_is_used_fits_a_terminal(command: str, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with suppress(SystemExit):
        main([command, "--help"])
    usage = capsys.readouterr().out.partition("\n\n")[0]
    assert usage.startswith(f"usage: lightning-prune {command}")
    assert len(usage.splitlines()) < 8
    assert max(map(len, usage.splitlines())) <= 80


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "recipes"])
def test_help_fits_a_terminal(command: str, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with suppress(SystemExit):
        main([command, "--help"])
    out = capsys.readouterr().out
    assert not [line for line in out.splitlines() if len(line) > 80]
    assert not [line for line in out.splitlines() if line[:1].strip() and "``" in line]  # titles


def test_compare_lists_its_defaults_and_takes_a_configuration(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with suppress(SystemExit):
        main(["compare", "--help"])
    out = capsys.readouterr().out
    assert "names; default: l1,l2,fpgm,taylor,jre" in out
    assert "--config TASK" in out
    asked = PARSERS["compare"](["--model.lr", "1", "-c", "a.yaml", "--config=b.yaml"])
    assert asked.fit_options == ["--config", "a.yaml", "--config", "b.yaml", "--model.lr", "1"]


@pytest.mark.skipif(sys.platform == "win32", reason="its pipes do not tell")
@pytest.mark.parametrize("command", ["recipes", "--help", "--version", "prune --help"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_who_leaves_is_no_error(command: str, unbuffered: str) -> None:
    code = f"import sys; from lightning_prune.cli import main; sys.argv[1:] = {command.split()}; sys.exit(main())"
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        asked = {"stdout": pipe, "stderr": subprocess.PIPE, "env": environment}
        done = subprocess.run([sys.executable, "-c", code], check=False, **asked)
    assert done.stderr == b""
    assert done.returncode == 141 or (unbuffered and "prune" in command)  # argparse itself looks away


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device")
@pytest.mark.parametrize("command", ["recipes", "--version"])
def test_output_that_finds_no_room_ends_in_one_line(command: str) -> None:
    code = f"import sys; from lightning_prune.cli import main; sys.argv[1:] = ['{command}']; sys.exit(main())"
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run([sys.executable, "-c", code], check=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert re.fullmatch(rb"error: cannot write .*No space left on device.*\n", done.stderr)


@pytest.mark.parametrize("words", [[], ["--trainer.max_epochs", "3"]])
def test_without_a_task_it_is_said_how_one_is_given(words: list[str], capsys) -> None:
    with pytest.raises(SystemExit):
        main(["fit", *words])
    assert "no task is given: --config TASK.yaml" in capsys.readouterr().err
