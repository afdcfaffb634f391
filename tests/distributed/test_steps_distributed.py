"""The step on several workers: the same state and metrics on each, and on any number of them."""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from workers import Group, free_port

import functrain as ft
from functrain.errors import ConfigError
from functrain.reductions import Tree, tree_sum

# Their weight is large, so that it would be seen if each worker balanced its own part alone.
ROUTED = {"partial": "experts", "step": {"router": 1.0}}
ONE = {"layers": 1}  # for what does not depend on how blocks follow one another
STAGES: dict[str, Any] = {
    "pretrain": {"step": {"microbatches": 8}},
    "overflow": {**ONE, "overflow": True, "steps": 4},
    "dpo": {**ONE, "stage": "dpo"},
    "coupled": {**ONE, "stage": "dpo", "step": {"loss": "aot"}},
    "running": {**ONE, "stage": "dpo", "step": {"loss": {"bco_pair": 1.0, "sft": 0.3}}},
    "kto": {**ONE, "stage": "kto"},
    "routers in balance": ROUTED,
    "small buckets": {**ONE, "bucket": 100},
    "a parameter that some parts do not reach": {"partial": True},
}


def _with(options: Any, **step: Any) -> dict[str, Any]:
    """These options, and of the step these too, if it has no others."""
    return {**options, "step": {**step, **options.get("step", {})}}


ON_TWO = {"pretrain", "overflow", "dpo", "coupled"}
ON_FOUR = STAGES.keys() - ON_TWO | {"pretrain"}


@pytest.mark.parametrize(
    ("name", "size"),
    [
        pytest.param(name, size, marks=() if name in ordinary else pytest.mark.long)
        for size, ordinary in ((2, ON_TWO), (4, ON_FOUR))
        for name in STAGES
    ],
)
def test_canonical_bits_do_not_depend_on_the_number_of_workers(
    group: Group, name: str, size: int
) -> None:
    options = _with(STAGES[name], microbatches=2 * size)
    alone = group.alone(options)
    assert all(each == alone for each in group.values("steps", size, options))


SHARDED: dict[str, Any] = {
    "pretrain": {"step": {"microbatches": 8}},
    "overflow": {**ONE, "overflow": True, "steps": 4},
    "shapes that leave workers without rows": {"odd": True},
    "bf16 params": {**ONE, "step": {"precision": "bf16_params"}},
    "donated": {**ONE, "odd": True, "step": {"donate": True}},
    "made in shards": {"odd": True, "apart": True},
    "made in shards, and the reference": {"apart": True, "stage": "dpo", "step": {"donate": True}},
    "made in shards, with own parameters": {
        "apart": True,
        "partial": True,
        "step": {"microbatches": 8},
    },
    "recomputed blocks": {"step": {"checkpoint": "model.layers.*"}},
    "recomputed selectively": {
        "step": {"checkpoint": "model.layers.*", "recompute": "selective", "precision": "bf16"}
    },
    "recomputed inside of blocks": {"step": {"checkpoint": "model.layers.*.mlp"}},
    "a reference in shards": {"stage": "dpo", "reference": "sharded"},
    "a whole reference": {**ONE, "odd": True, "stage": "dpo"},
    "a reference that moves": {**ONE, "stage": "dpo", "step": {"reference_mixup": 0.5}},
    "coupled": {**ONE, "stage": "dpo", "step": {"loss": "aot"}},
    "running": {**ONE, "stage": "dpo", "step": {"loss": {"bco_pair": 1.0, "sft": 0.3}}},
    "kto": {**ONE, "stage": "kto"},
    "routers in balance": ROUTED,
    "a parameter that some parts do not reach": {"partial": True},
    "a parameter that nothing reaches": {"partial": "never"},
    "a module that all blocks share": {"partial": "shared"},
    "blocks with a forward of their own and a checkpoint inside": {"partial": "own"},
    "logits by chunks": {**ONE, "chunks": True},
    "logits by chunks, bf16 params": {**ONE, "chunks": True, "step": {"precision": "bf16_params"}},
}
EMPTY = "shapes that leave workers without rows"  # two workers have rows of each


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *((name, 4 if name == EMPTY else 2) for name in SHARDED),
        *(
            pytest.param(name, 4, marks=pytest.mark.long)
            for name in ("donated", "made in shards", "a whole reference")
        ),
    ],
)
def test_sharded_is_canonical_to_the_bit(group: Group, name: str, size: int) -> None:
    options = _with(SHARDED[name], microbatches=2 * size)
    alone = group.alone({n: value for n, value in options.items() if n != "apart"})
    for each in group.values("steps", size, _with(options, sharded=True)):
        assert each == alone


