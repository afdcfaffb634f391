"""`functrain evaluate`: a model of any stage, measured on files."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs

from functrain import data, memory, models, optimizers
from functrain.cli.config import Config, Pretrain
from functrain.cli.directory import is_tokens
from functrain.cli.ending import unreferenced
from functrain.cli.known import EMBEDDED, MULTIPLE, TOKEN_FILES
from functrain.cli.origins import origin
from functrain.cli.restoring import Trained
from functrain.cli.sources import cut_options, text_maker
from functrain.cli.summary import bits_per_byte
from functrain.cli.tokenizers import asked_with
from functrain.data.dialogues import SHAPES
from functrain.data.files import RECORDS, TEXTS, files_of, suffix_of
from functrain.data.grouping import width
from functrain.data.source import MapSource
from functrain.errors import ConfigError, DataError
from functrain.evaluation import evaluate
from functrain.keys import derive
from functrain.objectives.base import Objective
from functrain.objectives.batches import Batch
from functrain.objectives.language import LanguageModeling
from functrain.objectives.preference import PreferenceOptimization
from functrain.stages import make_step

_FORMS = (("text",), ("chosen", "rejected"), *SHAPES.values())
TIME = 1024  # tokens at most, for a model that is not from a run


@attrs.frozen(kw_only=True)
class Measured:
    """A model's results on a file; the loss is in nats per target token.

    `likelier`: the fraction of pairs whose chosen completion has the higher log-prob. `malformed`:
    how many records were skipped.
    """

    file: str
    kind: str
    examples: int
    tokens: int
    loss: float
    perplexity: float
    bits_per_byte: float | None = None
    accuracy: float | None = None
    likelier: float | None = None
    malformed: int = 0

    def row(self) -> tuple[str, ...]:
        """The result as a row of a table."""
        figures = (self.bits_per_byte, self.accuracy, self.likelier)
        return (
            self.file,
            f"{self.kind} ({self.malformed:,} malformed)" if self.malformed else self.kind,
            f"{self.examples:,}",
            f"{self.tokens:,}",
            f"{self.loss:.4f}",
            f"{self.perplexity:.2f}",
            *("" if each is None else f"{each:.3f}" for each in figures),
        )


HEAD = (
    "file",
    "holds",
    "examples",
    "tokens",
    "loss",
    "perplexity",
    "bits/byte",
    "accuracy",
    "chosen likelier",
)


def check(given: str, files: Sequence[str]) -> None:
    """Raise `ConfigError` for files that do not exist or that the model cannot read.

    This comes before anything is computed, so that a mistake in the last name wastes no work.
    """
    tokenizer = asked_with(origin(given, "run"))
    for file in files:
        if file != EMBEDDED and not Path(file).exists() and not glob.has_magic(file):
            raise ConfigError(f"{file}: is not there (looked from {Path.cwd()})")
        if is_tokens(file):
            if tokenizer is None:
                files_of(file, TOKEN_FILES)
                continue
            raise ConfigError(
                f"{file}: token ids, and the model reads text with a tokenizer of its own, of "
                "which they need not be; give text"
            )
        if tokenizer is None:
            if file != EMBEDDED:  # if no file exists, that is the error to report
                files_of(file, (*TEXTS, *RECORDS, *TOKEN_FILES))
            raise ConfigError(
                f"{file}: text, and the model has no tokenizer beside it; give a .bin or .npy file "
                "of ids"
            )
        if file != EMBEDDED:
            files_of(file, (*TEXTS, *RECORDS))


def evaluated(
    model: Trained, files: Sequence[str], *, time: int | None, batch_size: int, limit: int | None
) -> list[Measured]:
    """Measure a model on each file, on the CPU; the files must have passed `check`.

    `time`: the most tokens of a row or example; by default the run's own or, for a model that is
    not from a run, `TIME`, or fewer if it has learnt fewer positions. `limit`: the most rows,
    examples or pairs. All files are read before the first is measured, and malformed records are
    handled as in the run. Raises `DataError` for files that cannot be read, and `ConfigError` for a
    `time` of more tokens than positions.
    """
    time = _time(model, time)
    read = [_source(model, file, time=time, batch_size=batch_size) for file in files]
    return [measured(model, each, batch_size=batch_size, limit=limit) for each in read]


def _time(model: Trained, given: int | None) -> int:
    most = models.positions(model.architecture)
    if given is not None and most is not None and given > most:
        raise ConfigError(
            f"time: {given}, and the model has learnt {most} positions; give at most as many"
        )
    if given is not None:
        return given
    if model.config is not None:
        return model.config.data.time
    return TIME if most is None else min(TIME, most)


@attrs.frozen
class Held:
    """What is in a file, and how many records were skipped."""

    file: str
    kind: str
    source: MapSource
    malformed: int = 0


def measured(model: Trained, held: Held, *, batch_size: int, limit: int | None) -> Measured:
    """Measure a model on one file."""
    total = len(held.source) if limit is None else min(limit, len(held.source))
    batches = data.all_batches(held.source, batch_size, limit=limit)
    found = dict.fromkeys(("bits_per_byte", "accuracy", "likelier"))
    if held.kind == "pairs":
        found["likelier"] = _likelier(model, batches)
        batches = [dict(batch["chosen"]) for batch in batches]
    record = _evaluated(model, LanguageModeling(), batches)
    if model.tokenizer is not None:
        found["bits_per_byte"] = bits_per_byte(record, batches, model.tokenizer)
    found["accuracy"] = record["eval_mean_token_accuracy"]
    return Measured(
        file=held.file,
        kind=held.kind,
        malformed=held.malformed,
        examples=total,
        tokens=int(record["eval_num_tokens"]),
        loss=record["eval_loss"],
        perplexity=record["eval_perplexity"],
        **found,
    )


def _likelier(model: Trained, batches: Sequence[Batch]) -> float:
    """The accuracy of DPO's rewards against a reference whose every log-prob is 0."""
    found = _evaluated(model, PreferenceOptimization(), unreferenced(batches))
    return float(found["eval_rewards/accuracies"])


