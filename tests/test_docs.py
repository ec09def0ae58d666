"""README.md and docs/ hold what they show: Python runs, YAML and command lines are understood, links lead somewhere.

All Python of a page runs in order in one namespace, as a reader would type it, with two batches an epoch. What a page
needs besides what it shows stands in the page itself, in comments that no reader sees: docs/site_building/blocks.py.
"""

from __future__ import annotations

import csv
import importlib.util
import itertools
import re
import shlex
from pathlib import Path

import pytest
import torch
from pytorch_lightning.loggers import CSVLogger
from site_building.blocks import BLOCK, Block, blocks_of, command_lines
from site_building.blocks import write_files as write_blocks
from torch import nn
from torchvision.models import get_model

import lightning_prune as lp
from lightning_prune import schedule
from lightning_prune.callbacks import PruneCallback
from lightning_prune.cli import COMMANDS, main
from lightning_prune.cli.recipes import recipe_paths
from lightning_prune.cli.training import build_task
from lightning_prune.measure import LatencyTable
from lightning_prune.plan import Plan
from tests.callbacks.helpers import Task, fit

ROOT = Path(__file__).parents[1]
PAGES = {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
# What the README shows comes true; other pages say it themselves, in comments.
AFTERWARDS = {
    "README.md": """
assert "max_rel_error" in printed
assert prune.reconstruction.lossless.passed
assert sum(p.numel() for p in fresh.parameters()) < 6e6
"""
}
ELSEWHERE = ("torchrun", "srun", "trap", "wait")  # need several GPUs or a batch system
THEIRS = (  # its exporter warns
    pytest.mark.ultralytics,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning"),
)


def blocks(page: str, *kinds: str, hidden: bool = False) -> list[Block]:
    found = blocks_of(page, PAGES[page].read_text("utf-8"))
    return [block for block in found if (hidden or not block.hidden) and block.kind in (kinds or (block.kind,))]


def commands(page: str) -> list[str]:
    """Every line of shell blocks, and every `lightning-prune ...` in the text."""
    lines = [line for block in blocks(page, "", "bash") for line in command_lines(block.text)]
    spans = re.findall(r"`([^`]+)`", BLOCK.sub("", PAGES[page].read_text("utf-8")))
    lines += [" ".join(span.split()) for span in spans if "lightning-prune " in span]
    return [line for line in lines if shlex.split(line, comments=True)]


ALL_COMMANDS = [(page, line) for page in PAGES for line in commands(page)]
YAML = [block for page in PAGES for block in blocks(page, "yaml")]
OTHERS = [block for page in PAGES for block in blocks(page, "python") if block.needs]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty one to work in, with what lies beside the pages on the path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def write_files(page: str) -> None:
    write_blocks(blocks(page))


# Nothing escapes


def test_all_pages_are_found() -> None:
    assert {"README.md", "docs/training.md", "docs/tracking.md", "docs/tasks.md", "docs/own-criterion.md"} <= set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_every_fence_and_every_command_of_a_page_is_one_that_is_checked(page: str) -> None:
    text = PAGES[page].read_text("utf-8")
    shown = blocks(page)
    assert len(re.findall(r"^\s*(?:```|~~~)", text, re.MULTILINE)) == 2 * len(shown)
    assert {block.kind for block in shown} <= {"python", "yaml", "bash", ""}
    assert page == "docs/results.md" or sum(block.kind == "python" for block in shown) >= 1
    assert text.count("<!-- python") == len(blocks(page, hidden=True)) - len(shown)
    called = re.findall(rf"lightning-prune (?:{'|'.join(COMMANDS)})\b", " ".join(text.split()))
    assert len(called) == sum("lightning-prune " in line for line in commands(page))


# Python


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")  # the examples share one folder
@pytest.mark.parametrize("page", [pytest.param(page, marks=THEIRS if "ultralytics" in page else ()) for page in PAGES])
def test_the_python_of_a_page_runs(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    if "ultralytics" in page:
        pytest.importorskip("ultralytics")
    small = {"limit_train_batches": 2, "limit_val_batches": 2, "limit_test_batches": 2, "log_every_n_steps": 1}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    for option, value in (small | quiet).items():  # of every Trainer that does not say otherwise
        monkeypatch.setenv(f"PL_TRAINER_{option.upper()}", str(value))
    monkeypatch.setenv("WANDB_MODE", "offline")
    namespace: dict[str, object] = {}
    for block in blocks(page, "python", hidden=True):
        if block.name:  # a file beside the page, or one that the reader writes
            beside = PAGES[page].with_name(block.name)
            Path(block.name).write_text(beside.read_text("utf-8") if beside.exists() else block.text, "utf-8")
            assert block.text == Path(block.name).read_text("utf-8")
        elif not block.needs:
            exec(compile("\n" * (block.line - 1) + block.text, str(PAGES[page]), "exec"), namespace)
    namespace["printed"] = capsys.readouterr().out
    exec(AFTERWARDS.get(page, ""), namespace)


@pytest.mark.parametrize("block", OTHERS, ids=[f"{block.page}:{block.line}" for block in OTHERS])
def test_a_block_runs_where_the_package_that_it_needs_is_installed(block: Block, folder: Path) -> None:
    pytest.importorskip(block.needs)
    exec(compile("\n" * (block.line - 1) + block.text, block.page, "exec"), {})


# Configurations and command lines


class Understood(BaseException):
    """A command has read all that it was given and starts to compute."""


def understood(words: list[str]) -> bool:
    """Whether a command gets as far as running a model, or to its end, on files of the model that it names."""

    def stop(*_: object, **__: object) -> None:
        raise Understood

    write_checkpoints(words)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "__call__", stop)
        try:
            return main(words) == 0
        except Understood:
            return True
        except SystemExit as end:
            return end.code == 0


def write_checkpoints(words: list[str]) -> None:
    """Of the dense model, under every name that a command line has for a checkpoint; a table, a plan, chosen ratios."""
    for before, word in itertools.pairwise(words):
        if before == "--latency-table":
            LatencyTable({}, engine="onnxruntime").save(word)
        if before == "--plan":
            Plan({}).save(word)
        if word.endswith("sensitivity/prune.yaml"):
            Path(word).parent.mkdir(parents=True, exist_ok=True)
            Path(word).write_text(recipe_paths()["prune/l1.yaml"].read_text("utf-8"), "utf-8")
    if words[0] == "channels":
        result = lp.prune(get_model("resnet18", weights=None), torch.zeros(1, 3, 32, 32))
        lp.save(words[1], result.model, result.plan)
        return
    files = [
        word for before, word in itertools.pairwise(words) if word.endswith((".pt", ".ckpt")) and before != "--out"
    ]
    if files:
        option, name = next(pair for pair in itertools.pairwise(words) if pair[0] in ("--config", "--model"))
        if option == "--config":
            model = build_task([option, name], "docs").task
        else:
            module, _, attribute = name.rpartition(".")
            model = getattr(importlib.import_module(module), attribute)() if module else get_model(name, weights=None)
        for file in files:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            torch.save({"state_dict": model.state_dict()}, file)


@pytest.mark.parametrize(("page", "line"), ALL_COMMANDS, ids=[f"{page}: {line[:60]}" for page, line in ALL_COMMANDS])
def test_a_command_line_is_understood(page: str, line: str, folder: Path) -> None:
    write_files(page)
    words = [word for word in shlex.split(line, comments=True) if not re.match(r"[A-Z_]+=", word)]
    if words[0] == "lightning-prune":
        assert understood(words[1:])
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    elif words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2])
    else:
        assert words[0] in ELSEWHERE


