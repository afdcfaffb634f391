"""`train`: a generator over (state, metrics); evaluation and saving are arguments."""

from __future__ import annotations

import itertools
import types
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
import zoo

import functrain as ft
from functrain import testing
from functrain.checkpoint.filesystem import OPERATING_SYSTEM
from functrain.checkpoint.manifest import checkpoints, read_manifest, step_of
from functrain.errors import SaveWarning
from functrain.loop import conditions
from functrain.metrics import mean
from functrain.objectives import LanguageModeling


def _run(name: str = "tied", **options: Any) -> tuple[Any, Any]:
    architecture, params, buffers = zoo.split(name)
    step = ft.pretrain_step(architecture, ft.optim.adamw(1e-2), **options)
    return step, step.init(params, buffers, seed=1)


def test_the_loop_is_the_loop_that_one_would_write() -> None:
    step, state = _run()
    source, by_hand = zoo.Batches(), state
    tokens = 0
    for count in range(5):
        batch = source.at(count * 4, 4)
        by_hand, metrics = step(by_hand, batch)
        tokens += int(metrics["num_tokens"])
        cursor = ft.Cursor(samples=(count + 1) * 4, tokens=tokens)
        by_hand = attrs.evolve(by_hand, cursor=cursor)
    *_, (last, _) = ft.train(step, state, source, steps=5)
    assert ft.fingerprint(last) == ft.fingerprint(by_hand)


@pytest.mark.parametrize(
    ("total", "expected"), [({"steps": 7}, 7), ({"epochs": 1}, 10), ({"epochs": 0.5}, 5)]
)
def test_totals_count_from_the_beginning_of_the_stage(total: Any, expected: int) -> None:
    step, state = _run()
    states = [now for now, _ in ft.train(step, state, zoo.Batches(), **total)]
    assert [now.step for now in states] == list(range(1, expected + 1))
    assert list(ft.train(step, states[-1], zoo.Batches(), **total)) == []
    rest = [now for now, _ in ft.train(step, states[1], zoo.Batches(), **total)]
    assert ft.fingerprint(rest[-1]) == ft.fingerprint(states[-1])


def test_tokens_are_targets_trained_on() -> None:
    step, state = _run()
    seen = 0.0
    for now, metrics in ft.train(step, state, zoo.Batches(), tokens=100):
        assert seen < 100
        seen += float(metrics["num_tokens"])
        assert now.cursor.tokens == seen
    assert seen >= 100


def test_the_body_can_stop_branch_and_replace_the_state() -> None:
    step, state = _run()
    run = ft.train(step, state, zoo.Batches(), steps=4)
    first, _ = next(run)
    second, _ = next(run)
    assert second.step == 2
    echoed, _ = run.send(first)  # back to the first state: the run goes on from there
    assert echoed is first
    again, _ = next(run)
    assert ft.fingerprint(again) == ft.fingerprint(second)
    run.close()


def test_evaluations_are_in_the_metrics_and_change_no_bit() -> None:
    step, state = _run()
    held_out = [zoo.batch(100), zoo.batch(101)]
    plain = list(ft.train(step, state, zoo.Batches(), steps=5))
    measured = list(
        ft.train(step, state, zoo.Batches(), steps=5, evaluation=held_out, evaluate_every=2)
    )
    assert [("eval_loss" in metrics) for _, metrics in measured] == [False, True, False, True, True]
    assert ft.fingerprint(plain[-1][0]) == ft.fingerprint(measured[-1][0])
    final, metrics = measured[-1]
    assert metrics["eval_loss"] == ft.evaluate(step, final, held_out)["eval_loss"]


def test_a_plateau_schedule_sees_the_evaluations() -> None:
    schedule = ft.schedules.reduce_on_plateau(1e-2, patience=0, threshold=1e9, threshold_mode="abs")
    step, state = _run(schedule=schedule)
    rates = [
        float(metrics["learning_rate"])
        for _, metrics in ft.train(
            step, state, zoo.Batches(), steps=4, evaluation=[zoo.batch(100)], evaluate_every=1
        )
    ]
    # The first value is an improvement on infinity; no later one improves by 1e9.
    assert rates == pytest.approx([1e-2, 1e-2, 1e-3, 1e-4])


