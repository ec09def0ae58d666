"""The epochs benchmark measures what it says, what says most first, and its table tells launch-bound rows."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from benchmarks import epochs
from benchmarks.epochs import Block, measure
from benchmarks.epochs_table import launch_bound, render
from lightning_prune.models.cifar import BasicBlock, CifarResNet


@pytest.fixture
def tiny(monkeypatch):
    """A net of that name, small enough for a test."""
    made = []

    def build(max_pool: bool) -> nn.Module:
        model = CifarResNet(BasicBlock, (1, 1, 1, 1), max_pool=max_pool)
        for name in ("layer2", "layer3", "layer4"):
            setattr(model, name, nn.Identity())
        model.fc = nn.Linear(64, 10)
        made.append(model)
        return model

    monkeypatch.setattr(epochs.models, "tiny", build, raising=False)
    for cached in (epochs._dense, epochs._plan, epochs._costs):
        cached.cache_clear()
    return made


def options(extra: str = ""):
    return epochs._options(f"--device cpu --images 8 --repeats 2 {extra}".split())


def test_every_model_trains_whole_epochs_in_train_mode(tiny):
    block = Block("tiny", 4, "eager", (("dense", 0.0), ("reconstructed", 0.5), ("masked", 0.5)))
    dense, small, masked = measure(block, options())
    assert not any("error" in row for row in (dense, small, masked))
    assert all(row["steps"] == len(row["seconds"]) == 2 and row["images_per_second"] > 0 for row in (dense, small))
    assert 3 < dense["flops"] / small["flops"] < 4
    assert dense["flops"] == masked["flops"]
    assert dense["operators"] == small["operators"] < masked["operators"]
    assert int(tiny[0].bn1.num_batches_tracked) == 0  # every model is a copy


def test_a_batch_norm_in_eval_mode_is_an_error(tiny):
    model = epochs._dense("tiny", True)
    model.layer1[0].bn1.eval()
    (row,) = measure(Block("tiny", 4, "eager", (("dense", 0.0),)), options())
    assert row["error"] == "AssertionError: a batch norm was not in train mode"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it works")
def test_what_fails_is_a_row_too(tiny, tmp_path, monkeypatch, capsys):
    block = Block("tiny", 4, "graph", (("dense", 0.0),))
    monkeypatch.setattr(epochs, "blocks", lambda _: [block, block])
    out = tmp_path / "rows.jsonl"
    epochs.main(f"--device cpu --images 8 --repeats 1 --out {out}".split())
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert ["error" in row for row in rows] == [True, True]
    capsys.readouterr()
    epochs.main(["--render", str(out)])
    assert capsys.readouterr().out.count("| tiny | 4 | graph | dense |") == 1  # the later one


def test_the_most_telling_blocks_come_first():
    found = list(epochs.blocks(epochs._options([])))
    assert [block[:3] for block in found[:4]] == [
        ("resnet18", 512, "eager"),
        ("resnet34", 512, "eager"),
        ("resnet50", 512, "eager"),
        ("resnet18", 128, "eager"),
    ]
    kinds = [("dense", 0.0), ("reconstructed", 0.5), ("reconstructed", 0.8), ("masked", 0.5), ("masked", 0.8)]
    assert list(found[0].kinds) == kinds
    assert {block.batch for block in found} == {128, 256, 512, 1024, 2048}
    assert len({block[:3] for block in found[:-9]}) == 3 * 4 * 5 == len(found) - 9
    assert all(dict(block.kinds).keys() == {"masked"} for block in found[-9:])


def rows(times: dict[int, float], model: str = "dense", flops: int = 8) -> list[dict[str, object]]:
    same = {"device": "H", "torch": "2", "precision": "bf16", "max_pool": True, "round_to": 1, "net": "resnet18"}
    own = {"engine": "eager", "model": model, "ratio": 0.0 if model == "dense" else 0.5, "flops": flops, "operators": 9}
    return [
        {**same, **own, "batch": batch, "step_ms": ms, "images_per_second": 1000 * batch / ms}
        for batch, ms in times.items()
    ]


def test_launch_bound_is_what_takes_as_long_whatever_the_batch():
    measured = rows({128: 10.0, 512: 15.0, 2048: 50.0}) + rows({128: 10.0, 512: 10.0, 2048: 11.0}, "reconstructed")
    expected = [True, True, False, True, True, True]
    assert [launch_bound(row, measured) for row in measured] == expected
    assert launch_bound(measured[0], rows({128: 1.0})) is None


def test_the_table_sets_every_model_beside_the_dense_one():
    broken = {**rows({512: 1.0}, "masked")[0], "error": "RuntimeError: a|b"}
    del broken["step_ms"]
    small = {**rows({512: 5.0}, "reconstructed", 2)[0], "kernels": 300, "busy": 0.456}
    lines = render([*rows({512: 20.0}), small, broken]).splitlines()
    assert "## H, bf16" in lines
    assert lines[-3:] == [
        "| resnet18 | 512 | eager | dense | 25,600 | 20.00 | 1.00 | 1.00 | 9 |  |  |  |",
        "| resnet18 | 512 | eager | masked 0.5 | RuntimeError: a\\|b |  |  |  |  |  |  |  |",
        "| resnet18 | 512 | eager | reconstructed 0.5 | 102,400 | 5.00 | 4.00 | 4.00 | 9 | 300 | 46% |  |",
    ]
