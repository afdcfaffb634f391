"""The tasks of lm-evaluation-harness over values: no export, and no second model.

model = functrain.models.harness(architecture, state.params, state.buffers, tokenizer)
lm_eval.simple_evaluate(model=model, tasks=["hellaswag"])
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from functrain.architecture import bound
from functrain.data.pretrained import PretrainedTokenizer
from functrain.data.tokenizers import Tokenizer
from functrain.errors import ConfigError, DataError
from functrain.models.generate import ends, generate

Scored = tuple[float, bool]
"""A log-prob, and whether every token of it is the likeliest one."""
_GENERATED = 256  # tokens, where a task names no number


def harness(
    architecture: nn.Module,
    params: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    *,
    time: int = 1024,
    batch_size: int = 8,
) -> Any:
    """A model for `lm_eval.simple_evaluate(model=…)`: an `lm_eval.api.model.LM`.

    `time`: tokens that the model sees at once, at most; longer contexts lose their beginning, and
    running text is scored in windows of it. `batch_size`: sequences at once, which changes no
    result but for rounding. Text is encoded without special tokens, as lm-eval's own models do;
    what has no context stands after the tokenizer's bos, or its end where it has none.

    Raises `ConfigError` where lm_eval is not installed.
    """
    try:
        base = importlib.import_module("lm_eval.api.model").TemplateLM
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"tasks need {error.name}, which is not installed: pip install 'functrain[eval]'"
        ) from error
    if time < 2 or batch_size < 1:
        raise ConfigError(
            f"harness: time {time} and batch_size {batch_size}, expected at least 2 and 1"
        )
    live: Any = type("Live", (_Live, base), {})
    return live(architecture, params, buffers, tokenizer, time, batch_size)


class _Live:
    """What `lm_eval.api.model.TemplateLM` leaves open."""

    def __init__(
        self,
        architecture: nn.Module,
        params: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        tokenizer: Tokenizer,
        time: int,
        batch_size: int,
    ) -> None:
        super().__init__()
        self.values = (architecture, params, buffers)
        self.given = tokenizer
        self.tokenizer = tokenizer.inner if isinstance(tokenizer, PretrainedTokenizer) else None
        self.time, self.batch_size = time, batch_size

    @property
    def eot_token_id(self) -> int:
        return self.given.end

    @property
    def prefix_token_id(self) -> int:
        begin = getattr(self.tokenizer, "bos_token_id", None)
        return self.given.end if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        name = getattr(self.given, "directory", "") or type(self.given).__name__
        return str(name).replace("/", "__")

    def tok_encode(self, string: str, *_args: Any, **_options: Any) -> list[int]:
        return self.given.encode(string)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        if self.tokenizer is None:
            raise ConfigError(
                f"{type(self.given).__name__} has no chat template; leave out apply_chat_template"
            )
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(text)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_options: Any
    ) -> list[Scored]:
        return self._scored([(context, said) for _, context, said in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any], **_options: Any) -> list[float]:
        utils: Any = importlib.import_module("lm_eval.utils")
        windows: list[tuple[list[int], list[int]]] = []
        counts = []
        for request in requests:
            found = utils.get_rolling_token_windows(
                token_list=self.given.encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.time,
                context_len=1,
            )
            before = len(windows)
            windows += map(utils.make_disjoint_window, found)
            counts.append(len(windows) - before)
        scores = iter(self._scored(windows))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: Sequence[Any], **_options: Any) -> list[str]:
        return [self._generated(*request.args) for request in requests]

    def _generated(self, context: str, options: Mapping[str, Any]) -> str:
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else [text for text in until if text]
        count = int(options.get("max_gen_toks", _GENERATED))
        if count >= self.time:
            raise ConfigError(
                f"harness: a task asks for {count} tokens, and time is {self.time}; give more"
            )
        sampled = bool(options.get("do_sample", False))
        ids = generate(
            *self.values,
            self.given.encode(context)[-(self.time - count) :] or [self.prefix_token_id],
            max_new_tokens=count,
            temperature=float(options.get("temperature", 1.0)) if sampled else 0.0,
            top_k=options.get("top_k"),
            top_p=options.get("top_p"),
            end=ends(self.values[0], self.given.end),
            stop=lambda new: any(text in self.given.decode(new) for text in stops),
        )
        text = self.given.decode(ids)
        cut = min((text.index(stop) for stop in stops if stop in text), default=len(text))
        return text[:cut]

    @torch.no_grad()
    def _scored(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Scored]:
        """Each continuation after its context; the longest first, so that memory shows early."""
        order = sorted(range(len(pairs)), key=lambda n: -len(pairs[n][0]) - len(pairs[n][1]))
        found: dict[int, Scored] = {}
        with bound(*self.values, "eval") as model:
            for at in range(0, len(order), self.batch_size):
                batch = order[at : at + self.batch_size]
                scores = self._batch(model, [pairs[n] for n in batch])
                found |= dict(zip(batch, scores, strict=True))
        return [found[n] for n in range(len(pairs))]

    def _batch(
        self, model: nn.Module, pairs: Sequence[tuple[list[int], list[int]]]
    ) -> list[Scored]:
        for context, said in pairs:
            if not context or not 0 < len(said) <= self.time:
                raise DataError(
                    f"harness: {len(said)} tokens after {len(context)}, expected 1 to {self.time} "
                    "after at least 1; give more time"
                )
        device = next((p.device for p in self.values[1].values()), torch.device("cpu"))
        rows = [torch.tensor([*context, *said][-(self.time + 1) :]) for context, said in pairs]
        # Padding comes last, and no causal model looks ahead.
        ids = nn.utils.rnn.pad_sequence([row[:-1] for row in rows], batch_first=True).to(device)
        outputs = model(input_ids=ids)
        outputs = outputs["logits"] if isinstance(outputs, Mapping) else outputs
        logits = outputs if isinstance(outputs, Tensor) else outputs.logits
        scores = []
        for row, (_, said), each in zip(rows, pairs, logits, strict=True):
            targets = row[-len(said) :].to(device)
            part = each[len(row) - 1 - len(said) : len(row) - 1].float()
            logprob = -F.cross_entropy(part, targets, reduction="sum")
            scores.append((float(logprob), bool((part.argmax(-1) == targets).all())))
        return scores