@pytest.mark.parametrize("block", YAML, ids=[f"{block.page}:{block.line}" for block in YAML])
def test_a_configuration_is_understood(block: Block, folder: Path) -> None:
    Path("shown.yaml").write_text(block.text, "utf-8")
    whole = re.search("^model:", block.text, re.MULTILINE)
    task = [] if whole else ["--config", "task/resnet18_digits"]
    assert understood(["fit", *task, "--config", "shown.yaml"])


@pytest.mark.parametrize(
    "line",
    [
        "fit --config task/resnet18_digits --trainer.max_epoch 1",
        "fit --config task/resnet18_digits --config prune/jr",
        "prune best.ckpt --config task/resnet18_digits --criterion jrr",
        "prune best.ckpt --config task/resnet18_digits --budget flop=0.5",
        "measure best.ckpt --config task/resnet18_digits --layer",
        "export best.ckpt --config task/resnet18_digits --format onn --out net.onnx",
        "compare --ratio 0.5",
        "experiment --config experiment/resnet18_digits_jre --rato 0.5",
        "recipe",
    ],
)
def test_a_command_line_that_is_wrong_is_not_understood(line: str, folder: Path, capsys) -> None:
    assert not understood(line.split())
    assert "error: " in capsys.readouterr().err


# The rest of the text


def test_there_are_configurations_and_command_lines() -> None:
    assert YAML
    assert {line.split()[1] for _, line in ALL_COMMANDS if line.startswith("lightning-prune")} >= {"fit", "prune"}


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#]+)", path.read_text("utf-8")):
        built = target.startswith(("made/", "reference/"))  # by the site, which refuses to be built without
        assert built or target.startswith("https://") or (path.parent / target).exists(), target


def test_the_moments_of_the_table_are_settings_of_the_callback() -> None:
    shown = re.findall(r"^\| `(\w+=.+?)` \|", PAGES["docs/training.md"].read_text("utf-8"), re.MULTILINE)
    settings = [eval(f"dict({code})", vars(schedule)) for code in shown]
    for setting in settings:
        assert PruneCallback("l1", **setting)
    assert {name for setting in settings for name in setting} == {"start", "update_weights", "schedule", "reconstruct"}


@pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval")
def test_what_the_tables_name_is_what_is_logged(folder: Path) -> None:
    numbers, _, files = PAGES["docs/tracking.md"].read_text("utf-8").partition("\n## Pictures")
    fit(Task(), PruneCallback("jre", 0.5), logger=CSVLogger(folder, name="", version=""))
    with Path("metrics.csv").open() as stream:
        columns = next(csv.reader(stream))
    assert set(re.findall(r"^\| `(prune/\w+)`", numbers, re.MULTILINE)) == {
        c for c in columns if c.startswith("prune/")
    }
    rows = re.findall(r"^\| `([\w/.]+)` \|.*\| (?:file|`(prune/.+)`) \|$", files, re.MULTILINE)
    assert {kept or f"prune/{name}" for name, kept in rows} == {
        f"prune/{path.name}" for path in Path("prune").iterdir()
    }
