"""The result of scoring."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_prune.errors import ScoreError
from lightning_prune.files import atomic
from lightning_prune.graph import ChannelGraph
from lightning_prune.tensor_files import read_tensors

FORMAT = "lightning-prune-scores/1"


class Scores(dict[str, Tensor]):
    """Per group the score of every channel, (channels,) float64 on the CPU; high means keep.

    Attributes:
        layers: the same per member layer, before they were combined: {group: {layer: (channels,)}}.

    Example:
        >>> import torch
        >>> one = torch.tensor([0.5, 1.0])
        >>> scores = Scores({"conv1": one}, {"conv1": {"conv1": one}})
        >>> Scores.from_dict(scores.to_dict()).layers["conv1"]["conv1"].tolist()
        [0.5, 1.0]
    """

    def __init__(
        self,
        groups: Mapping[str, Tensor] | None = None,
        layers: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:
        super().__init__(groups or {})
        self.layers = {group: dict(members) for group, members in (layers or {}).items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries of tensors, loadable with ``weights_only=True``."""
        return {
            "groups": dict(self),
            "layers": {group: dict(members) for group, members in self.layers.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Scores:
        """Read what `to_dict` wrote.

        Raises:
            ScoreError: the data are not scores.
        """
        try:
            return cls(data["groups"], data["layers"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ScoreError(f"not scores: {error!r}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the scores, so that one pass over the data serves many budgets; the file appears whole or not at all.

        Raises:
            PruningError: the file cannot be written.
        """
        with atomic(Path(path)) as stream:
            torch.save({"format": FORMAT, **self.to_dict()}, stream)

    @classmethod
    def load(cls, path: str | os.PathLike[str], graph: ChannelGraph) -> Scores:
        """Read what `save` wrote, onto the CPU and with ``weights_only=True``.

        Args:
            path: the file.
            graph: of the model that is to be pruned; scores of another one are refused, see `check`. That the
                weights are those that were scored, no graph can tell.

        Raises:
            ScoreError: there is no such file, it holds no scores, or those of another model.

        Example:
            >>> import tempfile, lightning_prune as lp
            >>> model = torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1))
            >>> graph = lp.trace(model, torch.zeros(1, 1))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     lp.score(model, graph, "l1").save(f"{folder}/scores.pt")
            ...     scores = lp.criteria.Scores.load(f"{folder}/scores.pt", graph)
            >>> [len(lp.LayerRatio(ratio).select(graph, scores).groups["0"].keep) for ratio in (0.0, 0.5)]
            [2, 1]
        """
        try:
            data = read_tensors(path, ScoreError)
        except ScoreError as error:
            raise ScoreError(f"no scores: {error}") from error
        if data.get("format") != FORMAT:
            raise ScoreError(f"{path} holds no scores of format {FORMAT}; name a file that Scores.save wrote")
        scores = cls.from_dict(data)
        scores.check(graph)
        return scores

    def check(self, graph: ChannelGraph) -> None:
        """Refuse scores that are not those of exactly this graph's prunable groups and their layers.

        Raises:
            ScoreError: groups, layers or numbers of channels differ; the first difference is named.
        """
        expected = {g.name: {layer.name: g.size for layer in g.layers} for g in graph.prunable_groups}
        for difference in self._differences(expected):
            raise ScoreError(f"these scores belong to another model: {difference}")

    def _differences(self, expected: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
        for name in [*expected, *self, *self.layers]:
            if name not in expected:
                yield f"it has no prunable group {name!r}"
            elif name not in self or name not in self.layers:
                yield f"there are none for group {name!r}"
        for name, layers in expected.items():
            of, size = self.layers[name], max(layers.values())
            if of.keys() != layers.keys():
                yield f"group {name!r} consists of {', '.join(layers)} here and of {', '.join(of)} there"
            for values in (self[name], *of.values()):
                if not isinstance(values, Tensor) or values.shape != (size,):
                    got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
                    yield f"group {name!r} has {size} channels here and scores of shape {got}"
