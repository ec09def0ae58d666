"""The script about layer norms at smoke size, and the check on which its words rest."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

import lightning_prune as lp
from benchmarks.layer_norm import __main__ as script
from benchmarks.layer_norm import families
from benchmarks.layer_norm.accuracy import FILES, Letters, network
from benchmarks.zoo.models import randomise_

pytestmark = pytest.mark.slow  # no part of the package

ROOT = Path(__file__).parents[2]


class OneGroup(nn.Sequential):
    """A group norm of one group is a layer norm over channels and positions."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3), nn.GroupNorm(1, 8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Conv2d(4, 2, 1))


def write_letters(folder: Path, count: int = 52) -> Path:
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 28, 28), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count, dtype=torch.uint8) % 26
    for name, values in zip(FILES, (images, labels, images, labels), strict=True):
        head = bytes([0, 0, 8, values.dim()]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
        (folder / f"{name}-ubyte.gz").write_bytes(gzip.compress(head + values.numpy().tobytes()))
    return folder


@pytest.mark.parametrize("build", [network, OneGroup])
def test_nothing_but_the_statistic_changes(build) -> None:
    row = families.family(build, side=32)
    assert row["exact error"] < 1e-12
    assert row["statistics error"] < 1e-12
    assert 0 < row["exact half"][0] < row["exact most"][0] < row["statistics most"][0] < 1
    assert row["exact half"][0] < row["statistics half"][0]
    assert row["whole"] == ""


@pytest.mark.parametrize("build", [network, OneGroup])
def test_the_statistic_does_change(build) -> None:
    model, images = build().eval(), torch.randn(1, 3, 32, 32)
    randomise_(model)
    result = lp.prune(model, images, selection=lp.LayerRatio(0.5), statistics=True)
    assert not result.lossless.passed
    assert lp.prune(model, images, selection=lp.LayerRatio(0.5)).lossless.passed


def test_a_model_of_which_nothing_can_go_exactly_has_a_row() -> None:
    row = families.family(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(1, 8), nn.Conv2d(8, 2, 1)), side=8)
    assert row["exact most"] == (0.0, 0.0)
    assert "exact error" not in row
    assert row["statistics most"][0] > 0.7


def test_other_statistics_are_not_called_equal() -> None:
    class MeanOfChannels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)

        def forward(self, x):
            y = self.first(x)
            return self.last(y * y.mean(1, keepdim=True))

    row = families.family(MeanOfChannels, side=8)
    assert row["statistics half"][0] > 0.3
    assert "statistics error" not in row


def test_letters_are_read_and_padded(tmp_path: Path) -> None:
    letters = Letters.read(write_letters(tmp_path / "letters"))
    images, labels = letters.train
    assert images.shape == (52, 3, 32, 32)
    assert labels.tolist() == [n % 26 for n in range(52)]
    assert images[:, :, :2].unique().tolist() == pytest.approx([-0.17 / 0.33])
    inside = images[0, 2, 2:-2, 2:-2] * 0.33 + 0.17
    assert torch.equal((255 * inside).round(), letters.test[0][0, 0, 2:-2, 2:-2].mul(0.33).add(0.17).mul(255).round())
    first = torch.randint(256, (52, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)[0]
    assert torch.equal((255 * inside).round(), first.float())


def test_missing_letters_are_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"train-images-idx3-ubyte\.gz is missing: --data takes the folder"):
        script.main(
            ["accuracy", "--data", str(tmp_path), "--rows", str(tmp_path / "rows"), "--out", str(tmp_path / "x")]
        )


def test_accuracy_from_end_to_end_and_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, out, data = tmp_path / "made" / "rows.jsonl", tmp_path / "page.md", write_letters(tmp_path / "letters")
    sizes = ["--epochs", "1", "--tune-epochs", "1", "--seeds", "2", "--budgets", "0.5", "0.1", "--criteria", "l1"]
    files = [
        "--data",
        str(data),
        "--rows",
        str(rows),
        "--out",
        str(out),
        "--weights",
        str(tmp_path / "made" / "dense.pt"),
    ]
    argv = ["accuracy", *files, *sizes]
    script.main(argv)
    found = {row["key"]: row for row in map(json.loads, rows.read_text("utf-8").splitlines())}
    exact, lossy = found["accuracy l1 0.5 exact"], found["accuracy l1 0.5 statistics"]
    assert exact["widths"] == [24, 48, 96]
    assert exact["error"] < 1e-10
    assert exact["masked"] == exact["pruned"]
    assert lossy["widths"] < [24, 48, 96]
    assert lossy["error"] > 1e-6
    assert all(0.49 < row["flops"] <= 0.5 and len(row["tuned"]) == 2 for row in (exact, lossy))
    assert "refused" in found["accuracy l1 0.1 exact"]
    page = out.read_text("utf-8")
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 5
    assert {line.count("|") for line in table} == {10}
    assert "| exactly | l1 | 0.10: cannot be met |" in page
    monkeypatch.setattr(script, "pruned", lambda *_, **__: pytest.fail("measured again"))
    monkeypatch.setattr(Letters, "fit_", lambda *_, **__: pytest.fail("trained again"))
    script.main(argv)
    assert out.read_text("utf-8") == page


def test_a_family_whose_library_is_missing_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def missing() -> nn.Module:
        raise ImportError("No module named 'timm'")

    monkeypatch.setattr(script, "FAMILIES", {"Other": missing, "ConvNeXt": network, "Net": OneGroup})
    monkeypatch.setattr(script, "family", lambda build: families.family(build, side=32))
    argv = ["--rows", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "page.md")]
    script.main(["families", *argv, "--only", "e"])
    assert "Other: No module named 'timm'" in capsys.readouterr().out
    assert "| ConvNeXt | 0.2 |" in (tmp_path / "page.md").read_text("utf-8")
    assert "Other" not in (tmp_path / "page.md").read_text("utf-8")
    monkeypatch.setattr(script, "family", lambda build: families.family(build, side=8) | {"params": 9_900_000})
    script.main(["families", *argv, "--only", "ConvNeXt"])
    assert "| ConvNeXt | 0.2 |" in (tmp_path / "page.md").read_text("utf-8")
    script.main(["families", *argv, "--only", "Net", "--redo"])
    assert "| Net | 9.9 |" in (tmp_path / "page.md").read_text("utf-8")
    script.main(["page", *argv])
    assert "| ConvNeXt | 0.2 |" in (tmp_path / "page.md").read_text("utf-8")


def test_the_page_shows_the_figures_of_the_results() -> None:
    def table_rows(path: str) -> list[list[str]]:
        lines = (ROOT / path).read_text("utf-8").splitlines()
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if re.match(r"\| [^-]", line)]

    measured = table_rows("benchmarks/results/layer_norm.md")
    shown = table_rows("docs/layer-norm.md")
    assert len(shown) >= 20
    for cells in shown[1:]:
        assert any(cells[0] == row[0] and not Counter(cells) - Counter(row) for row in measured), cells
