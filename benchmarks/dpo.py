"""A DPO step beside TRL's DPOTrainer: time and peak memory, on the same model, pairs and options.

    pip install -e '.[dev,bench]'
    python benchmarks/dpo.py [--vocabulary 50257] [--rounds 5] [--steps 4] [--threads 1]

A Llama of random weights, pairs of random tokens (prompts of 64, completions of 192), AdamW by the
fused kernel, four micro-batches of a pair, clipping at 1, fp32. Every measurement is a process
of its own; ours and theirs take turns, and each makes one step before those that count. Both score
the completions, log rewards, entropy, accuracy and mean logits, and must come to the same losses.
Time is the median of a process's steps; ratios are of the same round. Memory is the peak of the
process above what it held when the model had been loaded; a second model, or the reference as a
value, is above. `precomputed` has the reference's log-probs ahead, in both.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PROMPT, COMPLETION, PAIRS, MICROBATCHES = 64, 192, 4, 4
RATE, BETA = 1e-5, 0.1
KINDS = ("functrain", "trl", "functrain precomputed", "trl precomputed")


def llama(vocabulary: int) -> Any:
    """About 38 million parameters at a vocabulary of 50,257."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=PROMPT + COMPLETION,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def pairs(vocabulary: int, count: int) -> list[dict[str, list[int]]]:
    """Prompts with two completions each, as token ids."""
    generator = torch.Generator().manual_seed(1)

    def ids(size: int) -> list[int]:
        found: list[int] = torch.randint(3, vocabulary, (size,), generator=generator).tolist()
        return found

    return [
        {
            "prompt_ids": ids(PROMPT),
            "chosen_ids": ids(COMPLETION),
            "rejected_ids": ids(COMPLETION),
        }
        for _ in range(count)
    ]


