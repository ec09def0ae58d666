"""What every test and doctest starts from."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same numbers in whatever order the tests run: pytest-randomly seeds everything but torch."""
    torch.manual_seed(0)
