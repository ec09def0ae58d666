"""What every test and doctest starts from."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same numbers in whatever order the tests run: pytest-randomly seeds everything but torch."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run what needs ultralytics only where it is asked for by name."""
    if "ultralytics" not in config.option.markexpr:
        for item in items:
            if item.get_closest_marker("ultralytics"):
                item.add_marker(pytest.mark.skip(reason="only `-m ultralytics` runs it"))
