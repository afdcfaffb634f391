"""`functrain export`: a run as a Hugging Face model directory, or its adapters as peft's."""

from __future__ import annotations

from pathlib import Path

from functrain import lora
from functrain.cli import toml
from functrain.cli.facts import logged
from functrain.cli.origins import Origin, RunDirectory, is_model
from functrain.cli.restoring import restored
from functrain.cli.tokenizers import tokenizer_of
from functrain.data import PretrainedTokenizer
from functrain.errors import ConfigError, DataError
from functrain.models import export


def exported(given: str, directory: str, *, merge: bool, dtype: str | None) -> str:
    """Write the model of a run or checkpoint; says what was done."""
    found = restored(given)
    run = found.origin.run
    adapted = lora.is_adapted(found.architecture)
    if merge and not adapted:
        raise ConfigError(f"merge: {given} has no adapters, its model is whole; leave out --merge")
    if adapted and not merge:
        if dtype is not None:
            raise ConfigError("dtype: adapters are written as they are; give it with --merge")
        path = lora.save_adapter(directory, found.architecture, found.state.params)
        below = getattr(found.config.model, "from_", "")
        theirs = is_model(Path(below))
        return (
            f"{path}: the adapters of step {found.state.step:,}, as peft reads them; their base is "
            f"{below}{'' if theirs else ', which `functrain export` writes as well'}"
        )
    metrics: dict[str, float] = {}
    without = ""
    try:
        metrics = _measured(run, found.state.step)
    except DataError as error:  # metrics are damaged, but the model is whole
        without = f"; without its metrics, since {error}"
    path = export(
        found.state,
        found.architecture,
        directory,
        tokenizer=_tokenizer(found.origin),
        dtype=dtype,
        name=run.path.name,
        data=found.config.data.train,
        config=toml.dumps(found.config),
        metrics=metrics,
    )
    return f"{path}: the model of step {found.state.step:,}, as transformers reads it{without}"


def _tokenizer(origin: Origin) -> PretrainedTokenizer | None:
    """The transformers tokenizer that the run was made with; None for the built-in one."""
    found = tokenizer_of(origin)
    return found if isinstance(found, PretrainedTokenizer) else None


def _measured(run: RunDirectory, step: int) -> dict[str, float]:
    """The metrics logged for a step: its loss, and the evaluation if there was one."""
    records = [each for each in logged(run) if each["step"] == step]
    last = records[-1] if records else {}
    kept = ("loss", "perplexity", "mean_token_accuracy")
    return {n: v for n, v in last.items() if n in kept or n.startswith(("eval_", "rewards/"))}
