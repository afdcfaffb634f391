"""One warm process for the groups of workers that a module's tests start.

A module's `IMPORTED` are what that process imports before, so that not each worker does.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from workers import Group


@pytest.fixture(scope="module")
def group(request: pytest.FixtureRequest) -> Iterator[Group]:
    made = Group(*getattr(request.module, "IMPORTED", ()))
    yield made
    made.close()