def test_states_are_saved_before_they_are_yielded(tmp_path: Path) -> None:
    step, state = _run()
    run = ft.train(step, state, zoo.Batches(), steps=5, directory=tmp_path, save_every=2, keep=2)
    for now, _ in run:
        if now.step in (2, 4, 5):
            assert ft.latest(tmp_path) == tmp_path / f"step-{now.step:012d}"
            assert ft.fingerprint(ft.load(tmp_path, like=state)) == ft.fingerprint(now)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == [
        "step-000000000004",
        "step-000000000005",
    ]


@pytest.mark.parametrize("background", [False, True])
def test_what_lies_with_each_state_of_a_run(background: bool, tmp_path: Path) -> None:
    """The evaluation's metrics of that step alone, what its bits depend on, and the texts."""
    step, state = _run(precision="bf16", microbatches=2)
    run = ft.train(
        step,
        state,
        zoo.Batches(),
        steps=3,
        evaluation=[zoo.batch(100)],
        evaluate_every=2,
        directory=tmp_path,
        save_every=1,
        background=background,
        beside={"config.json": "{}\n"},
    )
    measured = [metrics.to_dict() for _, metrics in run]
    found = checkpoints(tmp_path)
    assert len(found) == len(measured) == 3
    for path, metrics in zip(found, measured, strict=True):
        manifest = read_manifest(OPERATING_SYSTEM, path)
        evaluated = {name: value for name, value in metrics.items() if name.startswith("eval_")}
        assert manifest.metrics == evaluated
        assert manifest.numerics.items() >= conditions(step, zoo.Batches().batch_size).items()
        assert (path / "config.json").read_text() == "{}\n"
    assert "eval_loss" in measured[1].keys() & measured[2].keys() - measured[0].keys()


