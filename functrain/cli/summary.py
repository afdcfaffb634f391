"""The results of a stage, in numbers and samples, for the terminal and the report."""

from __future__ import annotations

import io
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from functrain.cli.facts import recorded
from functrain.cli.origins import RunDirectory
from functrain.cli.run import Outcome
from functrain.cli.samples import Prompt
from functrain.data import Tokenizer
from functrain.objectives import UnpairedOptimization
from functrain.objectives.batches import Batch, targets_in
from functrain.tracking import report

HEAD = ("stage", "held out", "before", "after")
Row = tuple[str, str, str, str]
"""Stage, what is measured, before, after."""


@attrs.frozen(kw_only=True)
class Said:
    """A prompt, and how each of several models continues it: (name, text)."""

    prompt: str
    answers: tuple[tuple[str, str], ...]


def conclude(outcome: Outcome) -> str:
    """Write a finished run's report; returns what to print, even if it cannot be written."""
    run = RunDirectory(outcome.config.directory)
    rows = measured(outcome)
    end = outcome.ended()
    said = [
        Said(prompt=worded(outcome, prompt), answers=(("before", first), ("after", last)))
        for prompt, first, last in zip(outcome.prompts, outcome.first_words, end.words, strict=True)
    ]
    where = shlex.quote(str(run.path))
    commands = [f'functrain generate {where} "…"', f"functrain inspect {where}"]
    title = f"functrain {outcome.config.stage}: {run.path.name}"
    written = write_report(run.report, title, [outcome], rows=rows, said=said, commands=commands)
    return "\n".join(
        [
            f"{run.path}: finished, {outcome.state.step:,} of {outcome.config.train.steps:,} steps",
            *([table(HEAD, rows), ""] if rows else []),
            *padding(outcome.records),
            *skipped(outcome),
            f"fingerprint  {end.fingerprint}",
            f"report       {written}",
            f"next         {commands[0]}",
        ]
    )


def worded(outcome: Outcome, prompt: Prompt) -> str:
    """A prompt as text."""
    tokenizer = outcome.built.tokenizer
    assert tokenizer is not None  # without one there are no prompts
    return tokenizer.decode(prompt)


def measured(outcome: Outcome) -> list[Row]:
    """The stage's held-out measures, before its first step and after its last.

    A `before` that was measured on other held-out data than its `after` is left empty, as when a
    run is resumed with another `evaluation.limit`.
    """
    before, after = outcome.before, outcome.after
    if not before or not after:
        return []
    if outcome.config.stage == "dpo":
        return _preferences(outcome)
    what = "text" if outcome.config.stage == "pretrain" else "completion"
    alike = _alike(outcome)
    first, last = (f"{each['eval_perplexity']:.2f}" for each in (before, after))
    rows = [(f"{what} perplexity", first if alike else "", last)]
    batches, tokenizer = outcome.built.evaluation, outcome.built.tokenizer
    if tokenizer is not None and after["eval_num_tokens"] == int(targets_in(batches)):
        first, last = (f"{bits_per_byte(each, batches, tokenizer):.3f}" for each in (before, after))
        rows.append((f"{what} bits per byte", first if alike else "", last))
    return [(outcome.config.stage, *row) for row in rows]


def _alike(outcome: Outcome) -> bool:
    """Whether the first and the last evaluation had the same data, judged by their token counts."""
    return outcome.before.get("eval_num_tokens") == outcome.after.get("eval_num_tokens")


def padding(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line on how much of what was computed was padding; empty if nothing was logged."""
    seen = [float(each["padding"]) for each in records if "padding" in each]
    if not seen:
        return []
    return [f"padding      {sum(seen) / len(seen):.1%} of a step's tokens, on average"]


def skipped(outcome: Outcome) -> list[str]:
    """A line on how many steps changed nothing and why; empty if all were applied."""
    state = outcome.state
    count = state.step - int(state.optimizer.count)
    if not count:
        return []
    guard = ", or far above those before" if outcome.config.train.spike_deviations else ""
    return [
        f"skipped      {count:,} of {state.step:,} steps: their loss or gradients were not "
        f"finite{guard}"
    ]


def _preferences(outcome: Outcome) -> list[Row]:
    before, after, alike = outcome.before, outcome.after, _alike(outcome)
    if isinstance(outcome.built.step.objective, UnpairedOptimization):
        # The held-out examples may all be desirable, or none of them.
        return [
            (
                "dpo",
                name,
                f"{before[f'eval_{name}']:+.3f}" if alike else "",
                f"{after[f'eval_{name}']:+.3f}",
            )
            for name in ("rewards/chosen", "rewards/rejected", "kl")
            if f"eval_{name}" in before
        ]
    # Before the first step the policy is its reference, so all rewards are equal.
    tied = float(before["eval_rewards/margins"]) == 0
    accuracy = "tied" if tied else f"{before['eval_rewards/accuracies']:.3f}"
    opened, closed = (f"{each['eval_rewards/margins']:+.3f}" for each in (before, after))
    if not alike:
        accuracy, opened = "", ""
    rows = [
        ("dpo", "accuracy of the rewards", accuracy, f"{after['eval_rewards/accuracies']:.3f}"),
        ("dpo", "margin of the rewards", opened, closed),
    ]
    likelier = outcome.ended().likelier
    if likelier is not None:
        first, last = (f"{each:.3f}" for each in likelier)
        rows.append(("dpo", "chosen is the likelier", first, last))
    return rows


def bits_per_byte(
    record: Mapping[str, Any], batches: Sequence[Batch], tokenizer: Tokenizer
) -> float:
    """An evaluation's loss in bits, divided by the bytes of the text to be predicted.

    Ends of documents and other special tokens are predicted too, but only text is divided by.
    """
    counted: Any = tokenizer  # all tokenizers of the command line have `count_bytes`
    targets = (row[row >= 0] for batch in batches for row in batch["labels"][:, 1:])
    count: int = sum(counted.count_bytes(row.tolist()) for row in targets)
    if not count:
        return math.nan  # only special tokens
    nats = float(record["eval_loss"]) * float(record["eval_num_tokens"])
    return nats / math.log(2) / count


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for the terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    made = Table(*head, box=box.SIMPLE_HEAD, pad_edge=False)
    last = ""
    for row in rows:
        # Consecutive rows of a stage name it once.
        made.add_row("" if row[0] == last else row[0], *row[1:])
        last = row[0]
    for column in made.columns[2:]:
        column.justify = "right"
    out = io.StringIO()
    # A path may look like markup.
    Console(file=out, width=400, color_system=None, highlight=False, markup=False).print(made)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).strip("\n")


def write_report(
    path: Path,
    title: str,
    outcomes: Sequence[Outcome],
    *,
    rows: Sequence[Row],
    said: Sequence[Said],
    commands: Sequence[str],
) -> str:
    """Write the report over these stages, with the fingerprint of the last one's state.

    Returns its path, or says that it cannot be written: a full disk does not undo a finished run,
    so it is not an error.
    """
    stages = [
        recorded(RunDirectory(outcome.config.directory), outcome.config.stage)
        for outcome in outcomes
    ]
    try:
        report.write_report(
            path,
            title=title,
            stages=stages,
            table=rows,
            samples=said,
            fingerprint=outcomes[-1].ended().fingerprint,
            commands=commands,
        )
    except OSError as error:
        runs = shlex.join(outcome.config.directory for outcome in outcomes)
        return (
            f"{path}: cannot be written ({error.strerror}); the run is saved, and "
            f"`functrain report {runs} --to FILE` writes one of it"
        )
    return str(path)
