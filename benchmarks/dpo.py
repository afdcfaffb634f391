"""A DPO step compared with TRL's DPOTrainer: time and peak memory; same model, pairs and options.

    pip install -e '.[dev,bench]'
    python benchmarks/dpo.py [--vocabulary 50257] [--microbatches 4] [--rounds 5] [--steps 4]

A Llama with random weights, pairs of random tokens (prompts of 64, completions of 192), AdamW with
the fused kernel, four pairs per step in four micro-batches or fewer, clipping at 1, fp32. Every
measurement is a process of its own; ours and theirs take turns, and each makes one warm-up step.
Both score the completions, log rewards, entropy, accuracy and mean logits, and must reach the same
losses. Time is the median of a process's steps; ratios are within a round. Memory is the peak of
the process above what it held after loading the model, so a second model, or the reference as a
value, counts. `precomputed` computes the reference's log-probs ahead, in both; `shared` computes
the prompt of a pair once; `kept` keeps freed memory (`functrain.keep_pages`); `returned` returns it
at once (`functrain.return_pages`); `lean` does so too, and recomputes the activations of the blocks
in the backward pass.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import harness
import torch
from harness import Clock, Result

PROMPT, COMPLETION, PAIRS = 64, 192, 4
RATE, BETA = 1e-5, 0.1
BASES = {
    "functrain": "trl",
    "functrain shared": "trl",
    "functrain shared kept": "trl",
    "functrain returned": "trl",
    "functrain lean": "trl",
    "trl": "trl",
    "functrain precomputed": "trl precomputed",
    "trl precomputed": "trl precomputed",
}
KINDS = tuple(BASES)


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


def ours(vocabulary: int, steps: int, microbatches: int, more: str) -> Result:
    """Steps of `functrain.dpo_step`, donating, in one of the ways described above."""
    import functrain as ft

    ways = more.split()
    if "kept" in ways:
        ft.keep_pages()
    if "returned" in ways or "lean" in ways:
        ft.return_pages()
    model = llama(vocabulary)
    model.generate  # noqa: B018  (loads what transformers loads late, before memory is counted)
    precomputed = "precomputed" in ways
    clock = Clock()
    architecture, params, buffers = ft.split(model)
    reference = None if precomputed else ft.trees.clone(params)
    step = ft.dpo_step(
        architecture,
        ft.optim.adamw(RATE, weight_decay=0.0),
        reference=reference,
        beta=BETA,
        microbatches=microbatches,
        max_grad_norm=1.0,
        layout="shared_prompt" if "shared" in ways else "padded",
        checkpoint="model.layers.*" if "lean" in ways else None,
        donate=True,
    )
    state = step.init(params, buffers)
    del params
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
    """Pairs as a batch; all have one length."""

    def side(name: str) -> dict[str, torch.Tensor]:
        ids = torch.tensor([r["prompt_ids"] + r[name] for r in records])
        labels = ids.clone()
        labels[:, :PROMPT] = -100
        return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}

    return {"chosen": side("chosen_ids"), "rejected": side("rejected_ids")}


def theirs(vocabulary: int, steps: int, microbatches: int, more: str) -> Result:
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
        """The trainer on given token ids, in their order."""

        def _prepare_dataset(self, dataset: Any, *_args: Any, **_options: Any) -> Any:
            return dataset

        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return SequentialSampler(self.train_dataset if dataset is None else dataset)

    class Watch(TrainerCallback):
        def on_step_begin(self, *_args: Any, **_options: Any) -> None:
            clock.start()

        def on_step_end(self, *_args: Any, **_options: Any) -> None:
            clock.step()

    precomputed = more == "precomputed"
    model = llama(vocabulary)
    data = Dataset.from_list(pairs(vocabulary, PAIRS * steps))
    clock = Clock()
    with tempfile.TemporaryDirectory() as directory:
        trainer = Tokenised(
            model=model,
            ref_model=None if precomputed else llama(vocabulary),
            args=DPOConfig(
                output_dir=directory,
                per_device_train_batch_size=PAIRS // microbatches,
                gradient_accumulation_steps=microbatches,
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


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--vocabulary", type=int, default=50_257)
    parser.add_argument("--microbatches", type=int, choices=(1, 2, 4), default=4)
    parser.add_argument("--kinds", default=",".join(KINDS))
    options = parser.parse_args()
    if options.child is not None:
        warnings.simplefilter("ignore")
        torch.set_num_threads(options.threads)
        name, _, more = options.child.partition(" ")
        run: Callable[..., Result] = ours if name == "functrain" else theirs
        print(json.dumps(run(options.vocabulary, options.steps, options.microbatches, more)))
        return
    arguments = ["--vocabulary", str(options.vocabulary), "--steps", str(options.steps)]
    arguments += ["--microbatches", str(options.microbatches)]
    kinds = harness.chosen(options.kinds, KINDS)
    results = harness.interleaved(__file__, kinds, options.rounds, arguments, options.threads)
    # The trainer rounds the losses that it logs to four digits.
    apart = harness.check_losses(results, 2e-4)
    pairs_each = PAIRS // options.microbatches
    title = f"DPO, vocabulary {options.vocabulary:,}, {pairs_each} pair(s) a micro-batch"
    print(f"{title}, {options.rounds} rounds; losses equal within {apart:.1e}; ratios to TRL")
    print(harness.table(results, lambda kind: BASES[kind]))
    harness.written(options, title, results)


if __name__ == "__main__":
    main()
