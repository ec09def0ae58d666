"""Scores kept for later: the same after a trip to disk, refused for another model."""

from __future__ import annotations

import pytest
import torch

import lightning_prune as lp
from lightning_prune.criteria.scores import Scores
from lightning_prune.errors import PruningError, ScoreError
from tests.zoo import build, images


@pytest.fixture
def graph() -> lp.ChannelGraph:
    return lp.trace(build("Residual"), images())


@pytest.fixture
def scores(graph) -> Scores:
    return lp.score(build("Residual"), graph, "l1")


def test_saved_scores_serve_many_selections(tmp_path, graph, scores) -> None:
    scores.save(tmp_path / "new" / "scores.pt")
    again = Scores.load(str(tmp_path / "new" / "scores.pt"), graph)
    for selection in (lp.GlobalRatio(0.3), lp.LayerRatio(0.7)):
        for coupling in ("joint", "union"):
            assert selection.select(graph, again, coupling=coupling) == selection.select(
                graph, scores, coupling=coupling
            )
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["scores.pt"]
    assert torch.load(tmp_path / "new" / "scores.pt", weights_only=True)["format"] == "lightning-prune-scores/1"


def test_a_failed_save_leaves_the_old_file(tmp_path, graph, scores, monkeypatch) -> None:
    path = tmp_path / "scores.pt"
    scores.save(path)

    def fail(content, stream) -> None:
        stream.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(PruningError, match="disk full"):
        scores.save(path)
    assert Scores.load(path, graph).keys() == scores.keys()
    assert [found.name for found in tmp_path.iterdir()] == ["scores.pt"]


def test_scores_of_another_model_are_refused(tmp_path, scores) -> None:
    scores.save(tmp_path / "scores.pt")
    other = lp.trace(build("Vgg"), images())
    with pytest.raises(ScoreError, match=r"another model: there are none for group 'features\.0\.0'"):
        Scores.load(tmp_path / "scores.pt", other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("b1.0"), "there are none for group 'b1.0'"),
        (lambda s: s.layers.pop("b1.0"), "there are none for group 'b1.0'"),
        (lambda s: s.update(conv=torch.ones(3)), "it has no prunable group 'conv'"),
        (lambda s: s.layers.update(conv={}), "it has no prunable group 'conv'"),
        (lambda s: s.layers["b2.0"].pop("down.0"), "group 'b2.0' consists of b2.0, down.0 here and of b2.0 there"),
        (lambda s: s.update({"b1.0": torch.ones(11)}), r"'b1.0' has 12 channels here and scores of shape \[11\]"),
        (lambda s: s.layers["b1.0"].update({"b1.0": torch.ones(1, 12)}), r"and scores of shape \[1, 12\]"),
        (lambda s: s.update({"b1.0": [1.0] * 12}), "scores of shape list"),
    ],
)
def test_the_first_difference_is_named(graph, scores, change, message: str) -> None:
    scores.check(graph)
    change(scores)
    with pytest.raises(ScoreError, match=message):
        scores.check(graph)


def test_a_file_that_holds_no_scores_is_refused(tmp_path, graph) -> None:
    path = tmp_path / "scores.pt"
    with pytest.raises(ScoreError, match="there is no file"):
        Scores.load(path, graph)
    path.write_bytes(b"nothing")
    with pytest.raises(ScoreError, match=r"no scores: .*scores\.pt cannot be read: it is a text"):
        Scores.load(path, graph)
    torch.save({"groups": {}, "layers": {}}, path)
    with pytest.raises(ScoreError, match="holds no scores of format lightning-prune-scores/1"):
        Scores.load(path, graph)
    torch.save({"format": "lightning-prune-scores/1"}, path)
    with pytest.raises(ScoreError, match="not scores"):
        Scores.load(path, graph)
    torch.save(build("Plain"), path)  # a pickle that could run anything
    with pytest.raises(ScoreError, match=r"no scores: .* reading that would run code") as error:
        Scores.load(path, graph)
    assert "weights_only=False" not in str(error.value)