def test_shards_that_another_state_holds_are_not_overwritten(group: Group) -> None:
    for before, after in group.values("reusing", 2):
        assert before == after


def test_workers_that_call_other_blocks_are_refused(group: Group) -> None:
    options = {"partial": "random", "timeout": 10, "step": {"sharded": True}}
    found = group.run("parts", 2, options)
    assert all(each["error"][0] in ("ArchitectureError", "WorkerError") for each in found)
    assert any("called the model's blocks in another order" in e["error"][1] for e in found)


@pytest.mark.parametrize("reduction", ["fast", "canonical"])
def test_workers_that_call_blocks_in_another_order_are_refused_at_once(
    group: Group, reduction: str
) -> None:
    """Not after a timeout: what the one has sent for as a guess the other one has not."""
    step = {"sharded": True, "reduction": reduction}
    options = {"partial": "permuted", "timeout": 20, "step": step}
    for each in group.run("parts", 2, options):
        assert each["error"][0] == "ArchitectureError"
        assert "called the model's blocks in another order" in each["error"][1]


@pytest.mark.parametrize("stage", ["pretrain", "dpo"])
def test_a_part_of_a_block_that_is_called_by_itself_has_its_gradient(
    group: Group, stage: str
) -> None:
    """It is summed twice, so it is the same to rounding; a reference has its own values there."""
    options = {"partial": "outside", "stage": stage, "reference": "sharded"}
    options = _with(options, microbatches=4)
    alone = group.alone(options)
    for each in group.values("steps", 2, _with(options, sharded=True)):
        for ours, theirs in zip(each["metrics"], alone["metrics"], strict=True):
            for name, value in ours.items():
                expected = float.fromhex(theirs[name])
                assert float.fromhex(value) == pytest.approx(expected, rel=1e-4, abs=1e-6), name


def test_params_that_are_not_the_same_are_not_sharded(group: Group) -> None:
    options = {"partial": "own", "step": {"sharded": True}, "ranks": {"1": {"seed": 1}}}
    for each in group.run("parts", 2, options):
        assert each["error"][0] == "WorkerError"
        assert "disagree before they are sharded" in each["error"][1]


def test_operations_are_counted_on_a_whole_model(group: Group) -> None:
    for refused in group.values("operations", 2, {}):
        ((kind, message),) = refused
        assert kind == "ConfigError"
        assert "counted on a whole model" in message


@pytest.mark.parametrize("size", [2, 3])
def test_sharded_and_fast_agrees_with_one_to_rounding(group: Group, size: int) -> None:
    options = {"step": {"reduction": "fast", "microbatches": 2 * size}, "odd": True, "examples": 12}
    alone = group.alone(options)
    first, *others = group.values("steps", size, _with(options, sharded=True))
    assert all(each == first for each in others)
    assert first["norm"] == pytest.approx(alone["norm"], rel=1e-5)
    for ours, theirs in zip(first["metrics"], alone["metrics"], strict=True):
        for name, value in ours.items():
            expected = float.fromhex(theirs[name])
            assert float.fromhex(value) == pytest.approx(expected, rel=1e-4), name


@pytest.mark.long
def test_of_eight_workers_too(group: Group) -> None:
    options = {"stage": "sft", "overflow": True}
    (alone,) = group.values("steps", 1, options)
    assert all(each == alone for each in group.values("steps", 8, options))
    sharded = {**options, "odd": True, "step": {"sharded": True}}
    (alone,) = group.values("steps", 1, {**options, "odd": True})
    assert all(each == alone for each in group.values("steps", 8, sharded))


@pytest.mark.long
@pytest.mark.parametrize("stage", ["pretrain", "sft", "dpo"])
def test_twenty_steps_have_one_fingerprint_on_1_2_4_and_8_workers(group: Group, stage: str) -> None:
    options = {"stage": stage, "overflow": True, "steps": 20}
    (alone,) = group.values("steps", 1, options)
    for size in (2, 4, 8):
        assert all(each == alone for each in group.values("steps", size, options)), size
        sharded = {**options, "step": {"sharded": True}}
        assert all(each == alone for each in group.values("steps", size, sharded)), size
    skipped = _skipped_of_those_that_clip_skip_and_apply(alone)
    print(f"{stage}: {alone['fingerprint']} on 1, 2, 4, 8, replicated and sharded")
    print(f"{skipped} of 20 steps skipped")


def test_the_overflowing_steps_on_two_workers_clip_skip_and_apply(group: Group) -> None:
    """The very run of the tests of bits."""
    alone = group.alone(_with(STAGES["overflow"], microbatches=4))
    assert 0 < _skipped_of_those_that_clip_skip_and_apply(alone) < 4


