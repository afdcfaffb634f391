"""`train` and `evaluate` on several workers: data by a global position, saves for all or none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from workers import Group

import functrain as ft
from functrain.errors import ConfigError


def _leaves(directory: Path) -> dict[str, bytes]:
    newest = ft.latest(directory)
    assert newest is not None
    return {path.name: path.read_bytes() for path in newest.iterdir()}


@pytest.mark.parametrize("background", [False, True])
def test_state_metrics_and_checkpoint_are_those_of_one_worker(
    group: Group, tmp_path: Path, background: bool
) -> None:
    options = {"background": background, "layers": 1}
    (alone,) = group.values("training", 1, {**options, "directory": str(tmp_path / "1")})
    assert any("eval_loss" in record for record in alone["records"])
    for each in group.values("training", 2, {**options, "directory": str(tmp_path / "2")}):
        assert each == alone
    assert _leaves(tmp_path / "1") == _leaves(tmp_path / "2")
    assert len(list((tmp_path / "2").glob("step-*"))) == 2


def test_the_operations_of_a_step_are_counted_of_each_workers_own_part(group: Group) -> None:
    """No worker has the micro-batches of all for it, and the sum is what one worker counts."""
    (alone,) = group.values("clocked", 1, {"layers": 1})
    assert group.values("clocked", 2, {"layers": 1}) == [alone, alone]


@pytest.mark.parametrize("size", [2, 4])
def test_a_checkpoint_of_shards_is_that_of_one_worker_to_the_byte(
    group: Group, tmp_path: Path, size: int
) -> None:
    options = {"odd": True, "layers": 1, "steps": 2, "step": {"microbatches": 4}}
    (alone,) = group.values("training", 1, {**options, "directory": str(tmp_path / "1")})
    options = {**options, "step": {"microbatches": 4, "sharded": True}}
    for each in group.values("training", size, {**options, "directory": str(tmp_path / "2")}):
        assert each == alone
    assert _leaves(tmp_path / "1") == _leaves(tmp_path / "2")


def test_shards_go_on_as_other_shards_and_whole(group: Group, tmp_path: Path) -> None:
    options: dict[str, Any] = {"layers": 1, "every": 1}
    (whole,) = group.values("training", 1, {**options, "steps": 4})
    for steps, size, sharded in ((1, 1, False), (2, 4, True), (3, 2, True), (4, 1, False)):
        options |= {"steps": steps, "directory": str(tmp_path), "step": {"sharded": sharded}}
        last = group.values("training", size, options)[0]
    assert last["fingerprint"] == whole["fingerprint"]


@pytest.mark.parametrize(
    ("rank", "operation"), [(0, "create"), (0, "sync"), (0, "rename"), (1, "write_at"), (1, "sync")]
)
def test_a_save_of_shards_that_fails_on_one_worker_fails_on_all(
    group: Group, tmp_path: Path, rank: int, operation: str
) -> None:
    options = {"directory": str(tmp_path), "breaks": [rank, operation, 0, "fail"]}
    found = group.values("saving", 2, options)
    assert all("No space left on device" in each["error"] and each["same"] for each in found)
    assert [path.name for path in tmp_path.glob("*step*")] == ["step-000000000000"]


@pytest.mark.parametrize(
    ("rank", "operation", "then"),
    [(0, "rename", 2), (0, "mkdir", 2), (1, "write_at", 4), (1, "sync", 2)],
)
def test_a_worker_killed_in_a_save_of_shards_loses_nothing(
    group: Group, tmp_path: Path, rank: int, operation: str, then: int
) -> None:
    options = {"directory": str(tmp_path), "breaks": [rank, operation, 0, "kill"]}
    found = group.run("saving", 2, options)
    assert found[rank] == {"exit": 9}
    assert ft.latest(tmp_path) == tmp_path / "step-000000000000"
    # Every worker loads what is there, and the next save sweeps away what is left.
    options |= {"loads": True, "breaks": [9, "sync", 9, "fail"]}
    assert len({each["loaded"] for each in group.values("saving", then, options)}) == 1
    names = [path.name for path in sorted(tmp_path.glob("*step*"))]
    assert names == ["step-000000000000", "step-000000000001"]


def test_shards_are_not_loaded_from_what_is_damaged_or_of_another_shape(
    group: Group, tmp_path: Path
) -> None:
    options = {"directory": str(tmp_path), "breaks": [9, "sync", 9, "fail"]}
    group.values("saving", 2, options)
    for each in group.run("loading", 2, {**options, "odd": True}):
        assert each["error"][0] == "CheckpointError"
        assert "the checkpoint is of another architecture" in each["error"][1]
    for each in group.run("loading", 2, {**options, "no world": True}):
        assert "its world is not given" in each["error"][1]
    newest = ft.latest(tmp_path)
    assert newest is not None
    file = newest / "optimizer.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    for each in group.run("loading", 2, options):
        assert "optimizer.safetensors: its sha256 does not match" in each["error"][1]


def test_the_number_of_workers_may_change_between_sittings(group: Group, tmp_path: Path) -> None:
    options: dict[str, Any] = {"layers": 1, "every": 1}
    (whole,) = group.values("training", 1, {**options, "steps": 3})
    for steps, size in ((1, 4), (2, 2), (3, 1)):
        options |= {"steps": steps, "directory": str(tmp_path)}
        last = group.values("training", size, options)[0]
    assert last["fingerprint"] == whole["fingerprint"]


def test_with_fast_another_number_of_workers_is_named_on_resuming(
    group: Group, tmp_path: Path
) -> None:
    options = {"directory": str(tmp_path), "steps": 2, "step": {"reduction": "fast"}}
    group.values("training", 2, options)
    (found,) = group.run("training", 1, {**options, "steps": 4})
    assert found["error"][0] == "CheckpointError"
    assert "workers 2 then, None now" in found["error"][1]


def test_a_worker_killed_in_a_run_loses_nothing(group: Group, tmp_path: Path) -> None:
    options: dict[str, Any] = {"layers": 1, "steps": 4}
    (whole,) = group.values("training", 1, options)
    options |= {"directory": str(tmp_path)}
    first, second = group.run("training", 2, {**options, "dies": [1, 3]})
    assert first["error"][0] == "WorkerError"
    assert second == {"exit": 9}
    for each in group.values("training", 2, options):
        assert each["fingerprint"] == whole["fingerprint"]
        assert each["records"] == whole["records"][2:]


@pytest.mark.parametrize("rank", [0, 1])
def test_what_one_worker_cannot_read_ends_all(group: Group, rank: int) -> None:
    """At once, and each knows why: the others do not wait for it in the step."""
    found = group.run("training", 2, {"unreadable": [rank, 8]})
    reading, other = found[rank]["error"], found[1 - rank]["error"]
    assert reading == ["OSError", "the disk is gone"]
    assert other == ["WorkerError", f"worker {rank} has failed (OSError): the disk is gone"]


def test_a_save_that_fails_fails_on_every_worker(group: Group, tmp_path: Path) -> None:
    taken = tmp_path / "file"
    taken.write_text("")
    first, second = group.run("training", 2, {"directory": str(taken / "run")})
    assert first["error"][0] == "CheckpointError"
    assert second["error"][0] == "RelayedError"
    assert first["error"][1] in second["error"][1]


@pytest.mark.parametrize(("options", "named"), [({"data": 1}, "sample 0.input_ids: ")])
def test_other_data_on_a_worker_are_refused(group: Group, options: Any, named: str) -> None:
    for each in group.run("training", 2, options):
        assert each["error"][0] == "WorkerError"
        assert named in each["error"][1]


def test_workers_without_a_world_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import zoo

    architecture, params, buffers = zoo.split("tied")
    step = ft.pretrain_step(architecture, ft.optim.adamw(1e-2))
    state = step.init(params, buffers)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="WORLD_SIZE is 2, and the step has no world"):
        ft.train(step, state, zoo.Batches(), steps=1)
