"""What is kept: the newest, each of every so many steps, and the best; all else goes."""

from __future__ import annotations

import math
import shutil
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
from functrain.errors import SaveWarning

LOSSES = [5.0, 3.0, math.nan, 1.0, 2.0, 1.0, 4.0, math.inf]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has saved with each of the losses, to be copied."""
    root = tmp_path_factory.mktemp("saved")
    _saved(root)
    return root


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
    named=st.lists(st.integers(0, 9), max_size=2),
)
def test_what_is_kept_is_what_one_of_the_four_holds_on_to(
    last: int,
    every: int | None,
    best: int | None,
    lower: bool,
    named: list[int],
    saved: Path,
    tmp_path_factory: Any,
) -> None:
    root = tmp_path_factory.mktemp("kept")
    shutil.copytree(saved, root, dirs_exist_ok=True)
    prune(root, Keep(last=last, every=every, best=best, lower=lower, steps=named))
    steps = range(len(LOSSES))
    expected = {step for step in steps if step in named}
    expected |= {step for step in steps if step >= len(LOSSES) - last}
    expected |= {step for step in steps if every is not None and step % every == 0}
    known = [step for step in steps if not math.isnan(LOSSES[step])]
    ranked = sorted(known, key=lambda step: (LOSSES[step] * (1 if lower else -1), -step))
    assert _left(root) == expected | set(ranked[: best or 0])
    assert ft.latest(root) == root / f"step-{len(LOSSES) - 1:012d}"


@pytest.mark.parametrize("bad", [[-1], [True], ["1"], [2.0], None, 6, "", b"6"])
def test_steps_that_cannot_be_kept_are_named(bad: Any) -> None:
    with pytest.raises(ft.CheckpointError, match=r"keep: steps=.*, expected integers of at"):
        Keep(steps=bad)


@pytest.mark.parametrize(
    "bad", [{"last": 0}, {"every": -1}, {"best": 1.5}, {"last": True}, {"last": None}]
)
def test_what_cannot_be_kept_is_named(bad: Any) -> None:
    with pytest.raises(ft.CheckpointError, match=r"keep: .* expected an integer of at least 1"):
        Keep(**bad)


@pytest.mark.parametrize(
    ("bad", "expected"),
    [({"lower": "no"}, "True or False"), ({"lower": 0}, "True"), ({"metric": 3}, "a name")],
)
def test_what_the_best_are_by_is_checked(bad: Any, expected: str) -> None:
    """A text is true: by `lower="no"` the worst would stay, and the best would go."""
    with pytest.raises(ft.CheckpointError, match=f"keep: .*expected {expected}"):
        Keep(**bad)


def test_a_writer_says_at_once_what_it_cannot_keep(tmp_path: Path) -> None:
    with pytest.raises(ft.CheckpointError, match="keep: last=0, expected an integer"):
        ft.checkpoint.BackgroundWriter(tmp_path, keep=0)


def test_a_metric_that_no_checkpoint_has_removes_none_of_the_measured(tmp_path: Path) -> None:
    """Under a name that is misspelt they all were the worst."""
    _saved(tmp_path)
    with pytest.warns(SaveWarning, match=r"best by eval_los.*has it.*eval_loss.*not removed"):
        prune(tmp_path, Keep(last=1, best=1, metric="eval_los"))
    measured = {step for step, loss in enumerate(LOSSES) if not math.isnan(loss)}
    assert _left(tmp_path) == measured
    prune(tmp_path, Keep(last=1, best=1))
    assert _left(tmp_path) == {5, 7}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": Keep(best=2)}, "keep: best=2, and nothing is evaluated; give evaluation"),
        (
            {"keep": Keep(best=2, metric="loss"), "evaluation": [zoo.batch(9)]},
            "keep: metric='loss', and checkpoints have those of an evaluation .*eval_loss",
        ),
    ],
)
def test_what_a_run_would_never_measure_is_refused(
    options: Any, message: str, tmp_path: Path
) -> None:
    architecture, params, buffers = zoo.split("tied")
    step = ft.pretrain_step(architecture, ft.optim.adamw(1e-2))
    state = step.init(params, buffers)
    with pytest.raises(ft.ConfigError, match=message):
        ft.train(step, state, zoo.Batches(), steps=2, directory=tmp_path, **options)


def test_a_failure_to_remove_is_a_warning(tmp_path: Path) -> None:
    """The run goes on: what should have gone lies about, and nothing is lost."""
    _saved(tmp_path)
    (tmp_path / "step-000000000007" / "state.json").write_bytes(b"{}")
    with pytest.warns(SaveWarning, match="old checkpoints were not removed"):
        prune(tmp_path, Keep(last=1, best=1))
    assert _left(tmp_path) == set(range(len(LOSSES)))


def test_one_of_which_nothing_is_known_stays_and_stops_nothing(tmp_path: Path) -> None:
    """It may be the best; those that are measured are ranked without it."""
    _saved(tmp_path)
    (tmp_path / "step-000000000004" / "manifest.json").write_bytes(b"{}")
    with pytest.warns(SaveWarning, match=r"step-000000000004.*not removed"):
        prune(tmp_path, Keep(last=1, best=1))
    assert _left(tmp_path) == {4, 5, 7}


@pytest.mark.parametrize("what", [".ipynb_checkpoints", "step-000000000000"])
def test_a_foreign_directory_stays_and_every_later_save_works(what: str, tmp_path: Path) -> None:
    """It is nobody's to remove, and no reason to save nothing more; all else of it goes."""
    _saved(tmp_path)
    (tmp_path / "step-000000000002" / what).mkdir()
    with pytest.warns(SaveWarning, match=f"not removed.*{what}.*remove it by hand"):
        prune(tmp_path, 3)
    assert _left(tmp_path) == {5, 6, 7}
    trash = next(tmp_path.glob(".trash-*"))
    assert [path.name for path in trash.iterdir()] == [what]
    architecture, params, buffers = zoo.split("tied")
    state = ft.pretrain_step(architecture, ft.optim.adamw()).init(params, buffers)
    for step in (2, 8):
        with pytest.warns(SaveWarning, match=f"not removed.*{what}"):
            ft.save(tmp_path, attrs.evolve(state, step=step))
    # The same step again, whose other name is taken.
    prune(tmp_path, 1)
    assert _left(tmp_path) == {8}


