"""Two checkpoints beside each other: what differs is named, and nothing else."""

from __future__ import annotations

from pathlib import Path

import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st

import functrain as ft
from functrain.checkpoint.compare import compare_checkpoints, differences


def test_what_differs_is_measured() -> None:
    one = {"a": torch.tensor([1.0, 2.0, -0.0]), "n": 1, "s": "x", "only": 3}
    other = {"a": torch.tensor([1.0, 2.5, 0.0]), "n": 2, "s": "x"}
    found = {each.path: each for each in differences(one, other)}
    assert found.keys() == {"a", "n", "only"}
    assert (found["a"].elements, found["a"].bits, found["a"].largest) == (2, 2, 0.5)
    assert str(found["a"]) == "a: float32 [3], 2 elements differ in 2 bits, by 0.5 at most"
    assert str(found["n"]) == "n: 1 and 2"
    assert str(found["only"]) == "only: 3 and not there"


def test_forms_that_differ_are_named() -> None:
    one = {"a": torch.zeros(2), "b": torch.zeros(2), "c": torch.zeros(2), "d": 1}
    other = {"a": torch.zeros(3), "b": torch.zeros(2).double(), "c": 0.0, "d": True}
    said = [str(each) for each in differences(one, other)]
    assert said == [
        "a: float32 [2] and float32 [3]",
        "b: float32 [2] and float64 [2]",
        "c: float32 [2] and 0.0",
        "d: 1 and True",
    ]


def test_what_is_not_a_number_equals_itself() -> None:
    bits = {"a": torch.tensor([float("nan"), float("inf")]), "x": float("nan")}
    assert not list(differences(bits, dict(bits.items())))


@given(
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool]),
    st.integers(1, 40),
    st.data(),
)
def test_one_changed_element_is_one_difference(
    dtype: torch.dtype, size: int, data: st.DataObject
) -> None:
    tensor = torch.arange(size).to(dtype)
    changed = tensor.clone()
    place = data.draw(st.integers(0, size - 1))
    changed[place] = 1 - changed[place].to(torch.int64)
    found = list(differences({"t": tensor}, {"t": changed}))
    assert len(found) == (0 if torch.equal(tensor, changed) else 1)
    if found:
        assert found[0].elements == 1


def test_checkpoints_are_compared_as_states_are(tmp_path: Path) -> None:
    architecture, params, buffers = zoo.split("normed")
    step = ft.pretrain_step(architecture, ft.optim.adamw(1e-2))
    first = step.init(params, buffers)
    second, _ = step(first, zoo.batch())
    paths = [ft.save(tmp_path, state) for state in (first, second)]
    found = {each.path for each in compare_checkpoints(*paths)}
    prints = [ft.fingerprints(state) for state in (first, second)]
    assert found == {path for path in prints[0] if prints[0][path] != prints[1][path]}
    assert not list(compare_checkpoints(paths[0], paths[0]))
