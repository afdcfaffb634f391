"""Tasks of lm-evaluation-harness on values: no export, and no second model.

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
from functrain.objectives.base import logits_in
from functrain.state import device_of
from functrain.trees import clone

Scored = tuple[float, bool]
"""A log-prob, and whether each of its tokens is the likeliest one."""
_LONGEST = 2048
_READ = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p")
_NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1, "use_cache": True}
"""The options of a generation that are read, and values of others that change nothing."""


def _longest(architecture: nn.Module) -> int:
    config = getattr(architecture, "config", None)
    names = ("n_positions", "max_position_embeddings", "n_ctx")
    found = [getattr(config, name, None) for name in names]
    return next((each for each in found if isinstance(each, int)), _LONGEST)


def harness(
    architecture: nn.Module,
    params: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    *,
    time: int | None = None,
    batch_size: int = 8,
) -> Any:
    """A model for `lm_eval.simple_evaluate(model=…)`: an `lm_eval.api.model.LM`.

    `time`: the most tokens that the model sees at once, by default those of its config (or 2048);
    longer contexts lose their beginning, and running text is scored in windows of it.
    `batch_size`: sequences at once, which changes no result but for rounding.

    As in lm-eval's own class, a text is encoded with the special tokens that the tokenizer adds,
    unless it begins with them; what has no context follows the tokenizer's bos, or its end where it
    has none; `do_sample` and its options are those of a task, whose repeats differ.

    Raises `ConfigError` where lm_eval is not installed.
    """
    try:
        base = importlib.import_module("lm_eval.api.model").TemplateLM
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"tasks need {error.name}, which is not installed: pip install 'functrain[eval]'"
        ) from error
    time = _longest(architecture) if time is None else time
    if time < 2 or batch_size < 1:
        raise ConfigError(
            f"harness: time {time} and batch_size {batch_size}, expected at least 2 and 1"
        )
    live: Any = type("Live", (_Live, base), {})
    return live(architecture, params, buffers, tokenizer, time, batch_size)


class _Live:
    """The methods that `lm_eval.api.model.TemplateLM` leaves open."""

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

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_options: Any
    ) -> list[int]:
        if self.tokenizer is None:
            return self.given.encode(string)
        begin = self.tokenizer.decode(self.prefix_token_id)
        adds = not string.startswith(begin) if add_special_tokens is None else add_special_tokens
        return list(self.tokenizer.encode(string, add_special_tokens=adds))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        if self.tokenizer is None:
            raise ConfigError(
                f"{type(self.given).__name__} has no chat template; leave out apply_chat_template"
            )
        text = self.tokenizer.apply_chat_template(
            chat_history,
            **getattr(self.given, "told", {}),
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
                token_list=self.tok_encode(request.args[0]),
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
        utils: Any = importlib.import_module("lm_eval.models.utils")
        return [
            self._generated(request.args[0], utils.normalize_gen_kwargs(request.args[1]), number)
            for number, request in enumerate(requests)
        ]

    def _generated(self, context: str, options: Mapping[str, Any], number: int) -> str:
        """`number`: that of the request, so that the repeats of a sampled one differ."""
        unknown = {n: v for n, v in options.items() if n not in _READ and v != _NEUTRAL.get(n)}
        if unknown:
            raise ConfigError(
                f"harness: a task asks for {unknown}, which generation here does not heed; known: "
                f"{', '.join(_READ)}"
            )
        count, stops = options["max_gen_toks"], [text for text in options["until"] if text]
        if count >= self.time:
            raise ConfigError(
                f"harness: a task asks for {count} tokens, and time is {self.time}; give more"
            )
        ids = generate(
            *self.values,
            self.tok_encode(context)[-(self.time - count) :] or [self.prefix_token_id],
            max_new_tokens=count,
            # Sampled at 1, transformers' own default, where a task gives no temperature.
            temperature=float(options["temperature"] or 1.0) if options["do_sample"] else 0.0,
            top_k=options.get("top_k"),
            top_p=options.get("top_p"),
            end=ends(self.values[0], self.given.end),
            stop=lambda new: any(text in self._spelt(new) for text in stops),
            seed=number,
        )
        return self._until(ids, stops)

    def _until(self, ids: Sequence[int], stops: Sequence[str]) -> str:
        """The text of ids up to the first of the stops, which may be special tokens."""
        spelt = self._spelt(ids)
        cut = min((spelt.index(stop) for stop in stops if stop in spelt), default=len(spelt))
        spelt = spelt[:cut]
        whole = next(n for n in range(len(ids), -1, -1) if spelt.startswith(self._spelt(ids[:n])))
        # The last token may begin with text and end in a stop.
        return self.given.decode(ids[:whole]) + spelt[len(self._spelt(ids[:whole])) :]

    def _spelt(self, ids: Sequence[int]) -> str:
        spell = getattr(self.given, "spell", self.given.decode)
        return str(spell(ids))

    @torch.no_grad()
    def _scored(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Scored]:
        """Each continuation after its context; the longest first, so that memory runs out early."""
        order = sorted(range(len(pairs)), key=lambda n: -len(pairs[n][0]) - len(pairs[n][1]))
        found: dict[int, Scored] = {}
        architecture, params, buffers = self.values
        with bound(architecture, params, clone(buffers), "eval") as model:
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
        device = device_of(self.values[1])
        rows = [torch.tensor([*context, *said][-(self.time + 1) :]) for context, said in pairs]
        # Padding comes last, and no causal model looks ahead.
        ids = nn.utils.rnn.pad_sequence([row[:-1] for row in rows], batch_first=True).to(device)
        logits = logits_in(model(input_ids=ids))
        scores = []
        for row, (_, said), each in zip(rows, pairs, logits, strict=True):
            targets = row[-len(said) :].to(device)
            part = each[len(row) - 1 - len(said) : len(row) - 1].float()
            logprob = -F.cross_entropy(part, targets, reduction="sum")
            scores.append((float(logprob), bool((part.argmax(-1) == targets).all())))
        return scores
