"""`functrain demo`: three runs, one after another, and their results."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from functrain.cli.origins import RunDirectory
from functrain.cli.output import print_result
from functrain.cli.recipe import recipe
from functrain.cli.run import Outcome, Say, run_stage
from functrain.cli.samples import spoken
from functrain.cli.signals import Stop, stopping
from functrain.cli.sources import embedded
from functrain.cli.summary import (
    HEAD,
    Row,
    Said,
    bits_per_byte,
    conclude,
    measured,
    table,
    worded,
    write_report,
)
from functrain.data.embedded import trigram_bits_per_byte
from functrain.errors import ConfigError
from functrain.evaluation import evaluate
from functrain.state import TrainState, fingerprint


def run_demo(directory: str, *, seed: int, scale: str, resume: bool, say: Say) -> int:
    """Pretrain, fine-tune, align, and print the results; returns the exit code.

    Law: stopped anywhere and resumed, it ends with the fingerprint of an uninterrupted demo. Raises
    `ConfigError` for a directory that is not empty, unless it resumes.
    """
    path = Path(directory)
    if not resume and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(
            f"{path}: is there already and not empty; go on with --resume, or give another "
            "--directory"
        )
    if (path / "report.html").is_file():
        say(f"{path}: finished already; these are its results")
    else:
        say(f"pretrain, sft, dpo on this Python's own documentation, in {path}; Ctrl-C saves")
    with stopping() as stop:
        outcomes = _run(recipe(directory, seed=seed, scale=scale), stop, say)
        if stop or not all(outcome.finished for outcome in outcomes):
            say(f"stopped; go on with: {_again(path, seed, scale)}")
            return stop.exit_code
        print_result(concluded(path, outcomes))
        return 0


def _run(configs: Sequence[Any], stop: Stop, say: Say) -> list[Outcome]:
    outcomes: list[Outcome] = []
    for config in configs:
        outcome = run_stage(config, resume=True, stop=stop, say=say)
        outcomes.append(outcome)
        if not outcome.finished or stop:
            break
        if not RunDirectory(config.directory).report.is_file():
            conclude(outcome)
    return outcomes


def _again(path: Path, seed: int, scale: str) -> str:
    options = f" --seed {seed}" if seed else ""
    options += f" --scale {scale}" if scale != "full" else ""
    return f"functrain demo --directory {shlex.quote(str(path))}{options} --resume"


def concluded(path: Path, outcomes: Sequence[Outcome]) -> str:
    """Write the report; returns the table, samples, fingerprint, and what to type next."""
    pretrain, sft, dpo = outcomes
    held_out = embedded(pretrain.config.data.limit)
    trigram = trigram_bits_per_byte(held_out.train, held_out.held_out)
    rows = _rows(pretrain, sft, dpo, f"{trigram:.3f}")
    said = _said(outcomes)
    where, config = (shlex.quote(str(each)) for each in (path, path / "pretrain" / "config.toml"))
    commands = [
        f'functrain generate {where} "Help on json.dumps(obj), please."',
        f"functrain inspect {where}",
        f"functrain pretrain {config} --directory runs/mine --data.train my.txt",
    ]
    target, title = path / "report.html", "functrain demo"
    written = write_report(target, title, outcomes, rows=rows, said=said, commands=commands)
    return "\n".join(
        [
            table(HEAD, rows),
            "",
            *_shown(said),
            f"fingerprint  {fingerprint(dpo.state)}",
            f"report       {written}",
            f"next         {commands[0]}",
            *(f"             {command}" for command in commands[1:]),
        ]
    )


def _rows(pretrain: Outcome, sft: Outcome, dpo: Outcome, trigram: str) -> list[Row]:
    """Each stage's own measures, and its effect on what earlier stages had learnt."""
    text = (_bits(pretrain), _bits(pretrain, sft.state), _bits(pretrain, dpo.state))
    completion = (_bits(sft), _bits(sft, dpo.state))
    return [
        *measured(pretrain),
        ("pretrain", "… of a trigram model", "", trigram),
        *measured(sft),
        ("sft", "text bits per byte", text[0], text[1]),
        *measured(dpo),
        ("dpo", "completion bits per byte", completion[0], completion[1]),
        ("dpo", "text bits per byte", text[1], text[2]),
    ]


def _bits(judge: Outcome, state: TrainState | None = None) -> str:
    """A stage's held-out bits per byte at its end, or with another stage's state."""
    batches, tokenizer = judge.built.evaluation, judge.built.tokenizer
    assert tokenizer is not None  # the demo's is the built-in one
    found = judge.after if state is None else evaluate(judge.built.step, state, batches).to_dict()
    return f"{bits_per_byte(found, batches, tokenizer):.3f}"


def _said(outcomes: Sequence[Outcome]) -> list[Said]:
    """The held-out questions with the answer of each stage's last state."""
    sft = outcomes[1]
    answers = [spoken(sft.built, outcome.state, sft.prompts, ended=True) for outcome in outcomes]
    stages = [outcome.config.stage for outcome in outcomes]
    return [
        Said(prompt=worded(sft, prompt), answers=tuple(zip(stages, each, strict=True)))
        for prompt, *each in zip(sft.prompts, *answers, strict=True)
    ]


def _shown(said: Sequence[Said]) -> Iterator[str]:
    for each in said:
        yield each.prompt.strip()
        for stage, answer in each.answers:
            yield f"  after {stage:<9} {textwrap.shorten(answer, 84, placeholder=' …')}"
        yield ""
