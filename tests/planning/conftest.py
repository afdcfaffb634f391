"""One warm process for the groups of workers that a module's tests start."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from workers import Group


@pytest.fixture(scope="module")
def group() -> Iterator[Group]:
    made = Group()
    yield made
    made.close()
