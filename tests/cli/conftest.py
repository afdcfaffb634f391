"""Runs whose samples are short: to make them would take longer than to train."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from programs import SAMPLED

from functrain.cli import samples


@pytest.fixture(scope="package", autouse=True)
def _short_samples() -> Iterator[None]:
    usual, samples.TOKENS = samples.TOKENS, SAMPLED
    yield
    samples.TOKENS = usual
