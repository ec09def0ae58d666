"""Models by name: values of their arguments."""

from __future__ import annotations

import pytest
from torch import nn

from lightning_prune.cli.build_model import build_model


@pytest.mark.parametrize(
    ("word", "value"),
    [("3", 3), ("null", None), ("None", None), ("true", True), ("[1, 2]", [1, 2]), ("(1, 2)", (1, 2)), ("a.b", "a.b")],
)
def test_values_of_arguments(word, value) -> None:
    received = build_model(f"{__name__}.Keeper", [f"value={word}"]).value
    assert received == value
    assert type(received) is type(value)


class Keeper(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value
