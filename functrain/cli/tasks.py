"""`functrain evaluate --tasks`: a model on tasks of lm-evaluation-harness."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from functrain import models
from functrain.cli.origins import origin
from functrain.cli.restoring import Trained
from functrain.cli.tokenizers import asked_with
from functrain.data.templates import has_template
from functrain.errors import ConfigError, did_you_mean


@attrs.frozen(kw_only=True)
class Judged:
    """A model's result on one metric of a task of lm-evaluation-harness."""

    task: str
    metric: str
    value: float
    stderr: float | None
    examples: int

    def row(self) -> tuple[str, ...]:
        """The result as a row of a table."""
        spread = "" if self.stderr is None else f"{self.stderr:.4f}"
        return self.task, self.metric, f"{self.value:.4f}", spread, f"{self.examples:,}"


JUDGED = ("task", "metric", "value", "stderr", "examples")


@attrs.frozen(kw_only=True)
class Tasks:
    """Tasks that exist: their names, and lm-eval's manager of them."""

    manager: Any
    names: tuple[str, ...]
    chat: bool


def found(given: str, tasks: Sequence[str], *, include: str | None, chat: bool) -> Tasks:
    """The tasks of lm-evaluation-harness with these names, or that match patterns (`mmlu*`).

    `include`: a directory of YAML files with tasks of your own. `chat`: whether questions are put
    into the tokenizer's chat template. Before anything is computed, raises `ConfigError` for
    unknown tasks, suggesting the nearest, and for a model that cannot be asked.
    """
    tokenizer = asked_with(origin(given, "run"))
    if tokenizer is None:
        raise ConfigError(
            f"{given}: has no tokenizer beside it, and tasks are text; use "
            "functrain.models.harness with that tokenizer"
        )
    if chat and not has_template(tokenizer):
        raise ConfigError(f"chat: the tokenizer of {given} has no chat template; leave it out")
    if include is not None and not Path(include).is_dir():
        raise ConfigError(
            f"include: {include} is no directory (looked from {Path.cwd()}); give that of your "
            "tasks' YAML files"
        )
    try:
        make: Any = importlib.import_module("lm_eval.tasks").TaskManager
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"tasks need {error.name}, which is not installed: pip install 'functrain[eval]'"
        ) from error
    manager, names = _named(make, tasks, include)
    return Tasks(manager=manager, names=tuple(names), chat=chat)


def _named(make: Any, tasks: Sequence[str], include: str | None) -> tuple[Any, Iterator[str]]:
    if include is not None:  # listing lm-eval's own thousands of tasks takes seconds
        manager = make(include_path=include, include_defaults=False)
        matches = [manager.match_tasks([task]) for task in tasks]
        if all(matches):
            return manager, itertools.chain(*matches)
    manager = make(include_path=include)
    matches = [manager.match_tasks([task]) for task in tasks]
    for task, each in zip(tasks, matches, strict=True):
        if not each:
            raise ConfigError(
                f"tasks: {task!r} is unknown; {did_you_mean(task, manager.all_tasks)}"
            )
    return manager, itertools.chain(*matches)


def judged(
    model: Trained, tasks: Tasks, *, time: int | None, batch_size: int, limit: int | None
) -> list[Judged]:
    """Measure a model on tasks."""
    assert model.tokenizer is not None  # `found` refuses a model without one
    lm = models.harness(
        model.architecture,
        model.params,
        model.buffers,
        model.tokenizer,
        time=time,
        batch_size=batch_size,
    )
    try:
        results = importlib.import_module("lm_eval").simple_evaluate(
            model=lm,
            tasks=list(tasks.names),
            task_manager=tasks.manager,
            limit=limit,
            apply_chat_template=tasks.chat,
            log_samples=False,
        )
    except (OSError, ImportError) as error:  # such as a hub that is out of reach
        raise ConfigError(
            f"tasks: {', '.join(tasks.names)}: what they need cannot be had ({error}); data come "
            "from a hub, unless a task of your own (--include) has files"
        ) from error
    counts = {name: int(each["effective"]) for name, each in results["n-samples"].items()}
    return [
        each
        for task, values in results["results"].items()
        for each in _judged(task, values, counts)
    ]


def _judged(task: str, values: Mapping[str, Any], counts: Mapping[str, int]) -> Iterator[Judged]:
    for key, value in values.items():
        metric, _, kept = key.partition(",")
        if not kept or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        spread = values.get(f"{metric}_stderr,{kept}")
        name = metric if kept == "none" else f"{metric} ({kept})"
        yield Judged(
            task=task,
            metric=name,
            value=float(value),
            stderr=float(spread) if isinstance(spread, int | float) else None,
            examples=counts.get(task, 0),
        )
