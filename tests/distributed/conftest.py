"""One warm process for the groups of workers that tests start.

A module's `IMPORTED` are what that process imports before, so that not each worker does.
"""

from __future__ import annotations

import pytest
from workers import Group, shared


@pytest.fixture(scope="module")
def group(request: pytest.FixtureRequest) -> Group:
    group = shared()
    group.imports(*getattr(request.module, "IMPORTED", ()))
    return group
