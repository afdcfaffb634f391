"""A source with a thread ahead: the same batches, whatever is asked for, and no waiting."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st

import functrain as ft
from functrain.data import Prefetched


class Watched(zoo.Batches):
    """Remembers which thread made what; `fails`: a position that cannot be read."""

    def __init__(self, fails: int | None = None) -> None:
        super().__init__()
        self.made: list[tuple[int, str]] = []
        self.fails = fails

    def at(self, position: int, n: int) -> dict[str, Any]:
        self.made.append((position, threading.current_thread().name))
        if position == self.fails:
            raise OSError("the disk is gone")
        return super().at(position, n)


@given(
    asked=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 4)), min_size=1, max_size=8),
    ahead=st.integers(1, 3),
)
def test_the_batches_are_those_of_the_source(asked: list[tuple[int, int]], ahead: int) -> None:
    plain = zoo.Batches()
    with Prefetched(plain, ahead) as source:
        assert (len(source), source.batch_size) == (len(plain), plain.batch_size)
        for position, n in [*asked, *((4 * k, 4) for k in range(5))]:
            found, expected = source.at(position, n), plain.at(position, n)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_run_in_order_is_read_by_the_thread() -> None:
    watched = Watched()
    with Prefetched(watched, 2) as source:
        for position in range(0, 40, 4):
            source.at(position, 4)
    by_caller = [position for position, name in watched.made if not name.startswith("prefetch")]
    assert by_caller == [0]
    assert sorted(position for position, _ in watched.made)[:10] == list(range(0, 40, 4))
    before = threading.active_count()
    assert source.at(8, 4)  # closed: made at once
    assert threading.active_count() == before


def test_a_failure_is_raised_where_its_batch_is_asked_for() -> None:
    with Prefetched(Watched(fails=8), 3) as source:
        source.at(0, 4)
        source.at(4, 4)
        with pytest.raises(OSError, match="the disk is gone") as caught:
            source.at(8, 4)
        assert caught.value.__notes__ == ["samples 8 to 11"]
        source.at(12, 4)


class Alone(zoo.Batches):
    """A source that two threads at once would spoil, as they do a file's position."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.most = 0, 0

    def at(self, position: int, n: int) -> dict[str, Any]:
        self.inside += 1
        self.most = max(self.most, self.inside)
        time.sleep(0.002)
        self.inside -= 1
        return super().at(position, n)


@given(
    positions=st.lists(st.sampled_from([0, 4, 8, 40, 44]), min_size=1, max_size=8),
    ahead=st.integers(1, 3),
)
def test_a_source_is_asked_by_one_thread_at_a_time(positions: list[int], ahead: int) -> None:
    """Also where another position than the next is asked for, while the next is in the making."""
    alone = Alone()
    with Prefetched(alone, ahead) as source:
        for position in positions:
            source.at(position, 4)
    assert alone.most == 1


def test_waiting_is_counted() -> None:
    class Slow(zoo.Batches):
        def at(self, position: int, n: int) -> dict[str, Any]:
            time.sleep(0.05)
            return super().at(position, n)

    with Prefetched(Slow()) as source:
        source.at(0, 4)
        first = source.waited
        assert first >= 0.05
        time.sleep(0.5)  # the next is made meanwhile
        source.at(4, 4)
        assert source.waited - first < 0.05


def test_training_is_the_same_to_the_bit() -> None:
    ends = []
    for ahead in (None, 2):
        architecture, params, buffers = zoo.split("decoder")
        step = ft.pretrain_step(architecture, ft.optim.adamw(1e-2))
        plain = zoo.Batches()
        source: Any = plain if ahead is None else Prefetched(plain, ahead)
        *_, (state, _) = ft.train(step, step.init(params, buffers), source, steps=5)
        ends.append(ft.fingerprint(state))
        if ahead is not None:
            source.close()
    assert ends[0] == ends[1]


def test_a_part_of_each_batch_is_made_ahead_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a tree reads it, in micro-batches; the same bits, and the first batch alone is waited for.

    What is read otherwise at the same position is another thing.
    """
    ends = []
    for ahead in (False, True):
        architecture, params, buffers = zoo.split("decoder")
        step = ft.pretrain_step(
            architecture, ft.optim.adamw(1e-2), microbatches=2, reduction="canonical"
        )
        watched = Watched()
        source: Any = Prefetched(watched) if ahead else watched
        *_, (state, _) = ft.train(step, step.init(params, buffers), source, steps=5)
        ends.append(ft.fingerprint(state))
        if ahead:
            source.close()
            mine = [position for position, name in watched.made if not name.startswith("prefetch")]
            assert mine == [0, 2]
    assert ends[0] == ends[1]
    with Prefetched(zoo.Batches()) as both:
        both.at(0, 4)
        assert isinstance(both.read(lambda source, at, n: [source.at(at, n)], 4, 4), list)
        assert isinstance(both.at(8, 4), dict)


@pytest.mark.parametrize("ahead", [0, -1, True, 1.5])
def test_a_count_that_is_none_is_refused(ahead: Any) -> None:
    with pytest.raises(ft.DataError, match=r"ahead: .* expected an integer of at least 1"):
        Prefetched(zoo.Batches(), ahead)


class Loader:
    """A stream: what comes next is known to it alone."""

    batch_size = 4

    def after(self, loader: str | None) -> Any:
        raise NotImplementedError


def test_a_stream_is_refused_by_name() -> None:
    stream: Any = Loader()
    with pytest.raises(ft.DataError, match=r"Loader has no at\(position, n\).*own loader"):
        Prefetched(stream)
