"""Generation: a function of (params, prompt, seed), the same with and without a cache."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import attrs
import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st

import functrain as ft
from functrain import models
from functrain.models import generate
from functrain.models.generate import _sampled

CONFIG = models.DecoderConfig(
    vocabulary=23, width=16, layers=2, heads=4, kv_heads=2, hidden=24, tied=False
)


class Uncached(torch.nn.Module):
    """The decoder as any other model: called with the whole sequence each time."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.inner(input_ids)}


@functools.cache
def _pair() -> tuple[Any, Any]:
    """A decoder and the same one without a cache."""
    whole = ft.split(Uncached(zoo.model("decoder", torch.float64)))
    return zoo.split("decoder", torch.float64), whole


@given(
    prompt=st.lists(st.integers(0, zoo.VOCABULARY - 1), min_size=1, max_size=6),
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    seed=st.integers(0, 1000),
)
def test_the_cache_changes_no_token(prompt: list[int], temperature: float, seed: int) -> None:
    options: dict[str, Any] = {"max_new_tokens": 8, "temperature": temperature, "seed": seed}
    decoder, whole = _pair()
    cached = generate(*decoder, prompt, **options)
    assert cached == generate(*whole, prompt, **options)
    assert len(cached) == 8


def test_the_same_call_gives_the_same_tokens_and_moves_no_generator() -> None:
    parts = zoo.split("decoder")
    before = torch.get_rng_state()
    calls = [
        generate(*parts, [1, 2], max_new_tokens=20, temperature=1.0, seed=s) for s in (1, 1, 2)
    ]
    assert calls[0] == calls[1] != calls[2]
    assert torch.equal(before, torch.get_rng_state())


def test_it_stops_at_the_end_and_leaves_it_out() -> None:
    parts = zoo.split("decoder")
    free = generate(*parts, [1], max_new_tokens=20, temperature=1.0)
    end = free[7]
    stopped = generate(*parts, [1], max_new_tokens=20, temperature=1.0, end=end)
    assert stopped == free[: free.index(end)]


DRAWS = 2000  # three and a half standard deviations to what is allowed


def test_sampling_follows_the_probabilities_it_is_cut_to() -> None:
    logits = torch.tensor([0.4, 0.1, 0.3, 0.2]).log()
    torch.manual_seed(0)
    cases: list[tuple[dict[str, Any], dict[int, float]]] = [
        ({}, {0: 0.4, 1: 0.1, 2: 0.3, 3: 0.2}),
        ({"top_k": 2}, {0: 4 / 7, 2: 3 / 7}),
        ({"top_p": 0.65}, {0: 4 / 7, 2: 3 / 7}),
        ({"top_p": 0.75}, {0: 4 / 9, 2: 3 / 9, 3: 2 / 9}),
        ({"top_p": 0.01}, {0: 1.0}),
    ]
    for options, expected in cases:
        given_options = {"top_k": None, "top_p": None, **options}
        drawn = Counter(_sampled(logits, 1.0, **given_options) for _ in range(DRAWS))
        assert set(drawn) == set(expected)
        for token, probability in expected.items():
            assert drawn[token] / DRAWS == pytest.approx(probability, abs=0.04)
    assert _sampled(logits, 0.0, None, None) == 0


BAD: list[tuple[dict[str, Any], str]] = [
    ({"input_ids": []}, "an empty prompt"),
    ({"input_ids": [1, 99]}, r"99 at 1 is out of range, expected \[0, 31\)"),
    ({"input_ids": [-1]}, "-1 at 0"),
    ({"max_new_tokens": 0}, "max_new_tokens: 0"),
    ({"temperature": -1.0}, "temperature: -1.0"),
    ({"temperature": float("nan")}, "temperature: nan"),
    ({"top_k": 0}, "top_k: 0"),
    ({"top_p": 0.0}, "top_p: 0.0"),
    ({"top_p": 1.1}, "top_p: 1.1"),
    ({"input_ids": torch.tensor([1, 2])}, r"a Tensor, expected .* of a tensor, ids\.tolist"),
    ({"input_ids": "the"}, "a str, expected the token ids"),
    ({"input_ids": [1.5]}, "a list, expected the token ids of one prompt as a sequence of int"),
    ({"max_new_tokens": 2.5}, "max_new_tokens: 2.5, expected an integer"),
    ({"temperature": None}, "temperature: None"),
    ({"temperature": True}, "temperature: True"),
    ({"top_k": 2.5}, "top_k: 2.5, expected an integer"),
    ({"top_p": "x"}, "top_p: 'x', expected a number"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_what_cannot_be_generated_is_named(options: dict[str, Any], message: str) -> None:
    call = {"input_ids": [1], "max_new_tokens": 3, **options}
    with pytest.raises(ft.FunctrainError, match=message):
        generate(*zoo.split("decoder"), **call)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_choose_no_token(temperature: float) -> None:
    architecture, params, buffers = zoo.split("decoder")
    broken = ft.trees.map_leaves(lambda param: param * torch.nan, params)
    with pytest.raises(ft.StateError, match="the largest logit of the next token is nan"):
        generate(architecture, broken, buffers, [1], max_new_tokens=2, temperature=temperature)


@given(logits=st.lists(st.integers(-50, 50), min_size=2, max_size=9, unique=True))
def test_the_lowest_temperatures_are_greedy(logits: list[int]) -> None:
    given = torch.tensor(logits, dtype=torch.float32)
    for temperature in (5e-324, 1e-46, 1e-40, 1e-3):
        assert _sampled(given, temperature, None, None) == int(given.argmax())


def test_what_was_trained_is_what_is_said() -> None:
    config = ft.models.DecoderConfig(vocabulary=128, width=32, layers=1, heads=2)
    architecture, params, buffers = ft.split(ft.models.decoder(config))
    step = ft.pretrain_step(architecture, ft.optim.adamw(1e-2))
    state = step.init(params, buffers)
    ids = torch.tensor([list(b"the cat sat")] * 4)
    for _ in range(60):
        state, _ = step(state, {"input_ids": ids, "labels": ids})
    parts = architecture, state.params, attrs.evolve(state).buffers
    assert bytes(generate(*parts, list(b"the"), max_new_tokens=8)) == b" cat sat"


def test_each_token_is_a_draw_of_its_own() -> None:
    """All tokens are equally likely: one draw for all would say the same one again and again."""
    architecture, params, buffers = ft.split(models.decoder(CONFIG))
    flat = ft.trees.map_leaves(torch.zeros_like, params)
    said = models.generate(
        architecture, flat, buffers, [1], max_new_tokens=30, temperature=1.0, seed=3
    )
    assert len(set(said)) > 10


def test_generation_is_in_eval_mode() -> None:
    architecture, params, buffers = ft.split(models.decoder(attrs.evolve(CONFIG, dropout=0.9)))
    plain, _, _ = ft.split(models.decoder(CONFIG))
    params = ft.trees.map_leaves(lambda p: 20 * p, params)
    ends = [
        models.generate(a, params, buffers, [1, 2], max_new_tokens=12)
        for a in (architecture, plain)
    ]
    assert ends[0] == ends[1]