def _evaluated(model: Trained, objective: Objective, batches: Sequence[Batch]) -> dict[str, float]:
    keeps_nothing = optimizers.sgd()
    step = make_step(objective, architecture=model.architecture, optimizer=keeps_nothing)
    state = step.init(model.params, model.buffers)
    return evaluate(step, state, batches).to_dict()


def _source(model: Trained, file: str, *, time: int, batch_size: int) -> Held:
    options: dict[str, Any] = {"time": time, "batch_size": batch_size, "seed": derive(0, "data")}
    try:
        if is_tokens(file):
            _check_row(time)
            own = None if model.config is None else getattr(model.config.data, "dtype", None)
            return Held(file, "text", data.tokens(file, dtype=own or "uint16", **options))
        assert model.tokenizer is not None  # `check` refuses text without one
        kind, found = _read(model, file)
        if kind == "text":
            _check_row(time)
        make, more = _as_trained(model.config, kind)
        most = models.positions(model.architecture)
        if kind != "text" and most is not None and width([time], MULTIPLE) > most:
            more["pad_to_multiple_of"] = 1  # padding must not go beyond the last position
        made = make(found, model.tokenizer, **options, **more)
        malformed = len(getattr(found, "malformed", ()))
        return Held(file, kind, made, malformed if kind == "text" else made.counts.malformed)
    except DataError as error:
        raise error if file in str(error) else DataError(f"{file}: {error}") from error


def _check_row(time: int) -> None:
    """Raise `ConfigError` for a row of text whose token ids alone are more than the memory."""
    size, here = 16 * time, memory.installed()  # ids and labels; a short text is padded
    if size > here:
        raise ConfigError(
            f"time: {time}; the token ids of one row alone take {size / 2**30:,.0f} GiB, and this "
            f"machine has {here / 2**30:,.0f}; give less"
        )


def _as_trained(config: Config | None, kind: str) -> tuple[Any, dict[str, Any]]:
    """The function that makes rows or examples, and its options, as for the run's held-out data.

    Otherwise a model trained on separate documents would be measured on documents that see each
    other.
    """
    if kind == "text":
        return text_maker(config), {}
    make = data.chat if kind == "completions" else data.preference
    cut = {} if config is None or isinstance(config, Pretrain) else cut_options(config)
    return make, {**cut, "on_bad_record": _on_bad_record(config)}


def _on_bad_record(config: Config | None) -> str:
    return "stop" if config is None else config.data.on_bad_record


def _read(model: Trained, file: str) -> tuple[str, Sequence[Any]]:
    if file == EMBEDDED:
        held_out = data.embedded.load(
            limit=None if model.config is None else model.config.data.limit
        )
        return {
            "pretrain": ("text", held_out.held_out),
            "sft": ("completions", held_out.sft_held_out),
            "dpo": ("pairs", held_out.preference_held_out),
        }["pretrain" if model.config is None else model.config.stage]
    how = _on_bad_record(model.config)
    suffixes = {suffix_of(each) for each in files_of(file, (*TEXTS, *RECORDS))}
    if not suffixes <= {*RECORDS}:
        return "text", data.documents(file, on_bad_record=how)
    records = data.records(file, on_bad_record=how)
    # The very first record may be a malformed one that is skipped.
    whole = (each for each in records if any(each.keys() >= set(form) for form in _FORMS))
    first = next(whole, records[0])
    if "text" in first:
        return "text", data.documents(file, on_bad_record=how)
    if "chosen" in first:
        return "pairs", records
    if "completion" in first and isinstance(first.get("label"), bool):
        raise DataError(
            f"{file}: completions with a label (desirable or not), which is not measured; leave "
            "label out to measure all of them as completions, or give pairs (chosen and rejected)"
        )
    return "completions", records
