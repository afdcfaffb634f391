"""SFT on examples of mixed lengths, packed, compared with TRL, padded and packed: time per target.

    pip install -e '.[dev,bench]'
    python benchmarks/packing.py [--model large] [--rounds 5] [--steps 4] [--threads 1]

The examples are the embedded documents: what Python documents, and what it says about it, of 13 to
512 words, longer ones cut; a word or a sign is a token. Packed rows have 512 tokens, two to a
micro-batch, four micro-batches to a step; padded ones are as long as the longest of the eight in a
micro-batch. Only completions are targets: what is compared is the seconds per thousand targets,
over the steps after the first. Model, optimizer and clipping are those of `steps.py`. TRL's packed
rows are laid out by TRL, without padding; whether its documents see each other depends on the
attention that it is run with.
"""

from __future__ import annotations

import json
import re
import tempfile
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import harness
import steps
import torch
from harness import Clock, Result
from steps import CLIP, RATE, SIZES, Size

TIME, ROWS, PADDED, MICROBATCHES = 512, 2, 8, 4


class Words:
    """A tokenizer whose tokens are words and signs, with hashes as ids."""

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self.end = 1

    def encode(self, text: str) -> list[int]:
        """The ids of a text; they begin at 3."""
        words = re.findall(r"\w+|[^\w\s]", text)
        return [3 + zlib.crc32(word.encode()) % (self._vocabulary - 3) for word in words]

    def decode(self, ids: list[int]) -> str:
        """Not possible: a hash does not determine its word."""
        raise NotImplementedError


def source(size: Size) -> Any:
    """The examples, in the same order for all."""
    import functrain as ft

    documents = [text.partition("\n\n") for text in ft.data.embedded.load().train]
    records = [{"prompt": head, "completion": rest} for head, _, rest in documents if rest]
    words: Any = Words(size.vocabulary)
    return ft.data.chat(records, words, time=TIME, batch_size=ROWS * MICROBATCHES)


def functrain(size: Size, count: int) -> Result:
    """`functrain.sft_step` on `functrain.data.packed`."""
    import functrain as ft

    rows = ft.data.packed(source(size), time=TIME)
    model = steps.llama(size)
    clock = Clock()
    architecture, params, buffers = ft.split(model)
    step = ft.sft_step(
        architecture,
        ft.optim.adamw(RATE, weight_decay=0.0),
        microbatches=MICROBATCHES,
        max_grad_norm=CLIP,
        donate=True,
    )
    state = step.init(params, buffers)
    del params
    targets = []
    clock.start()
    for number in range(count):
        batch = rows.at(number * rows.batch_size, rows.batch_size)
        state, metrics = step(state, batch)
        targets.append(metrics.to_dict()["num_tokens"])
        clock.step()
    return _by_target(clock, targets)


def trl_padded(size: Size, count: int) -> Result:
    """TRL's SFTTrainer with padding."""
    return _trained(size, count, PADDED, {"packing": False})


def trl_packed(size: Size, count: int) -> Result:
    """TRL's SFTTrainer with packing by best-fit decreasing."""
    return _trained(size, count, ROWS, {"packing": True, "packing_strategy": "bfd"})


def _trained(size: Size, count: int, rows: int, options: dict[str, Any]) -> Result:
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    words = WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), pad_token="<pad>", eos_token="<eos>"
    )
    targets: list[int] = []

    class Counting(SFTTrainer):
        """The trainer, recording the number of targets of each step."""

        def get_batch_samples(self, *args: Any, **given: Any) -> Any:
            batches, items = super().get_batch_samples(*args, **given)
            targets.append(sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches))
            return batches, items

    class Watch(TrainerCallback):
        def on_step_begin(self, *_args: Any, **_options: Any) -> None:
            if len(clock.steps) == 0:
                clock.start()

        def on_step_end(self, *_args: Any, **_options: Any) -> None:
            clock.step()

    examples = source(size).examples
    data = Dataset.from_list(
        [{"input_ids": list(ids), "labels": list(labels)} for ids, labels in examples]
    )
    model = steps.llama(size)
    clock = Clock()
    with tempfile.TemporaryDirectory() as directory:
        trainer = Counting(
            model=model,
            args=SFTConfig(
                output_dir=directory,
                per_device_train_batch_size=rows,
                gradient_accumulation_steps=MICROBATCHES,
                max_steps=count,
                learning_rate=RATE,
                lr_scheduler_type="constant",
                optim="adamw_torch_fused",
                weight_decay=0.0,
                max_grad_norm=CLIP,
                max_length=TIME,
                bf16=False,
                gradient_checkpointing=False,
                logging_steps=1,
                report_to="none",
                save_strategy="no",
                use_cpu=True,
                disable_tqdm=True,
                dataloader_pin_memory=False,
                seed=1,
                **options,
            ),
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[Watch()],
        )
        trainer.train()
    return _by_target(clock, targets[:count])


def _by_target(clock: Clock, targets: list[float] | list[int]) -> Result:
    """Seconds per thousand targets; losses are not compared, since the batches differ."""
    found = clock.report([])
    counted = sum(targets[harness.WARMUP :]) / 1000
    wall, cpu = (sum(each) for each in zip(*clock.steps[harness.WARMUP :], strict=True))
    return {**found, "wall": wall / counted, "cpu": cpu / counted, "targets": sum(targets)}


KINDS: dict[str, Callable[[Size, int], Result]] = {
    "functrain packed": functrain,
    "trl padded": trl_padded,
    "trl packed": trl_packed,
}


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--model", choices=SIZES, default="large")
    options = parser.parse_args()
    if options.child is not None:
        warnings.simplefilter("ignore")
        torch.set_num_threads(options.threads)
        print(json.dumps(KINDS[options.child](SIZES[options.model], options.steps)))
        return
    arguments = ["--model", options.model, "--steps", str(options.steps)]
    kinds = list(KINDS)
    results = harness.interleaved(__file__, kinds, options.rounds, arguments, options.threads)
    title = f"SFT, {options.model}, {options.threads} thread(s), {options.rounds} rounds"
    print(f"{title}; seconds for 1,000 targets, ratios to functrain")
    print(harness.table(results, lambda _kind: "functrain packed"))
    harness.written(options, title, results)


if __name__ == "__main__":
    main()
