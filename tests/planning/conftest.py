"""The warm process for the groups of workers that tests start."""

from __future__ import annotations

import pytest
from workers import Group, shared


@pytest.fixture(scope="module")
def group() -> Group:
    return shared()
