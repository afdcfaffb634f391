"""Settings for every test: one thread, so that two workers share two cores."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from workers import Group, shared

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
settings.register_profile(
    "functrain",
    deadline=None,  # machines are shared; time is not what is tested
    derandomize=True,  # the same examples in every run; the long runs explore
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile("long", deadline=None, max_examples=1000)
settings.load_profile("functrain")


@pytest.fixture(autouse=True)
def _leaves_nothing_behind() -> Iterator[None]:
    """A mode that one test leaves on would fail others, and it would not be told which did."""
    yield
    left = [name for name, (now, usual, _) in _modes().items() if now != usual]
    for now, usual, back in _modes().values():
        if now != usual:
            back(usual)
    assert not left, f"left changed: {', '.join(left)}"


def _modes() -> dict[str, tuple[Any, Any, Callable[[Any], object]]]:
    """Each mode as it is, as it has to be, and how it comes to be so again."""
    return {
        "gradients": (torch.is_grad_enabled(), True, torch.set_grad_enabled),
        "default dtype": (torch.get_default_dtype(), torch.float32, torch.set_default_dtype),
        "threads": (torch.get_num_threads(), 1, torch.set_num_threads),
        "autocast": (
            torch.is_autocast_enabled("cpu"),
            False,
            partial(torch.set_autocast_enabled, "cpu"),
        ),
        "deterministic algorithms": (
            torch.are_deterministic_algorithms_enabled(),
            False,
            torch.use_deterministic_algorithms,
        ),
    }


@pytest.fixture(scope="module")
def group(request: pytest.FixtureRequest) -> Group:
    """The one warm process for the groups of workers that tests start.

    A module's `IMPORTED` are what it imports before, so that not each worker does.
    """
    group = shared()
    group.imports(*getattr(request.module, "IMPORTED", ()))
    return group


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long forms take what they take: on a busy machine, more than other tests' limit."""
    for item in items:
        if item.get_closest_marker("long") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(3600))