def _run(root: Path, state: Any, **options: Any) -> None:
    architecture, _, _ = zoo.split("tied")
    step = ft.pretrain_step(architecture, ft.optim.adamw(1e-2))
    for _ in ft.train(step, state, zoo.Batches(), directory=root, keep=2, **options):
        pass


@pytest.mark.parametrize("background", [False, True])
def test_a_run_that_has_gone_back_keeps_its_own_newest(background: bool, tmp_path: Path) -> None:
    """Those that it has gone back from neither count nor go, and are named."""
    architecture, params, buffers = zoo.split("tied")
    first = ft.pretrain_step(architecture, ft.optim.adamw(1e-2)).init(params, buffers)
    _run(tmp_path, first, steps=8, save_every=4)
    assert _left(tmp_path) == {4, 8}
    back = attrs.evolve(ft.load(tmp_path / "step-000000000004", like=first), step=1)
    with pytest.warns(SaveWarning, match="step-000000000008 would be loaded as the newest.*move"):
        _run(tmp_path, back, steps=3, save_every=1, background=background)
    assert _left(tmp_path) == {2, 3, 4, 8}


@pytest.mark.parametrize("background", [False, True])
def test_a_run_that_has_gone_back_and_removes_nothing_says_so_too(
    background: bool, tmp_path: Path
) -> None:
    """A load of the directory would find another state than the run has ended with."""
    architecture, params, buffers = zoo.split("tied")
    step = ft.pretrain_step(architecture, ft.optim.adamw(1e-2))
    state = step.init(params, buffers)
    ft.save(tmp_path, attrs.evolve(state, step=8))
    with pytest.warns(SaveWarning, match="step-000000000008 would be loaded as the newest.*move"):
        list(
            ft.train(step, state, zoo.Batches(), steps=2, directory=tmp_path, background=background)
        )
    assert _left(tmp_path) == {2, 8}


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
