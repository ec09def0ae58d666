"""A browser for the tests of pages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests import browsing


@pytest.fixture(scope="module")  # not longer: while it is open, an asyncio loop runs in this thread
def browser() -> Iterator[Any]:
    yield from browsing.chromium()
