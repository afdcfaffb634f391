"""A plan: what falls with the workers, what an exchange takes, and what is refused."""

from __future__ import annotations

import functools
import math
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from workers import Group

import functrain as ft
from functrain.errors import ConfigError
from functrain.models import DecoderConfig, bare, decoder
from functrain.planning import Cluster, Job, Plan, Work, cluster, count, plan, planned
from functrain.planning.counting import total
from functrain.precision import POLICIES

SHAPE = DecoderConfig(vocabulary=512, width=256, layers=4, heads=4)
ARCHITECTURE, PARAMS, BUFFERS = bare(lambda: decoder(SHAPE))
JOB = Job(
    architecture=ARCHITECTURE,
    params=PARAMS,
    buffers=BUFFERS,
    optimizer=ft.optim.adamw(),
    rows=1024,
    time=32,
    microbatches=512,
)


@functools.cache
def _work() -> Work:
    return count(JOB)


CLUSTER = Cluster(
    workers=1, memory=1e9, flops=1e12, traffic=1e11, inside=1e10, between=1e9, latency=1e-5
)


def _plan(workers: int, *, canonical: bool = False, job: Job = JOB, **options: Any) -> Plan:
    return planned(
        job, attrs.evolve(CLUSTER, workers=workers, **options), _work(), canonical=canonical
    )


@given(st.integers(0, 8), st.booleans())
def test_what_is_kept_falls_with_the_workers_where_it_is_sharded(
    power: int, canonical: bool
) -> None:
    size = 2**power
    found, alone = _plan(size, canonical=canonical), _plan(1, canonical=canonical)
    for name in ("params", "moments"):
        assert found.replicated.memory[name] == alone.replicated.memory[name]
        # Of some tensors workers have different numbers of rows.
        part, row = alone.sharded.memory[name] / size, 4 * SHAPE.feed_forward
        assert part <= found.sharded.memory[name] <= part + 3 * row * len(PARAMS)
    assert alone.sharded == alone.replicated
    for layout in (found.replicated, found.sharded):
        tokens = JOB.rows * JOB.time
        assert layout.tokens_per_second * layout.step == pytest.approx(tokens)
        computing = 512 // size * _work().flops / 1e12
        assert layout.seconds["computing"] == pytest.approx(computing)


@given(st.sampled_from([2, 4, 8, 64]), st.floats(1e8, 1e12), st.floats(1e-6, 1e-3))
def test_an_exchange_takes_its_bytes_and_its_latency(
    size: int, bandwidth: float, latency: float
) -> None:
    options = {"inside": bandwidth, "between": bandwidth, "latency": latency, "beside": False}
    found = _plan(size, **options)
    gradients = total(_work().gradients)
    sums = math.ceil(gradients / (25 << 20))
    expected = 2 * (size - 1) / size * gradients / bandwidth + sums * latency * math.log2(size)
    assert found.replicated.seconds["exchange"] == pytest.approx(expected)
    own = 512 // size
    blocks = [unit for unit, _ in _work().units[1:]]
    passed = _work().units[0][0] + own * (2 * sum(blocks) + gradients)
    times = 1 + own * (3 * len(blocks) + 1)
    expected = (size - 1) / size * passed / bandwidth + times * latency * math.log2(size)
    assert found.sharded.seconds["exchange"] == pytest.approx(expected)
    hidden = _plan(size, **{**options, "beside": True}).replicated.seconds["exchange"]
    backward = 2 / 3 * _work().flops / 1e12
    full = found.replicated.seconds["exchange"]
    assert hidden == pytest.approx(max(0, full - backward))


@given(st.sampled_from([2, 4, 8, 64]), st.floats(1e8, 1e13))
def test_of_shards_what_no_computation_is_beside_takes_its_time(
    size: int, bandwidth: float
) -> None:
    """The first block of each pass, and the sums of the last block and of what is in none."""
    options = {"inside": bandwidth, "between": bandwidth, "latency": 1e-15}
    found = _plan(size, **options, beside=True).sharded.seconds
    whole = _plan(size, **options, beside=False).sharded.seconds["exchange"]
    own, part = JOB.microbatches // size, (size - 1) / size
    root, first, *_ = _work().units
    alone = root[0] + own * (2 * first[0] + first[1] + root[1])
    expected = max(part * alone / bandwidth, whole - found["computing"])
    assert found["exchange"] == pytest.approx(expected)
    assert 0 < found["exchange"] < whole


def test_between_nodes_the_slower_link_counts() -> None:
    assert _plan(8).cluster.bandwidth == 1e10
    assert _plan(16).cluster.bandwidth == 1e9
    assert _plan(16, per_node=16).cluster.bandwidth == 1e10


def test_a_tree_keeps_as_many_sums_as_branches_wait() -> None:
    gradients = _plan(64).replicated.memory["gradients"]
    for workers, sets in ((512, 1), (256, 1), (128, 2), (64, 3)):
        found = _plan(workers, canonical=True).replicated.memory["gradients"]
        assert found == sets * gradients


def test_a_pure_step_has_room_for_two_states() -> None:
    pure = _plan(1, job=attrs.evolve(JOB, donate=False))
    donated = _plan(1)
    assert pure.replicated.memory["update"] == (
        donated.replicated.memory["params"] + donated.replicated.memory["moments"]
    )


def test_devices_are_known_by_their_precision() -> None:
    half = cluster("h100", 8, POLICIES["bf16"])
    single = cluster("h100", 8, POLICIES["fp32"])
    assert half.flops == pytest.approx(0.4 * 989e12)
    assert single.flops < half.flops / 10
    assert cluster("h100", 8, "bf16") == half
    assert cluster("h100", 8, POLICIES["bf16"], utilisation=0.5, memory=1e9).memory == 1e9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "h1000"}, "device: 'h1000' is unknown; did you mean 'h100'"),
        ({"utilisation": 40}, r"utilisation: 40, expected a number in \(0, 1\]"),
        ({"workers": 0}, "workers: 0, expected an integer of at least 1"),
        ({"inside": -1.0}, "inside: -1.0, expected a positive finite number"),
        ({"latency": float("nan")}, "latency: nan, expected a positive finite number"),
    ],
)
def test_bad_clusters_are_refused(options: dict[str, Any], message: str) -> None:
    given = {"name": "h100", "workers": 8, "precision": POLICIES["bf16"], **options}
    with pytest.raises(ConfigError, match=message):
        cluster(**given)


def test_micro_batches_that_cannot_be_shared_out_are_refused() -> None:
    with pytest.raises(ConfigError, match="microbatches: 512 cannot be shared out to 3 workers"):
        plan(JOB, attrs.evolve(CLUSTER, workers=3))


@pytest.mark.long
def test_this_machine_is_measured_by_its_workers(group: Group) -> None:
    first, second = group.values("measured", 2)
    assert first == second
    assert first["workers"] == 2
    assert all(value > 0 for value in first.values() if not isinstance(value, bool))
    assert not first["beside"]
