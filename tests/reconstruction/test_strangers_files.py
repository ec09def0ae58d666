"""Weights as people have them load or are named with the remedy; a pruned file is checked before the model changes."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import lightning_prune as lp
from lightning_prune.errors import CheckpointError
from lightning_prune.reconstruction.checkpoint import load, load_dense, save
from lightning_prune.reconstruction.state_dicts import digest_of


def dense(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    body = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1)]
    return nn.Sequential(*body).eval()


def prefixed(prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in dense().state_dict().items()}


def untouched(model: nn.Module, before: dict[str, Tensor]) -> bool:
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[name], value) for name, value in before.items())


def in_training(name: str) -> dict[str, Any]:
    """What a training script saves, its model under this name."""
    optimizer = torch.optim.Adam((model := dense()).parameters())
    model(torch.rand(1, 3, 8, 8)).sum().backward()
    optimizer.step()
    return {
        name: dense().state_dict(),
        "optimizer": optimizer.state_dict(),
        "optimizers": {"body": optimizer.state_dict()},
        "by_name": {"state": {"0.weight": {"exp_avg": model[0].weight.detach()}}, "param_groups": [{"lr": 0.1}]},
        "scaler": {"scale": 65536.0, "_growth_tracker": 0},
        "metrics": {"acc": torch.tensor(0.9), "loss": torch.tensor(0.1)},
        "normalisation": {"mean": torch.rand(3), "std": torch.rand(3)},
        "best": torch.tensor(0.9),
    }


FORMS = {
    "plain": lambda: dense().state_dict(),
    "parallel": lambda: nn.DataParallel(dense()).state_dict(),
    "compiled": lambda: torch.compile(dense()).state_dict(),
    "compiled inside parallel": lambda: prefixed("module._orig_mod."),
    "averaged": lambda: AveragedModel(dense()).state_dict(),
    "of a task": lambda: {"state_dict": prefixed("model."), "epoch": 3},
    "of a task with net": lambda: {"state_dict": prefixed("net.")},
    "under model": lambda: {"model": dense().state_dict(), "optimizer": {"state": {}}, "epoch": 3},
    "under model and state_dict": lambda: {"model": {"state_dict": prefixed("module.")}},
    "under model_state_dict": lambda: {"model_state_dict": dense().state_dict(), "loss": 0.1},
    "under another name": lambda: {"ema": dense().state_dict(), "epoch": 3},
    "beside a random state": lambda: {"net": dense().state_dict(), "rng": torch.get_rng_state()},
    "beside what a training keeps": lambda: in_training("model_ema"),
    "of Lightning, beside an average": lambda: {
        "pytorch-lightning_version": "2.6.0",
        "state_dict": prefixed("model."),
        "average": dense(seed=2).state_dict(),
    },
    "parameters": lambda: dict(dense().state_dict(keep_vars=True)),
}


@pytest.mark.parametrize("form", FORMS)
def test_state_dicts_as_people_have_them_are_loaded(tmp_path: Path, form: str) -> None:
    torch.save(FORMS[form](), tmp_path / "weights.pt")
    load_dense(tmp_path / "weights.pt", model := dense(seed=1))
    assert untouched(model, dense().state_dict())


def test_weights_of_the_network_are_loaded_into_the_task_around_it(tmp_path: Path) -> None:
    torch.save(dense().state_dict(), tmp_path / "weights.pt")
    task = nn.ModuleDict({"model": dense(seed=1)})
    load_dense(tmp_path / "weights.pt", task)
    assert untouched(task["model"], dense().state_dict())


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_safetensors_are_loaded_whatever_they_are_called(tmp_path: Path, suffix: str) -> None:
    save_file(prefixed("module."), path := tmp_path / f"weights{suffix}")
    load_dense(path, model := dense(seed=1))
    assert untouched(model, dense().state_dict())
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match=r"is no safetensors file, or a damaged one: SafetensorError"):
        load_dense(path, model)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_loaded(tmp_path: Path, kind: torch.dtype) -> None:
    torch.save(dense().to(kind).state_dict(), tmp_path / "weights.pt")
    load_dense(tmp_path / "weights.pt", model := dense(seed=1))
    assert model[0].weight.dtype == torch.float32
    assert torch.equal(model[0].weight, dense().to(kind)[0].weight.float())


def wrong(change) -> dict[str, Tensor]:
    state = dense().state_dict()
    change(state)
    return state


REFUSED = {
    "integers": (lambda: wrong(lambda s: s.update({"0.bias": torch.ones(8, dtype=torch.int64)})), "'0.bias' is int64"),
    "complex": (
        lambda: wrong(lambda s: s.update({"0.bias": torch.ones(8) + 0j})),
        "is complex64 in the file",
    ),
    "meta": (lambda: wrong(lambda s: s.update({"0.bias": torch.ones(8, device="meta")})), "'0.bias' is without values"),
    "nan": (
        lambda: wrong(lambda s: s["3.weight"][0, 0].fill_(torch.nan)),
        r"holds NaN in 1 of 11 \w+ \(3.weight\)",
    ),
    "vast": (
        lambda: wrong(lambda s: s.update({"0.bias": torch.zeros(1).expand(4_000_000_000_000)})),
        r"'0.bias' is \[4000000000000\] in the file and \[8\]",
    ),
    "two": (
        lambda: {"ema": dense().state_dict(), "model": dense().state_dict(), "optimizer": {"state": {}}},
        r"holds 2 state dicts, \['ema'\], \['model'\], and does not say which is the model; save the one that you mean",
    ),
    "two of one form": (
        lambda: {"model": {"state_dict": dense().state_dict()}, "state_dict_ema": dense().state_dict()},
        r"torch.load\('.*weights.pt', map_location='cpu'\)\['model'\]\['state_dict'\], 'weights.pt'\)",
    ),
    "of an optimizer": (lambda: {"optimizer": in_training("model")["optimizer"]}, "no state dict, but optimizer"),
    "with states of modules": (
        lambda: {"model": wrong(lambda s: s.update({f"{name}._extra_state": None for name in s}))},
        r"11 unexpected \(0.bias._extra_state, ",
    ),
    "nowhere": (lambda: {"model": {"epoch": 3}}, "holds no state dict, but model; save the model's"),
    "a list": (lambda: [torch.ones(1)], "holds a list"),
    "with more": (
        lambda: {"state_dict": {"loss.weight": torch.ones(3), **prefixed("model.")}},
        "its names have 'model.' in front, beside loss.weight; it is of the whole task",
    ),
    "of another": (lambda: nn.Linear(1, 1).state_dict(), r"belongs to another model: 11 missing \("),
    "halfway": (lambda: {**prefixed("mod"), "x": torch.ones(1)}, r"belongs to another model: 11 missing"),
}


def test_what_the_refusal_of_two_says_saves_one(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"ema": dense(seed=2).state_dict(), "model": dense().state_dict()}, "run.pt")
    with pytest.raises(CheckpointError, match=r"with the first: torch.save") as caught:
        load_dense("run.pt", dense())
    line = str(caught.value).partition("with the first: ")[2].replace("'ema'", "'model'")
    exec(line, {"torch": torch})
    load_dense("weights.pt", model := dense(seed=1))
    assert untouched(model, dense().state_dict())


@pytest.mark.parametrize("kind", REFUSED)
def test_others_are_refused_and_the_model_is_as_it_was(tmp_path: Path, kind: str) -> None:
    content, said = REFUSED[kind]
    torch.save(content(), tmp_path / "weights.pt")
    before = copy.deepcopy((model := dense(seed=1)).state_dict())
    with pytest.raises(CheckpointError, match=said) as caught:
        load_dense(tmp_path / "weights.pt", model)
    assert "weights.pt" in str(caught.value)
    assert untouched(model, before)


def test_a_scripted_model_is_named(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch advises against what users still have
        torch.jit.save(torch.jit.trace(dense(), torch.zeros(1, 3, 8, 8)), tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"holds a scripted model \(torch.jit\): save the weights of the eager"):
        load_dense(tmp_path / "weights.pt", dense())


# --- pruned files


@pytest.fixture(scope="module")
def pruned() -> lp.PruneResult:
    return lp.prune(dense(), torch.zeros(1, 3, 8, 8), criterion="l1", ratio=0.5)


@pytest.fixture
def file(tmp_path: Path, pruned) -> Path:
    save(tmp_path / "pruned.pt", pruned.model, pruned.plan, accuracy=0.5)
    return tmp_path / "pruned.pt"


def refused(path: Path, said: str) -> None:
    before = copy.deepcopy((model := dense(seed=1)).state_dict())
    shown = str(model)
    with pytest.raises(CheckpointError, match=said):
        load(path, model)
    assert untouched(model, before)
    assert str(model) == shown


def flip_a_bit(path: Path, tensor: Tensor) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(tensor.detach().numpy().tobytes()) + 5] ^= 1
    path.write_bytes(data)


def test_one_flipped_bit_is_found(file: Path, pruned) -> None:
    flip_a_bit(file, pruned.model[3].weight)
    refused(file, r"pruned.pt is damaged: BadZipFile: Bad CRC-32 for file '.*data/\d+'; copy or download it again")
    torch.save(dense().state_dict(), file)
    flip_a_bit(file, dense()[3].weight)
    with pytest.raises(CheckpointError, match=r"pruned.pt is damaged: BadZipFile: Bad CRC-32"):
        load_dense(file, dense())


def test_without_check_sums_the_digest_finds_it(file: Path, pruned) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        save(file, pruned.model, pruned.plan)
    finally:
        torch.serialization.set_crc32_options(True)
    load(file, dense())
    flip_a_bit(file, pruned.model[3].weight)
    refused(file, "is damaged or was changed: its content has not the digest")


def with_digest(content) -> None:
    content["digest"] = digest_of({n: content.get(n) for n in ("plan", "sizes", "dense", "buffers", "state_dict")})


CHANGES = {
    "no channel": (lambda c: c["state_dict"].update({"0.weight": torch.zeros(0, 3, 3, 3)}), "cannot be cut from"),
    "one channel": (
        lambda c: c["state_dict"].update({"0.weight": torch.zeros(1, 3, 3, 3)}),
        "has 1 channels in it",
    ),
    "five dimensions": (
        lambda c: c["state_dict"].update({"0.weight": torch.zeros(4, 3, 3, 3, 1)}),
        r"is \[4, 3, 3, 3, 1\] in the",
    ),
    "integers": (
        lambda c: c["state_dict"].update({"0.weight": torch.zeros(4, 3, 3, 3, dtype=torch.int64)}),
        "is int64 in",
    ),
    "vast": (
        lambda c: c["state_dict"].update({"0.weight": torch.zeros(1).expand(10**12, 3, 3, 3)}),
        "cannot be cut from",
    ),
    "shorter bias": (lambda c: c["state_dict"].update({"1.bias": torch.zeros(2)}), "tensors of '1' differ in length"),
    "nan": (lambda c: c["state_dict"]["0.weight"].fill_(torch.nan), "holds NaN in 1 of 11"),
    "size": (lambda c: c["sizes"].update({"0": {"groups": "1"}}), "'1' is no size for 'groups'"),
    "parts": (lambda c: c.update(plan=[1]), "is not a pruned checkpoint"),
    "dense shapes": (lambda c: c.update(dense={"0.weight": 3}), "is not a pruned checkpoint"),
}


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("digest", ["right", "none"])
def test_what_a_pruned_file_claims_is_checked_before_the_model_changes(file: Path, kind: str, digest: str) -> None:
    content = torch.load(file, weights_only=True)
    change, said = CHANGES[kind]
    change(content)
    content.pop("digest")
    if digest == "right" and kind != "vast":  # of which nobody can make one
        with_digest(content)
    torch.save(content, file)
    refused(file, said)


def test_changed_weights_have_not_the_stored_digest(file: Path) -> None:
    content = torch.load(file, weights_only=True)
    content["extra"]["note"] = "everybody may add to these"
    torch.save(content, file)
    load(file, dense(seed=1))
    content["state_dict"]["0.weight"][0, 0, 0, 0] += 1e-3
    torch.save(content, file)
    refused(file, "is damaged or was changed: its content has not the digest")
