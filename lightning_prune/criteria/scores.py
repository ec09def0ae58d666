"""The result of scoring."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_prune.errors import ScoreError


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
