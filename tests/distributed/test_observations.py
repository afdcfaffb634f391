"""What micro-batches observe of each other reaches every worker, in whatever record it is."""

from __future__ import annotations

import programs
import pytest
from workers import Group


@pytest.mark.parametrize("kind", programs.OBSERVATIONS)
def test_a_coupled_objective_of_ones_own_is_that_of_the_whole_batch(
    group: Group, kind: str
) -> None:
    options = {"observes": kind, "layers": 1, "step": {"microbatches": 4}}
    (alone,) = group.values("steps", 1, options)
    options |= {"step": {"microbatches": 4, "sharded": kind == "dict"}}
    assert all(each == alone for each in group.values("steps", 2, options))


REFUSED = {
    "nothing": "a dict, without any tensor; between workers let observe return tensors",
    "a matrix": "a tensor of shape [1, 1]; ",
    "an array": "a ndarray, which may hold what only this worker has seen; ",
    "other keys": "its names, dtypes, texts or plain numbers are other ones on one worker",
    "other dtypes": "its names, dtypes, texts or plain numbers are other ones on one worker",
    "other numbers": "its names, dtypes, texts or plain numbers are other ones on one worker",
    "more of them": "its names, dtypes, texts or plain numbers are other ones on one worker",
}


@pytest.mark.parametrize("how", REFUSED)
def test_what_cannot_be_exchanged_is_refused(group: Group, how: str) -> None:
    """Else each worker would take its own observations for those of all."""
    for each in group.run("observing", 2, {"how": how}):
        assert each["error"][0] == "ConfigError"
        assert each["error"][1].startswith(f"observation: {REFUSED[how]}")


def test_workers_may_observe_different_numbers_of_examples(group: Group) -> None:
    assert group.values("observing", 2, {"how": "other lengths"}) == [[1.0], [1.0]]
