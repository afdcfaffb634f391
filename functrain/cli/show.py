"""What `functrain inspect` and `functrain generate` print."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from functrain.cli.known import EMBEDDED
from functrain.errors import ConfigError, DataError, FunctrainError


def described(given: str, *, tensors: bool = False) -> str:
    """What a checkpoint, or a run's newest one, holds, as text; verified against its hashes."""
    from functrain import checkpoint
    from functrain.cli.origins import RunDirectory, located, stage_directory

    path = located(Path(given))
    if (RunDirectory(path).config).is_file() or (path / "pretrain").is_dir():
        # The config is not read here: the checkpoint may be whole though the config is damaged.
        path = RunDirectory(stage_directory(path)).checkpoints
        if checkpoint.latest(path) is None:
            raise ConfigError(f"{given}: has no checkpoint yet; train it first")
    found = checkpoint.inspect(path)
    run = RunDirectory(Path(found["path"]).parent.parent)
    about = _of_the_run(run, found) if run.config.is_file() else {}
    return "\n".join(_description(found, tensors, about))


def _of_the_run(run: Any, inspected: Mapping[str, Any]) -> dict[str, str]:
    """Facts of a run that no checkpoint holds: how logits are made, and what its metrics say."""
    from functrain import objectives
    from functrain.cli.facts import logged
    from functrain.cli.restoring import trained

    try:
        model = trained(inspected["path"])
        how = objectives.describe_head(model.architecture, model.params, model.buffers)
    except FunctrainError as error:  # an adapters' base may be gone, though the rest is there
        how = f"not known: {error}"
    try:
        records = logged(run)
    except DataError as error:  # metrics are damaged, but the checkpoint is whole
        return {"head": how, "metrics": f"not known: {error}"}
    records = [each for each in records if each["step"] <= inspected["leaves"]["step"]]
    rates = [each["tokens_per_second"] for each in records if "tokens_per_second" in each]
    padding = [each["padding"] for each in records if "padding" in each]
    waited = [each["data_seconds"] for each in records if "data_seconds" in each]
    found = {"head": how}
    if padding:
        found["padding"] = f"{statistics.fmean(padding):.1%} of the tokens of the logged steps"
    if waited:
        found["waiting"] = f"{statistics.fmean(waited):.4f} s a step for data"
    if rates:
        found["speed"] = f"{statistics.median(rates):,.0f} target tokens per second"
    return found


def _description(
    found: Mapping[str, Any], tensors: bool, about: Mapping[str, str]
) -> Iterator[str]:
    leaves, files = found["leaves"], found["files"]
    yield f"checkpoint {found['path']}"
    model = files["model.safetensors"]["tensors"]
    count = sum(math.prod(tensor["shape"]) for tensor in model.values())
    dtypes = ", ".join(sorted({tensor["dtype"] for tensor in model.values()})) or "none"
    yield f"  step        {leaves['step']:,}"
    yield f"  samples     {leaves['cursor/samples']:,}"
    yield f"  tokens      {leaves['cursor/tokens']:,}"
    yield f"  parameters  {count:,} in {len(model)} tensors ({dtypes})"
    if leaves["base"] is not None:
        yield f"  base        {leaves['base'][:16]}…, frozen params that are not here"
    yield f"  optimizer   {leaves['optimizer/kind']}"
    yield f"  key         {leaves['key']}"
    for name, text in about.items():
        yield f"  {name:<11} {text}"
    yield ""
    yield f"  {'file':<24}{'bytes':>14}  {'tensors':>7}  sha256"
    for name, entry in files.items():
        yield (
            f"  {name:<24}{entry['size']:>14,}  {len(entry['tensors']):>7}  {entry['sha256'][:16]}…"
        )
    yield "  every size and sha256 is as the manifest says"
    if tensors:
        for name, entry in files.items():
            yield f"\n{name}"
            for tensor, form in entry["tensors"].items():
                yield f"  {tensor:<56} {form['dtype']} {form['shape']}"


def generated(
    given: str,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    plain: bool,
) -> str:
    """What the model of a run or checkpoint says after `prompt`; equal for equal arguments.

    If the tokenizer has a chat template, the prompt becomes a user's turn in it, unless `plain` is
    set or the run was trained on records other than dialogues. Raises `ConfigError` for a run on
    ids of a foreign tokenizer.
    """
    from functrain import models
    from functrain.cli.restoring import trained

    model = trained(given)
    if model.tokenizer is None:
        raise ConfigError(
            f"{given}: has no tokenizer beside it, so a text prompt means nothing to it; use "
            "functrain.models.generate with ids"
        )
    ids = models.generate(
        model.architecture,
        model.params,
        model.buffers,
        _prompt(model, model.tokenizer, prompt, plain) or [model.tokenizer.end],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        end=models.ends(model.architecture, model.tokenizer.end),
        seed=seed,
    )
    return model.tokenizer.decode(ids)


def _prompt(model: Any, tokenizer: Any, prompt: str, plain: bool) -> list[int]:
    from functrain.data.templates import has_template

    config = model.config
    # A run is prompted as it was trained; a transformers model by its template.
    plain = plain or (config is not None and config.data.templated is False)
    if has_template(tokenizer) and not plain:
        prompt = tokenizer.render([{"role": "user", "content": prompt}], prompt=True)
    elif config is not None and config.stage != "pretrain" and config.data.train == EMBEDDED:
        # The embedded questions end with a newline, which is awkward to type in a shell.
        prompt = prompt.rstrip("\n") + "\n"
    return list(tokenizer.encode(prompt))