def _skipped_of_those_that_clip_skip_and_apply(alone: Any) -> int:
    """How many steps of a run were skipped; some were, and clipping has acted in others."""
    values = [{n: float.fromhex(v) for n, v in step.items()} for step in alone["metrics"]]
    assert {step["skipped"] for step in values} == {0.0, 1.0}
    assert any(step["grad_norm"] > 0.05 for step in values if not step["skipped"])
    return sum(step["skipped"] == 1.0 for step in values)


FAST: dict[str, Any] = {
    "as it is": {},
    "small buckets": {**ONE, "bucket": 100},
    # The embedding's rows are added to its sum where they are made, and the tied head's are not.
    "a tied table": {**ONE, "tables": True},
    "a tied table in one micro-batch": {**ONE, "tables": True, "step": {"microbatches": 2}},
    "logits by chunks": {**ONE, "chunks": True},
    "routers in balance": ROUTED,
}


@pytest.mark.parametrize(
    ("size", "name"),
    [
        *((2, name) for name in FAST),
        (4, "small buckets"),
        pytest.param(4, "a tied table", marks=pytest.mark.long),
    ],
)
def test_fast_agrees_on_every_worker_and_with_one_to_rounding(
    group: Group, size: int, name: str
) -> None:
    options = _with(FAST[name], reduction="fast", microbatches=2 * size)
    alone = group.alone(options)
    first, *others = group.values("steps", size, options)
    assert all(each == first for each in others)
    assert first["norm"] == pytest.approx(alone["norm"], rel=1e-5)
    for ours, theirs in zip(first["metrics"], alone["metrics"], strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            expected = float.fromhex(theirs[name])
            assert float.fromhex(value) == pytest.approx(expected, rel=1e-4), name


def test_a_world_of_one_is_no_world(group: Group) -> None:
    step, state = _alone("fast")
    plain, _ = step(state, _batch())
    for reduction in ("fast", "canonical"):
        step, state = _alone(reduction, world=ft.distributed.world())
        assert ft.fingerprint(step(state, _batch())[0]) == ft.fingerprint(plain)
    assert not torch.distributed.is_initialized()


def _batch() -> Any:
    import zoo

    return zoo.batch(0, 2)


def _alone(reduction: Any, **options: Any) -> tuple[Any, Any]:
    import zoo

    architecture, params, buffers = zoo.split("decoder")
    step = ft.pretrain_step(
        architecture, ft.optim.adamw(1e-2), reduction=reduction, microbatches=2, **options
    )
    return step, step.init(params, buffers, seed=1)


def joined(one: str, other: str) -> str:
    """A sum that shows its order."""
    return f"({one}+{other})"


@given(count=st.integers(1, 40), paired=st.booleans())
def test_a_tree_is_halved_at_the_largest_power_of_two(count: int, paired: bool) -> None:
    """For ever, or the bits of runs would part; `paired`: every second leaf added beforehand."""

    def halved(leaves: list[str]) -> str:
        if len(leaves) == 1:
            return leaves[0]
        middle = 1 << ((len(leaves) - 1).bit_length() - 1)
        return joined(halved(leaves[:middle]), halved(leaves[middle:]))

    leaves = [str(leaf) for leaf in range(count)]
    tree = Tree(joined)
    for leaf in leaves:
        before = tree.pop() if paired else None
        if before is None:
            tree.push(leaf)
        else:
            tree.push(joined(before, leaf), 2)
    assert tree.total() == halved(leaves)


@given(branches=st.integers(2, 9), level=st.integers(1, 4))
def test_a_branch_of_the_tree_is_the_tree_of_its_leaves(branches: int, level: int) -> None:
    width = 2**level
    leaves = [str(leaf) for leaf in range(branches * width)]
    parts = [leaves[begin : begin + width] for begin in range(0, len(leaves), width)]
    assert tree_sum([tree_sum(p, joined) for p in parts], joined) == tree_sum(leaves, joined)


@given(st.integers(1, 300))
def test_a_tree_keeps_a_logarithm_of_its_leaves(count: int) -> None:
    tree = Tree[int](operator.add)
    for value in range(count):
        tree.push(value)
        assert len(tree._waiting) <= (value + 1).bit_length()
    assert tree.total() == count * (count - 1) // 2


def test_what_one_worker_refuses_every_worker_refuses(group: Group) -> None:
    ranks = {"1": {"label": 77}}
    first, second = group.run("parts", 2, {"ranks": ranks})
    assert first["error"][0] == "RelayedError"
    assert first["error"][1].startswith("worker 1 has refused (BatchError): labels: 77 at [0, 1]")
    assert second["error"][0] == "BatchError"


def test_a_part_without_a_target_is_fine_and_a_whole_without_is_not(group: Group) -> None:
    assert len(set(group.values("parts", 2, {"ranks": {"1": {"hidden": True}}}))) == 1
    ranks = {"0": {"hidden": True}, "1": {"hidden": True}}
    for each in group.run("parts", 2, {"ranks": ranks}):
        assert each["error"][0] == "BatchError"
        assert "no target token" in each["error"][1]


@pytest.mark.parametrize(
    ("own", "named"),
    [
        ({"step": {"max_grad_norm": 0.25}}, "step.max_grad_norm: 0.05 on worker 0; 0.25 on w"),
        ({"step": {"ema_decay": 0.8}}, "step.ema_decay: 0.9 on worker 0; 0.8 on worker 1"),
        ({"shift": 1}, "state: "),
    ],
)
def test_workers_that_disagree_are_refused_before_the_first_step(
    group: Group, own: Any, named: str
) -> None:
    for each in group.run("parts", 2, {"ranks": {"1": own}}):
        kind, text = each["error"]
        assert kind == "WorkerError"
        assert named in text
        assert len(text.splitlines()) == 3


def test_a_worker_that_hangs_is_named_with_its_step(group: Group, tmp_path: Path) -> None:
    """Worker 1 hangs until worker 0 has ended."""
    options = {"ranks": {"1": {"hangs": True}}, "ended": str(tmp_path / "ended"), "timeout": 2}
    first, _ = group.run("parts", 2, options)
    assert first["error"][0] == "WorkerError"
    assert "worker 0 of 2, step 1: " in first["error"][1]
    assert "after at most 2 s" in first["error"][1]
    assert "worker 1 in step 0" in first["error"][1]


def test_a_worker_that_dies_is_an_error_of_the_others(group: Group) -> None:
    first, second = group.run("parts", 2, {"ranks": {"1": {"dies": True}}, "timeout": 5})
    assert first["error"][0] == "WorkerError"
    assert second == {"exit": 7}


@pytest.mark.parametrize(
    ("size", "options", "text"),
    [
        (2, {"microbatches": 3, "reduction": "fast"}, "microbatches: 3 cannot be shared out to 2"),
        (2, {"microbatches": 6}, "microbatches: 6 are 3 for each of 2 workers"),
        (4, {"microbatches": 2}, "microbatches: 2 cannot be shared out to 4"),
    ],
)
def test_a_world_that_does_not_divide_the_micro_batches_is_refused(
    group: Group, size: int, options: Any, text: str
) -> None:
    for each in group.run("steps", size, {"step": options}):
        assert each["error"][0] == "ConfigError"
        assert each["error"][1].startswith(text)


def test_buffers_that_the_forward_writes_are_refused(group: Group) -> None:
    for each in group.run("moving", 2):
        assert each["error"][0] == "ArchitectureError"
        assert each["error"][1].startswith("buffers/scale: the forward writes to it")
    for each in group.run("moving", 2, {"normed": True}):
        assert each["error"][0] == "ConfigError"
        assert "BatchNorm" in each["error"][1]


@pytest.mark.parametrize("read", ["form", "gate", "pick", "mask"])
def test_a_block_whose_parameter_is_read_outside_of_it_is_refused_in_shards(
    group: Group, read: str
) -> None:
    """Its form is anybody's; its values are nowhere then, whatever their dtype."""
    options = {"read": read, "steps": 1, "step": {"ema_decay": None, "microbatches": 2}}
    alone = group.alone(options)
    for each in group.run("steps", 2, _with(options, sharded=True)):
        if read == "form":
            assert each == {"value": alone}
        else:
            assert each["error"][0] == "ArchitectureError"
            assert each["error"][1].startswith(f"layers.1.{read}: is read outside of its block")


def test_a_worker_that_is_missing_at_the_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**environment, "MASTER_PORT": str(free_port())}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ft.errors.WorkerError, match=r"worker 0 of 2: the meeting of all workers"):
        ft.distributed.world(timeout=1)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [("WORLD_SIZE", "two", "WORLD_SIZE: 'two'"), ("RANK", "2", "RANK: 2 of WORLD_SIZE 2")],
)
def test_an_environment_that_makes_no_sense_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, text: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=text):
        ft.distributed.world()


def test_a_timeout_is_a_number_of_seconds() -> None:
    with pytest.raises(ConfigError, match="timeout: 0"):
        ft.distributed.world(timeout=0)


def test_restarts_with_shared_addresses_are_warned_of(group: Group) -> None:
    first, _ = group.run("restarting", 2)
    assert first["error"][0] == "FunctrainWarning"
