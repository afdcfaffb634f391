"""A training step compared with a hand-written loop, transformers, TRL, Fabric and accelerate.

    pip install -e '.[dev,bench]'
    python benchmarks/steps.py [--model large] [--rounds 5] [--steps 4] [--threads 1]

A Llama with random weights on random tokens, the same for all: AdamW with the fused kernel, four
micro-batches of two sequences, clipping at 1, fp32, checkpointing in `selective` and `lean` alone.
`small` has 2 M parameters and sequences of 128, `large` 38 M, a vocabulary of 50,257 and sequences
of 256. All must reach the same losses. Memory is the peak of the process above what it held after
loading the model. `loop` is the best hand-written loop that we know: gradients set to None, the
fused optimizer, logits made once, no wait for any metric but the loss of each step.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import harness
import torch
from harness import Clock, Result

RATE, CLIP, MICROBATCHES, ROWS = 1e-3, 1.0, 4, 2
BETAS, EPS = (0.9, 0.999), 1e-8


@attrs.frozen
class Size:
    """The shape of the model and of a sequence."""

    vocabulary: int
    width: int
    hidden: int
    layers: int
    heads: int
    time: int


SIZES = {
    "small": Size(4_096, 160, 448, 5, 4, 128),
    "large": Size(50_257, 512, 1_408, 4, 8, 256),
}


def llama(size: Size) -> Any:
    """A Llama with a tied head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=size.time,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    model.train()
    model.generate  # noqa: B018  (loads what transformers loads late, before memory is counted)
    return model


def batches(size: Size, steps: int) -> list[torch.Tensor]:
    """Token ids [micro-batches · rows, time], one tensor per step."""
    generator = torch.Generator().manual_seed(1)
    shape = (MICROBATCHES * ROWS, size.time)
    return [torch.randint(0, size.vocabulary, shape, generator=generator) for _ in range(steps)]


def microbatches(size: Size, steps: int) -> Iterator[torch.Tensor]:
    for batch in batches(size, steps):
        yield from batch.chunk(MICROBATCHES)


def functrain(
    size: Size, steps: int, *, donate: bool = True, pages: str | None = None, **options: Any
) -> Result:
    """`functrain.pretrain_step`; `pages`: what the process does with memory that it frees."""
    import functrain as ft

    if pages is not None:
        {"kept": ft.keep_pages, "returned": ft.return_pages}[pages]()
    model = llama(size)
    clock = Clock()
    architecture, params, buffers = ft.split(model)
    step = ft.pretrain_step(
        architecture,
        ft.optim.adamw(RATE, betas=BETAS, eps=EPS, weight_decay=0.0),
        microbatches=MICROBATCHES,
        max_grad_norm=CLIP,
        donate=donate,
        **options,
    )
    state = step.init(params, buffers)
    del params
    losses = []
    data = [{"input_ids": ids, "labels": ids} for ids in batches(size, steps)]
    clock.start()
    for batch in data:
        state, metrics = step(state, batch)
        losses.append(metrics.to_dict()["loss"])
        clock.step()
    return clock.report(losses)


def pure(size: Size, steps: int) -> Result:
    """The same without donation: the old state stays intact."""
    return functrain(size, steps, donate=False)


def kept(size: Size, steps: int) -> Result:
    """The same in a process that keeps its memory (`functrain.keep_pages`)."""
    return functrain(size, steps, pages="kept")


def returned(size: Size, steps: int) -> Result:
    """The same in a process that returns its memory (`functrain.return_pages`)."""
    return functrain(size, steps, pages="returned")


def lean(size: Size, steps: int) -> Result:
    """`returned`, with the MLPs' activations recomputed in the backward pass."""
    return functrain(size, steps, pages="returned", checkpoint="model.layers.*.mlp")


def selective(size: Size, steps: int) -> Result:
    """The same, with all but products and attention of the blocks recomputed."""
    return functrain(size, steps, checkpoint="model.layers.*", recompute="selective")


def compiled(size: Size, steps: int) -> Result:
    """The same with `compile=True`."""
    return functrain(size, steps, compile=True)


def kept_compiled(size: Size, steps: int) -> Result:
    """The same with `compile=True`, in a process that keeps its memory."""
    return functrain(size, steps, pages="kept", compile=True)


def _adamw(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        model.parameters(), RATE, betas=BETAS, eps=EPS, weight_decay=0.0, fused=True
    )


def loop(size: Size, steps: int) -> Result:
    """A loop written by hand."""
    model = llama(size)
    clock = Clock()
    optimizer = _adamw(model)
    losses = []
    clock.start()
    for batch in batches(size, steps):
        total = torch.zeros(())
        for ids in batch.chunk(MICROBATCHES):
            loss = model(input_ids=ids, labels=ids).loss / MICROBATCHES
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(total))
        clock.step()
    return clock.report(losses)


