"""What is kept: the newest, each of every so many steps, and the best; all else goes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import attrs
import pytest
import zoo
from hypothesis import given
from hypothesis import strategies as st

import functrain as ft
from functrain.checkpoint import Keep, prune
from functrain.checkpoint.manifest import step_of

LOSSES = [5.0, 3.0, math.nan, 1.0, 2.0, 1.0, 4.0, math.inf]


def _saved(root: Path) -> None:
    architecture, params, buffers = zoo.split("tied")
    state = ft.pretrain_step(architecture, ft.optim.adamw()).init(params, buffers)
    for step, loss in enumerate(LOSSES):
        metrics = {} if math.isnan(loss) else {"eval_loss": loss}
        ft.save(root, attrs.evolve(state, step=step), metrics=metrics)


def _left(root: Path) -> set[int]:
    return {step for path in root.iterdir() if (step := step_of(path)) is not None}


@given(
    last=st.integers(1, 9),
    every=st.none() | st.integers(1, 5),
    best=st.none() | st.integers(1, 9),
    lower=st.booleans(),
)
def test_what_is_kept_is_what_one_of_the_three_holds_on_to(
    last: int, every: int | None, best: int | None, lower: bool, tmp_path_factory: Any
) -> None:
    root = tmp_path_factory.mktemp("kept")
    _saved(root)
    prune(root, Keep(last=last, every=every, best=best, lower=lower))
    steps = range(len(LOSSES))
    expected = {step for step in steps if step >= len(LOSSES) - last}
    expected |= {step for step in steps if every is not None and step % every == 0}
    known = [step for step in steps if not math.isnan(LOSSES[step])]
    ranked = sorted(known, key=lambda step: (LOSSES[step] * (1 if lower else -1), -step))
    assert _left(root) == expected | set(ranked[: best or 0])
    assert ft.latest(root) == root / f"step-{len(LOSSES) - 1:012d}"


@pytest.mark.parametrize("bad", [{"last": 0}, {"every": -1}, {"best": 1.5}, {"last": True}])
def test_what_cannot_be_kept_is_named(bad: Any) -> None:
    with pytest.raises(ft.CheckpointError, match=r"keep: .* expected an integer of at least 1"):
        Keep(**bad)


def test_a_failure_to_remove_is_a_warning(tmp_path: Path) -> None:
    """The run goes on: what should have gone lies about, and nothing is lost."""
    _saved(tmp_path)
    (tmp_path / "step-000000000003" / "manifest.json").write_bytes(b"{}")
    with pytest.warns(ft.errors.SaveWarning, match="old checkpoints were not removed"):
        prune(tmp_path, Keep(last=1, best=1))
    assert _left(tmp_path) == set(range(len(LOSSES)))


def test_the_loop_keeps_the_best_of_its_evaluations(tmp_path: Path) -> None:
    architecture, params, buffers = zoo.split("tied")
    step = ft.pretrain_step(architecture, ft.optim.adamw(3e-2))
    measured = {}
    for state, metrics in ft.train(
        step,
        step.init(params, buffers),
        zoo.Batches(),
        steps=6,
        evaluation=[zoo.batch(99)],
        evaluate_every=1,
        directory=tmp_path,
        save_every=1,
        keep=Keep(last=1, best=1),
    ):
        measured[state.step] = float(metrics["eval_loss"])
    assert _left(tmp_path) == {6, min(measured, key=lambda step: measured[step])}