@pytest.mark.parametrize("on_save_error", ["stop", "continue"])
def test_a_save_that_fails_in_the_background_is_met_at_the_next_step(
    on_save_error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Waiting(ft.checkpoint.BackgroundWriter):
        """Whose saves have ended when it is asked."""

        def check(self) -> None:
            self.wait()

    monkeypatch.setattr("functrain.loop.BackgroundWriter", Waiting)
    step, state = _run()
    ft.save(tmp_path, attrs.evolve(state, step=2))  # which the run's own must not replace
    run = ft.train(
        step,
        state,
        zoo.Batches(),
        steps=6,
        directory=tmp_path,
        save_every=2,
        background=True,
        on_save_error=on_save_error,
    )
    assert [now.step for now, _ in itertools.islice(run, 2)] == [1, 2]
    if on_save_error == "stop":
        with pytest.raises(ft.CheckpointError, match="holds another state"):
            next(run)
        return
    with pytest.warns(SaveWarning, match="holds another state"):
        next(run)
    *_, (last, _) = run
    assert [step_of(path) for path in checkpoints(tmp_path)] == [2, 4, 6]
    assert ft.fingerprint(ft.load(tmp_path, like=state)) == ft.fingerprint(last)


def test_a_donating_run_equals_a_pure_one(tmp_path: Path) -> None:
    step, state = _run()
    donating = attrs.evolve(step, donate=True)
    options: dict[str, Any] = {"steps": 4, "directory": tmp_path, "save_every": 2}
    *_, (pure, _) = ft.train(step, state, zoo.Batches(), steps=4)
    start = ft.clone(state)
    *_, (donated, _) = ft.train(donating, start, zoo.Batches(), **options)
    assert ft.fingerprint(pure) == ft.fingerprint(donated)
    with pytest.raises(ft.ConsumedStateError):
        _ = start.params


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "give an end: steps"),
    ({"steps": 0}, "steps: 0, expected an integer of at least 1"),
    ({"steps": 2.5}, "steps: 2.5"),
    ({"steps": 1, "batch_size": 0}, "batch_size: 0"),
    ({"steps": 1, "evaluate_every": 2}, "nothing to evaluate"),
    ({"steps": 1, "save_every": 2}, "save_every: there is nowhere to save"),
    ({"steps": 1, "keep": 2}, "keep: there is nowhere to save"),
    ({"steps": 1, "background": True}, "background: there is nowhere to save"),
    ({"steps": 1, "beside": {"a.txt": "b"}}, "beside: there is nowhere to save"),
    ({"steps": 1, "evaluation": []}, "evaluation: no batches"),
    ({"steps": 1, "evaluation": zoo.batch()}, r"evaluation: one batch; .*\[batch\]"),
    ({"steps": 1, "evaluation": [zoo.batch(), {"input_ids": 1}]}, "evaluation batch 1: labels"),
    ({"steps": 1, "evaluation": zoo.Batches()}, "evaluation: expected batches.*all_batches"),
    ({"epochs": 0}, "epochs: 0, expected a positive number"),
    ({"epochs": -1}, "epochs: -1"),
    ({"epochs": 1e-6}, "epochs: 1e-06, .* of at least one of the source's 40"),
    ({"epochs": float("nan")}, "epochs: nan"),
    ({"epochs": float("inf")}, "epochs: inf"),
    ({"epochs": "1"}, "epochs: '1'"),
    ({"steps": 1, "background": "no"}, "background: 'no', expected True or False"),
    ({"steps": 1, "background": 1}, "background: 1, expected True or False"),
    ({"steps": 1, "directory": ""}, r"directory: '', expected a path"),
    ({"steps": 1, "directory": 3}, "directory: 3, expected a path"),
    ({"steps": 1, "directory": __file__}, r"directory: .*\.py is a file, expected a directory"),
    ({"steps": 1, "beside": 3}, "beside: 3, expected a mapping of file names to texts"),
    ({"steps": 1, "beside": {"a.txt": 3}}, r"beside: a\.txt is 3, expected a text"),
    ({"steps": 1, "beside": {"a.py": ""}}, r"beside: 'a\.py', expected a plain name"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_arguments_are_answered_at_the_call(options: Any, message: str) -> None:
    step, state = _run()
    with pytest.raises((ft.ConfigError, ft.BatchError), match=message):
        ft.train(step, state, zoo.Batches(), **options)


def test_a_misplaced_argument_is_named() -> None:
    step, state = _run()
    with pytest.raises(ft.ConfigError, match=r"expected \(step, state, source\), got TrainState"):
        ft.train(state, step, zoo.Batches(), steps=1)  # type: ignore[arg-type]
    with pytest.raises(ft.ConfigError, match=r"type list has no at\(position, n\)"):
        ft.train(step, state, [zoo.batch()], steps=1)  # type: ignore[arg-type]
    sizeless = type("Own", (), {"at": lambda self, position, n: zoo.batch(position, n)})()
    with pytest.raises(ft.ConfigError, match="batch_size: a source of the type Own has none"):
        ft.train(step, state, sizeless, steps=1)
    next(ft.train(step, state, sizeless, steps=1, batch_size=2))
    run = ft.train(step, state, zoo.Batches(), steps=2)
    next(run)
    with pytest.raises(ft.StateError, match=r"send: expected a TrainState, .* got int"):
        run.send(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [{}, None, 3, {"input_ids": [1]}, {"labels": [1]}], ids=repr)
def test_a_sources_bad_batch_is_named(bad: Any) -> None:
    class Bad(zoo.Batches):
        def at(self, position: int, n: int) -> Any:
            return bad

    step, state = _run()
    with pytest.raises(ft.BatchError):
        next(ft.train(step, state, Bad(), steps=1))


def test_a_source_may_give_ready_micro_batches() -> None:
    class Ready(zoo.Batches):
        def at(self, position: int, n: int) -> Any:
            return [zoo.batch(position, 3), zoo.batch(position + 1, n - 3, time=5)]

    step, state = _run()
    state, metrics = next(ft.train(step, state, Ready(), steps=1))
    assert state.cursor.samples == 4
    assert state.cursor.tokens == float(metrics["num_tokens"])


def test_tokens_of_pairs_are_those_of_both_sides() -> None:
    architecture, params, buffers = zoo.split("tied")
    step = ft.dpo_step(architecture, ft.optim.adamw(), reference=ft.trees.clone(params))
    ((state, metrics),) = ft.train(
        step, step.init(params, buffers), zoo.Batches(zoo.pairs), steps=1
    )
    sides = [(zoo.pairs()[s]["labels"][:, 1:] != -100).sum() for s in ("chosen", "rejected")]
    assert state.cursor.tokens == int(sum(sides)) == float(metrics["num_tokens"])


class Regression:
    """An objective of one's own, over batches that have no tokens."""

    name, mode, batch_coupled = "regression", "train", False

    def check(self, batch: Any, vocabulary: Any) -> None:
        assert set(batch) <= {"x", "labels"}

    def weight(self, batch: Any) -> Any:
        return torch.tensor(len(batch["x"]))

    def check_weight(self, weight: Any) -> None:
        assert weight > 0

    def __call__(self, model: Any, batch: Any) -> Any:
        total = model(batch["x"]).square().sum()
        return total, ft.Metrics({"loss": mean(total, self.weight(batch))})

    def kept(self) -> None:
        return None


@pytest.mark.parametrize(
    "labels", [None, torch.zeros(4, dtype=torch.int64), torch.zeros(4, 2)], ids=["none", "1d", "2d"]
)
def test_an_objective_of_ones_own_is_trained_on_batches_of_its_own(
    labels: Any, tmp_path: Path
) -> None:
    """Without tokens none are counted, and a total of them, never reached, is refused."""

    class Numbers(zoo.Batches):
        def at(self, position: int, n: int) -> Any:
            x = torch.arange(position, position + n).view(n, 1) / 10
            return {"x": x} if labels is None else {"x": x, "labels": labels}

    architecture, params, buffers = ft.split(torch.nn.Linear(1, 2))
    objective: Any = Regression()
    step = ft.make_step(objective, ft.optim.sgd(0.1), architecture=architecture, microbatches=2)
    state = step.init(params, buffers)
    testing.assert_resumable(step, state, Numbers(), 3, tmp_path)
    held_out = [Numbers().at(8, 4)]
    *_, (last, measured) = ft.train(step, state, Numbers(), steps=3, evaluation=held_out)
    assert last.cursor == ft.Cursor(samples=12, tokens=0)
    assert float(measured["eval_loss"]) < float(measured["loss"])
    with pytest.raises(ft.ConfigError, match=r"tokens: the batch has no labels, int64 \[batch, t"):
        next(ft.train(attrs.evolve(step, donate=True), state, Numbers(), tokens=100))
    assert ft.fingerprint(state)  # which no step has been given


def test_where_a_stream_was_a_source_is_not_gone_on_with() -> None:
    """It would begin at the stream's number of samples, and pass over those before."""
    step, state = _run()
    written = '{"kind": "grain", "samples": 8, "state": null}'
    state = attrs.evolve(state, cursor=ft.Cursor(samples=8, loader=written))
    with pytest.raises(ft.ConfigError, match="has consumed 8 samples of a stream"):
        ft.train(step, state, zoo.Batches(), steps=4)
    for own in (None, "{}", "not JSON", '{"kind": "mine"}'):  # of a loop of one's own
        begun = attrs.evolve(state, cursor=ft.Cursor(samples=8, loader=own))
        *_, (last, _) = ft.train(step, begun, zoo.Batches(), steps=1)
        assert last.cursor.samples == 12


class Ending(zoo.Batches):
    """Runs out of data after two batches, or gives what it has left."""

    def __init__(self, left: int | None) -> None:
        super().__init__(length=10)
        self._left = left

    def at(self, position: int, n: int) -> dict[str, Any]:
        if position >= 8:
            if self._left is None:
                raise StopIteration
            n = self._left
        return super().at(position, n)


@pytest.mark.parametrize(
    ("left", "message"),
    [
        (None, "the data have ended after 8 samples"),
        (2, r"source: at\(position, 4\) gave 2 samples"),
    ],
)
@pytest.mark.parametrize("ahead", [False, True])
def test_a_source_that_ends_is_told_so(left: int | None, message: str, ahead: bool) -> None:
    """A position that is off would be so for the rest of the run."""
    step, state = _run()
    source: Any = Ending(left)
    source = ft.data.Prefetched(source) if ahead else source
    run = ft.train(step, state, source, steps=4)
    with pytest.raises(ft.DataError, match=message):
        list(run)


class Packed(zoo.Batches):
    """Lays its documents into one row."""

    def at(self, position: int, n: int) -> dict[str, Any]:
        found = super().at(position, n)
        found["labels"][:, 0] = -100
        places = torch.arange(8).repeat(n).unsqueeze(0)
        rows = {key: found[key].reshape(1, -1) for key in ("input_ids", "labels")}
        return {**rows, "position_ids": places}


class Several(LanguageModeling):
    """An objective of one's own, with several rows to a sample."""


def test_rows_need_not_be_samples() -> None:
    """Of packed documents, and for an objective of one's own."""
    step, state = _run(name="decoder")
    *_, (last, _) = ft.train(step, state, Packed(), steps=2)
    assert last.cursor.samples == 8
    architecture, params, buffers = zoo.split("tied")
    step = ft.make_step(Several(), ft.optim.adamw(), architecture=architecture)
    source = Ending(left=2)
    *_, (last, _) = ft.train(step, step.init(params, buffers), source, steps=3)
    assert last.cursor.samples == 12


def test_nor_where_a_state_of_a_stream_is_sent() -> None:
    step, state = _run()
    written = '{"kind": "grain", "samples": 8, "state": null}'
    other = attrs.evolve(state, cursor=ft.Cursor(samples=8, loader=written))
    run = ft.train(step, state, zoo.Batches(), steps=4)
    next(run)
    with pytest.raises(ft.ConfigError, match="send: the state has consumed 8 samples of a stream"):
        run.send(other)


def test_the_first_total_to_be_reached_ends_it() -> None:
    step, state = _run()
    for totals in ({"steps": 2, "tokens": 10**6}, {"steps": 10**6, "epochs": 0.2}):
        run = ft.train(step, state, zoo.Batches(), **totals)
        assert len(list(itertools.islice(run, 4))) == 2


def test_the_batch_is_at_the_cursor_whatever_the_batches_before_were() -> None:
    """And what a loader left in the cursor stays there."""

    class Asked(zoo.Batches):
        asked: tuple[Any, ...] = ()

        def at(self, position: int, n: int) -> Any:
            self.asked = (*self.asked, (position, n))
            return super().at(position, n)

    step, state = _run()
    state = attrs.evolve(state, cursor=ft.Cursor(loader="{}"))
    source = Asked()
    *_, (state, _) = ft.train(step, state, source, steps=2, batch_size=3)
    *_, (state, _) = ft.train(step, state, source, steps=4)
    assert source.asked == ((0, 3), (3, 3), (6, 4), (10, 4))
    assert (state.cursor.samples, state.cursor.loader) == (14, "{}")


def test_what_a_plateau_schedule_sees_is_the_evaluations_loss() -> None:
    step, state = _run(schedule=ft.schedules.reduce_on_plateau(1e-2))
    ((state, metrics),) = ft.train(
        step, state, zoo.Batches(), steps=1, evaluation=[zoo.batch(100)], evaluate_every=1
    )
    assert state.scheduler.plateau.best == float(metrics["eval_loss"]) != float(metrics["loss"])


def test_a_plateau_schedule_that_would_see_no_evaluation_is_refused() -> None:
    step, state = _run(schedule=ft.schedules.reduce_on_plateau(1e-2))
    with pytest.raises(ft.ConfigError, match=r"^evaluate_every: not given, and reduce_on_plateau"):
        ft.train(step, state, zoo.Batches(), steps=1, evaluation=[zoo.batch(100)])
    assert len(list(ft.train(step, state, zoo.Batches(), steps=1))) == 1  # told in another way


def test_where_a_run_ends_changes_nothing_of_what_a_plateau_schedule_has_seen() -> None:
    """The evaluation of the last step is measured; it is seen only where another total has it."""
    schedule = ft.schedules.reduce_on_plateau(1e-2, patience=0, threshold=1e9, threshold_mode="abs")
    step, first = _run(schedule=schedule)
    every: Any = {"evaluation": [zoo.batch(100)], "evaluate_every": 2}
    whole = {s.step: s for s, _ in ft.train(step, first, zoo.Batches(), steps=6, **every)}
    for end in (2, 3):
        *_, (state, metrics) = ft.train(step, first, zoo.Batches(), steps=end, **every)
        assert "eval_loss" in metrics
        assert ft.fingerprint(state) == ft.fingerprint(whole[end])
        *_, (state, _) = ft.train(step, state, zoo.Batches(), steps=6, **every)
        assert ft.fingerprint(state) == ft.fingerprint(whole[6])


@pytest.mark.parametrize(
    "other",
    [
        {"precision": "bf16"},
        {"microbatches": 2},
        {"reduction": "canonical"},
        {"compile": True},
        {"compile": True, "checkpoint": "mix"},
        {"batch_size": 8},
    ],
    ids=repr,
)
def test_what_changes_the_bits_of_a_run_changes_its_conditions(other: dict[str, Any]) -> None:
    """So that whoever resumes under others is told; each beside what is least unlike it."""
    step, _ = _run(compile="checkpoint" in other)
    given = {"batch_size": 4, **other}
    size = given.pop("batch_size")
    assert conditions(attrs.evolve(step, **given), size) != conditions(step, 4)


def test_so_do_the_head_and_the_layout_of_an_objective(tmp_path: Path) -> None:
    """Null where they are as usual; a checkpoint of before, which says neither, loads as ever."""
    architecture, params, _ = zoo.split("tied")

    def under(**given: Any) -> dict[str, Any]:
        reference = ft.trees.clone(params)
        step = ft.dpo_step(architecture, ft.optim.sgd(), reference=reference, **given)
        return conditions(step, 4)

    other = under(head="full", layout="padding_free")
    assert (under()["head"], under()["layout"]) == (None, None)
    assert (other["head"], other["layout"]) == ("full", "padding_free")
    _, state = _run()
    before = {name: value for name, value in under().items() if name not in ("head", "layout")}
    ft.save(tmp_path, state, conditions=before)
    ft.load(tmp_path, like=state, conditions=other, strict=True)
    ft.save(tmp_path, attrs.evolve(state, step=1), conditions=under())
    with pytest.raises(ft.CheckpointError, match="head None then, 'full' now; layout None then"):
        ft.load(tmp_path, like=state, conditions=other, strict=True)


@pytest.mark.parametrize(
    ("reduction", "size", "sharded", "expected"),
    [
        ("fast", 1, True, (None, None)),
        ("fast", 2, False, (2, None)),
        ("fast", 2, True, (2, True)),
        ("canonical", 2, True, (None, None)),
    ],
)
def test_whether_shards_change_the_bits_is_a_condition(
    reduction: str, size: int, sharded: bool, expected: Any
) -> None:
    """A fast sum over shards has another order; what had none before says nothing, as ever."""
    world = types.SimpleNamespace(size=size)
    step, _ = _run()
    given: Any = types.SimpleNamespace(
        reduction=reduction,
        world=world,
        sharded=sharded,
        microbatches=step.microbatches,
        precision=step.precision,
        compile=False,
        checkpoint=(),
        objective=types.SimpleNamespace(head=torch.ones(1)),  # of one's own: it is something else
    )
    found = conditions(given, 4)
    assert (found["workers"], found["sharded"]) == expected
    assert found["head"] is None