def fabric(size: Size, steps: int) -> Result:
    """Lightning Fabric's loop."""
    from lightning.fabric import Fabric

    model = llama(size)
    clock = Clock()
    runner = Fabric(accelerator="cpu", devices=1)
    model, optimizer = runner.setup(model, _adamw(model))
    losses = []
    clock.start()
    for batch in batches(size, steps):
        total = torch.zeros(())
        for index, ids in enumerate(batch.chunk(MICROBATCHES)):
            with runner.no_backward_sync(model, enabled=index < MICROBATCHES - 1):
                loss = model(input_ids=ids, labels=ids).loss / MICROBATCHES
                runner.backward(loss)
            total += loss.detach()
        runner.clip_gradients(model, optimizer, max_norm=CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total))
        clock.step()
    return clock.report(losses)


def accelerate(size: Size, steps: int) -> Result:
    """accelerate's loop."""
    from accelerate import Accelerator

    model = llama(size)
    clock = Clock()
    runner = Accelerator(cpu=True, gradient_accumulation_steps=MICROBATCHES)
    model, optimizer = runner.prepare(model, _adamw(model))
    losses = []
    total = torch.zeros(())
    clock.start()
    for ids in microbatches(size, steps):
        with runner.accumulate(model):
            loss = model(input_ids=ids, labels=ids).loss
            runner.backward(loss)
            total += loss.detach() / MICROBATCHES
            if runner.sync_gradients:
                runner.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
        if runner.sync_gradients:
            losses.append(float(total))
            total.zero_()
            clock.step()
    return clock.report(losses)


def trainer(size: Size, steps: int) -> Result:
    """transformers' Trainer."""
    from transformers import Trainer, TrainingArguments

    return _trained(size, steps, Trainer, TrainingArguments, {})


def sft(size: Size, steps: int) -> Result:
    """TRL's SFTTrainer."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), pad_token="<pad>", eos_token="<eos>"
    )

    class Tokenised(SFTTrainer):
        """The trainer on given token ids."""

        def _prepare_dataset(self, dataset: Any, *_args: Any, **_options: Any) -> Any:
            return dataset

    more = {
        "max_length": None,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    return _trained(size, steps, Tokenised, SFTConfig, more, processing_class=tokenizer)


def _trained(
    size: Size, steps: int, kind: Any, arguments: Any, more: dict[str, Any], **given: Any
) -> Result:
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import TrainerCallback

    class Ordered(kind):  # type: ignore[misc]
        """The trainer with the examples in their order."""

        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return SequentialSampler(self.train_dataset if dataset is None else dataset)

    class Watch(TrainerCallback):
        def on_step_begin(self, *_args: Any, **_options: Any) -> None:
            clock.start()

        def on_step_end(self, *_args: Any, **_options: Any) -> None:
            clock.step()

    rows = [row.tolist() for batch in batches(size, steps) for row in batch]
    data = Dataset.from_list([{"input_ids": row, "labels": row} for row in rows])
    if kind.__mro__[0].__name__ == "Trainer":
        data = data.with_format("torch")
    model = llama(size)
    clock = Clock()
    with tempfile.TemporaryDirectory() as directory:
        made = Ordered(
            model=model,
            args=arguments(
                output_dir=directory,
                per_device_train_batch_size=ROWS,
                gradient_accumulation_steps=MICROBATCHES,
                max_steps=steps,
                learning_rate=RATE,
                lr_scheduler_type="constant",
                optim="adamw_torch_fused",
                weight_decay=0.0,
                max_grad_norm=CLIP,
                logging_steps=1,
                report_to="none",
                save_strategy="no",
                use_cpu=True,
                disable_tqdm=True,
                dataloader_pin_memory=False,
                **more,
            ),
            train_dataset=data,
            callbacks=[Watch()],
            **given,
        )
        made.train()
    return clock.report([each["loss"] for each in made.state.log_history if "loss" in each])


KINDS: dict[str, Callable[[Size, int], Result]] = {
    "functrain": functrain,
    **{
        f"functrain {each.__name__}": each
        for each in (pure, kept, returned, selective, lean, compiled, kept_compiled)
    },
    **{each.__name__: each for each in (loop, fabric, accelerate, trainer, sft)},
}


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--model", choices=SIZES, default="large")
    parser.add_argument("--kinds", default=",".join(KINDS), help="which, the base first or loop")
    options = parser.parse_args()
    size = SIZES[options.model]
    if options.child is not None:
        warnings.simplefilter("ignore")
        torch.set_num_threads(options.threads)
        print(json.dumps(KINDS[options.child](size, options.steps)))
        return
    kinds = harness.chosen(options.kinds, KINDS)
    arguments = ["--model", options.model, "--steps", str(options.steps)]
    results = harness.interleaved(__file__, kinds, options.rounds, arguments, options.threads)
    base = "loop" if "loop" in kinds else kinds[0]
    # transformers' Trainer rounds the losses that it logs to four digits.
    apart = harness.check_losses(results, 2e-3)
    title = f"{options.model}, {options.threads} thread(s), {options.rounds} rounds"
    print(f"{title}; losses equal within {apart:.1e}; ratios to {base}")
    print(harness.table(results, lambda _kind: base))
    harness.written(options, title, results)


if __name__ == "__main__":
    main()