class Clock:
    """Seconds of wall and CPU from one call to the next, and memory above that at the start."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []
        self._loaded = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf(
            "SC_PAGE_SIZE"
        )
        self.start()

    def start(self) -> None:
        self._since = time.perf_counter(), time.process_time()

    def step(self) -> None:
        now = time.perf_counter(), time.process_time()
        self.steps.append((now[0] - self._since[0], now[1] - self._since[1]))
        self._since = now

    def report(self, losses: list[float]) -> dict[str, Any]:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        wall, cpu = (statistics.median(each) for each in zip(*self.steps[1:], strict=True))
        return {
            "wall": wall,
            "cpu": cpu,
            "megabytes": (peak - self._loaded) / 1e6,
            "losses": losses,
        }


def ours(vocabulary: int, steps: int, precomputed: bool) -> dict[str, Any]:
    """Steps of `functrain.dpo_step`, donated."""
    import functrain as ft

    model = llama(vocabulary)
    model.generate  # noqa: B018  (loads what transformers loads late, before memory is counted)
    clock = Clock()
    architecture, params, buffers = ft.split(model)
    reference = None if precomputed else ft.trees.clone(params)
    step = ft.dpo_step(
        architecture,
        ft.optim.adamw(RATE, weight_decay=0.0),
        reference=reference,
        beta=BETA,
        microbatches=MICROBATCHES,
        max_grad_norm=1.0,
        donate=True,
    )
    state = step.init(params, buffers)
    batches = [batch(pairs(vocabulary, PAIRS * steps)[n * PAIRS :][:PAIRS]) for n in range(steps)]
    if precomputed:
        attach = ft.attach_reference(architecture, state.params, buffers)
        batches = [dict(attach(each)) for each in batches]
    losses = []
    clock.start()
    for each in batches:
        state, metrics = step(state, each)
        losses.append(metrics.to_dict()["loss"])
        clock.step()
    return clock.report(losses)


def batch(records: list[dict[str, list[int]]]) -> dict[str, Any]:
    """Pairs as a batch; all are of one length."""

    def side(name: str) -> dict[str, torch.Tensor]:
        ids = torch.tensor([r["prompt_ids"] + r[name] for r in records])
        labels = ids.clone()
        labels[:, :PROMPT] = -100
        return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}

    return {"chosen": side("chosen_ids"), "rejected": side("rejected_ids")}


def theirs(vocabulary: int, steps: int, precomputed: bool) -> dict[str, Any]:
    """Steps of `trl.DPOTrainer`, over the same token ids in the same order."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from torch.utils.data import SequentialSampler
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    words = WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), pad_token="<pad>", eos_token="<eos>"
    )

    class Tokenised(DPOTrainer):
        """With token ids as they are given, in their order."""

        def _prepare_dataset(self, dataset: Any, *_args: Any, **_options: Any) -> Any:
            return dataset

        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return SequentialSampler(self.train_dataset if dataset is None else dataset)

    class Watch(TrainerCallback):
        def on_step_begin(self, *_args: Any, **_options: Any) -> None:
            clock.start()

        def on_step_end(self, *_args: Any, **_options: Any) -> None:
            clock.step()

    model = llama(vocabulary)
    data = Dataset.from_list(pairs(vocabulary, PAIRS * steps))
    clock = Clock()
    with tempfile.TemporaryDirectory() as directory:
        trainer = Tokenised(
            model=model,
            ref_model=None if precomputed else llama(vocabulary),
            args=DPOConfig(
                output_dir=directory,
                per_device_train_batch_size=PAIRS // MICROBATCHES,
                gradient_accumulation_steps=MICROBATCHES,
                max_steps=steps,
                learning_rate=RATE,
                lr_scheduler_type="constant",
                optim="adamw_torch_fused",
                weight_decay=0.0,
                max_grad_norm=1.0,
                beta=BETA,
                max_length=None,
                bf16=False,
                gradient_checkpointing=False,
                precompute_ref_log_probs=precomputed,
                logging_steps=1,
                report_to="none",
                save_strategy="no",
                use_cpu=True,
                disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[Watch()],
        )
        trainer.train()
    return clock.report([each["loss"] for each in trainer.state.log_history if "loss" in each])


def child(kind: str, vocabulary: int, steps: int, threads: int) -> None:
    """One measurement; its result is the last line of what it prints."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    name, _, more = kind.partition(" ")
    run: Callable[..., dict[str, Any]] = ours if name == "functrain" else theirs
    print(json.dumps(run(vocabulary, steps, more == "precomputed")))


def measured(kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """`child` in a process of its own."""
    command = [sys.executable, __file__, "--child", kind]
    command += ["--vocabulary", str(options.vocabulary), "--steps", str(options.steps)]
    command += ["--threads", str(options.threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{kind}:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def check(results: dict[str, list[dict[str, Any]]]) -> float:
    """The largest difference between two losses of one step; a benchmark of unequals is none."""
    losses = [result["losses"] for each in results.values() for result in each]
    apart = max(max(each) - min(each) for each in zip(*losses, strict=True))
    if apart > 2e-4:  # the trainer logs its losses rounded to four digits
        raise SystemExit(f"the losses are not the same, by {apart}: {losses}")
    return apart


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocabulary", type=int, default=50_257)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--child", choices=KINDS, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        child(options.child, options.vocabulary, options.steps, options.threads)
        return
    results: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for number in range(options.rounds):
        order = KINDS if number % 2 == 0 else KINDS[::-1]
        for kind in order:
            results[kind].append(measured(kind, options))
    apart = check(results)
    print(
        f"vocabulary {options.vocabulary:,}, {options.threads} thread(s), "
        f"{options.rounds} rounds; losses equal within {apart:.1e}"
    )
    print("| | wall s | CPU s | MB above the model | wall | CPU | memory |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for kind, found in results.items():
        base = results["trl" + kind.removeprefix("functrain").removeprefix("trl")]
        row = [statistics.median(each[key] for each in found) for key in ("wall", "cpu")]
        memory = statistics.median(each["megabytes"] for each in found)
        ratios = [
            statistics.median(a[key] / b[key] for a, b in zip(found, base, strict=True))
            for key in ("wall", "cpu", "megabytes")
        ]
        shown = " | ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"| {kind} | {row[0]:.2f} | {row[1]:.2f} | {memory:,.0f} | {shown} |")
    if options.json is not None:
        options.json.write_text(
            json.dumps({"options": vars(options) | {"json": None}, "results": results}, default=str)
        )


if __name__ == "__main__":
    main()
