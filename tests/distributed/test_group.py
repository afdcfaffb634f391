"""The process group: one for the open worlds of a process, and its maker's alone to end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from workers import Group

import functrain as ft
from functrain.errors import ConfigError


def test_one_world_after_another_in_a_process(group: Group) -> None:
    """The second would meet where the first one's addresses still are, and wait for them."""
    for found in group.values("worlds", 2, {"sharded": True}):
        assert len(found) == 3
        assert len(set(found)) == 1


def test_workers_meet_anew_after_an_error(group: Group) -> None:
    first, second = group.values("worlds", 2, {"raises": [1, 1]})
    assert (first[1], second[1]) == ("WorkerError", "ValueError")
    assert len({*first[:1], *first[2:], *second[:1], *second[2:]}) == 1


@pytest.mark.parametrize("raises", [False, True, "both"])
def test_an_inner_world_leaves_the_group_to_the_outer_one(group: Group, raises: Any) -> None:
    """With which it ends: so that, where that fails, the others do not wait for this worker."""
    assert group.values("nested", 2, {"raises": raises}) == [[True, False]] * 2


@pytest.mark.parametrize("raises", [False, "both"])
def test_a_group_of_somebody_else_stays(group: Group, raises: Any) -> None:
    options = {"raises": raises, "foreign": True}
    assert group.values("nested", 2, options) == [[True, True]] * 2


def test_a_step_of_a_closed_world_is_refused(group: Group) -> None:
    for each in group.run("closed", 2):
        assert each["error"][0] == "WorkerError"
        assert "this world is closed" in each["error"][1]


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("MASTER_ADDR", "", "MASTER_ADDR: not in the environment"),
        ("MASTER_PORT", "", "MASTER_PORT: not in the environment"),
        ("MASTER_PORT", "abc", "MASTER_PORT: 'abc'"),
        ("MASTER_PORT", "65536", "MASTER_PORT: 65536 in the environment, expected less than"),
        ("RANK", "", "RANK: not in the environment"),
        ("WORLD_SIZE", "0", "RANK: 0 of WORLD_SIZE 0"),
    ],
)
def test_an_environment_in_which_nobody_can_meet_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, text: str
) -> None:
    environment = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for each in environment.items():
        monkeypatch.setenv(*each)
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=text):
        ft.distributed.world()


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (None, "WORLD_SIZE: not in the environment, and RANK is 3,"),
        ("", "WORLD_SIZE: not in the environment, and RANK is 3,"),
        ("1", "RANK: 3 of WORLD_SIZE 1"),
    ],
)
def test_a_rank_that_is_not_of_a_single_process_is_refused(
    monkeypatch: pytest.MonkeyPatch, size: str | None, text: str
) -> None:
    """Else each process would take itself for worker 0; rank 0 may be alone."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if size is not None:
        monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(ConfigError, match=text):
        ft.distributed.world()
    monkeypatch.setenv("RANK", "0")
    assert ft.distributed.world().size == 1


@pytest.mark.parametrize("device", ["gpu", "cuda", "cuda:1"])
def test_a_device_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=f"device: '{device}'"):
        ft.distributed.world(device=device)


def test_more_workers_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match="device: 'cuda:2', and this machine has 2"):
        ft.distributed.world()
