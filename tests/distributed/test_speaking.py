"""How workers speak: by themselves, with one that is slow, and where one says something else."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from workers import Group

from functrain.distributed import speaking


def test_a_store_that_never_answers_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the net is cut, a question to it has no end."""

    class Silent:
        def set_timeout(self, _given: Any) -> None: ...

        def check(self, _places: list[str]) -> bool:
            threading.Event().wait(60)
            return False

    monkeypatch.setattr(speaking.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(speaking, "store_of_group", Silent)
    monkeypatch.setattr(speaking, "_PATIENCE", 0.1)
    begin = time.monotonic()
    assert "does not answer" in speaking.Speaking(size=2)._whereabouts()
    assert time.monotonic() < begin + 30


@pytest.mark.parametrize(
    ("how", "named"),
    [
        (
            "goes on from another state",
            "different states, whose step is 2 on worker 0; 1 on worker 1",
        ),
        ("has another key", "different states, whose key is 5 on worker 0; 7 on worker 1"),
        (
            "leaves",
            "the sharing out of a batch (step 3) on worker 0; the end of the world (step 2) on wor",
        ),
        (
            "has another step",
            "a batch (step 3) on worker 0; the comparison before the first step (step 3) on w",
        ),
        ("saves alone", "a batch (step 3) on worker 0; the name of a save (step 2) on worker 1"),
        ("evaluates alone", "a batch (step 3) on worker 0; an evaluation (step 2) on worker 1"),
    ],
)
def test_workers_that_part_are_told_where(
    group: Group, tmp_path: Path, how: str, named: str
) -> None:
    """By both, at once: gloo would end one of the processes, or they would go on as two runs."""
    for each in group.run("parting", 2, {"how": how, "directory": str(tmp_path)}):
        assert each["error"][0] == "WorkerError"
        assert named in each["error"][1]


def test_functions_that_hold_other_values_are_refused(group: Group) -> None:
    for each in group.run("scaled", 2, {"factors": [1, 2]}):
        assert each["error"][0] == "WorkerError"
        assert "step.transform.factor: 1 on worker 0; 2 on worker 1" in each["error"][1]


def test_a_weight_that_is_no_integer_is_refused(group: Group) -> None:
    for each in group.run("fractions", 2):
        assert each["error"][0] == "ConfigError"
        assert "objective: a weight of torch.float32, expected integers" in each["error"][1]


@pytest.mark.parametrize("raises", [False, True])
def test_worker_0_may_take_longer_than_the_others_wait(group: Group, raises: bool) -> None:
    options = {"timeout": 0.6, "sleeps": 1.5, "raises": raises}
    first, second = group.run("slow", 2, options)
    if raises:
        assert first["error"][0] == "CheckpointError"
        assert second["error"] == ["RelayedError", "worker 0 has refused (CheckpointError): no"]
    else:
        assert first == second == {"value": "made"}


@pytest.mark.parametrize(
    ("how", "rank"), [("for all", 1), ("from first", 0), ("a part", 0), ("a part", 1)]
)
def test_any_exception_of_one_worker_is_told_to_all(group: Group, how: str, rank: int) -> None:
    found = group.run("warned", 2, {"how": how, "rank": rank})
    assert found[rank]["error"] == ["UserWarning", "one alone"]
    text = f"worker {rank} has failed (UserWarning): one alone"
    assert found[1 - rank]["error"] == ["WorkerError", text]
