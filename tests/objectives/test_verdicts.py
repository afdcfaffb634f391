"""What was found by trying a model holds for its config as it was, and for that alone."""

from __future__ import annotations

import dataclasses
import threading
import types
from collections.abc import Callable
from typing import Any

import attrs
import numpy as np
import pytest
import torch
import zoo

pytest.importorskip("transformers")
import transformers
from models import families

import functrain as ft
from functrain.objectives.language import LanguageModeling
from functrain.objectives.verdicts import _KEPT, Verdicts


class Switched(torch.nn.Module):
    """A decoder whose config says whether it separates documents."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder, self.config = zoo.decoder(), types.SimpleNamespace(separates=True)

    def forward(self, position_ids: torch.Tensor | None = None, **inputs: Any) -> Any:
        return self.decoder(position_ids=position_ids if self.config.separates else None, **inputs)


def test_a_model_that_is_switched_later_to_mix_documents_is_refused() -> None:
    architecture, params, buffers = ft.split(Switched())
    position = torch.tensor([[*range(7), *range(5)]])
    ids = zoo.batch(examples=1, time=12)["input_ids"]
    labels = ids.masked_fill(position == 0, -100)
    batch = {"input_ids": ids, "labels": labels, "position_ids": position}
    for separates in (True, False, True):
        config: Any = architecture.config
        config.separates = separates
        gradient = ft.value_and_grad(LanguageModeling(), architecture)
        if separates:
            gradient(params, buffers, batch)
            continue
        with pytest.raises(ft.ArchitectureError, match=r"does not keep such documents apart"):
            gradient(params, buffers, batch)


def test_a_soft_cap_that_is_set_later_counts_in_a_head_by_chunks(monkeypatch: Any) -> None:
    monkeypatch.setattr("functrain.objectives.chunks.WORTH", 1)
    config = transformers.Gemma2Config(**families.NARROW, final_logit_softcapping=None)
    parts = families.stirred(config)
    for cap in (None, 0.5, None):
        parts[0].config.final_logit_softcapping = cap
        losses = [
            ft.value_and_grad(LanguageModeling(head=each), parts[0])(*parts[1:], zoo.batch())
            for each in ("auto", "full")
        ]
        by_chunks, whole = (each.metrics["loss"] for each in losses)
        torch.testing.assert_close(by_chunks, whole, rtol=1e-5, atol=1e-6)


class Model(torch.nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config


def test_configs_that_take_turns_are_all_known_and_not_without_end() -> None:
    config = transformers.LlamaConfig(vocab_size=8)
    model, verdicts = Model(config), Verdicts[int]()
    for number in (1, 2):
        config.rope_parameters["rope_theta"] = number  # within the config's own dict
        verdicts.of(model)["answer"] = number
    for number in (1, 2, 1):
        config.rope_parameters["rope_theta"] = number
        assert verdicts.of(model) == {"answer": number}
    for number in range(3, 40):
        config.rope_parameters["rope_theta"] = number
        assert verdicts.of(model) == {}
    assert len(verdicts._known[model]) == _KEPT + 1


@attrs.define
class Slotted:
    cap: float | None = None


@dataclasses.dataclass
class Plain:
    cap: float | None = None


class Bare:
    cap: float | None = None


@dataclasses.dataclass
class Outer:
    head: Any


@attrs.frozen
class Frozen:
    head: Any


IN_PLACE: dict[str, Callable[[Any], Any]] = {
    "itself": lambda part: part,
    "a field": Outer,
    "a slot": Frozen,
    "a namespace": lambda part: types.SimpleNamespace(head=part),
    "a list": lambda part: Outer([part]),
    "a tuple in a dict": lambda part: {"parts": (part,)},
}


@pytest.mark.parametrize("kind", [Slotted, Plain, Bare, types.SimpleNamespace])
@pytest.mark.parametrize("where", sorted(IN_PLACE))
def test_a_change_within_a_config_is_another_model(where: str, kind: Any) -> None:
    """Wherever it is, and of whatever class."""
    part = kind()
    model, verdicts = Model(IN_PLACE[where](part)), Verdicts[int]()
    for number in (1, 2):
        part.cap = float(number)
        assert verdicts.of(model) == {}
        verdicts.of(model)["answer"] = number
    for number in (1, 2, 1):
        part.cap = float(number)
        assert verdicts.of(model) == {"answer": number}


class Circle:
    def __init__(self) -> None:
        self.own = self


UNEQUAL: dict[str, Callable[[], Any]] = {
    "of transformers": lambda: transformers.LlamaConfig(vocab_size=8),
    "of the decoder": lambda: ft.models.DecoderConfig(vocabulary=8),
    "none": lambda: None,
    "what equals nothing": lambda: Outer([float("nan"), object()]),
    "tensors": lambda: Outer([torch.ones(2), torch.ones(2)]),
    "arrays": lambda: {"arrays": {"one": np.ones(2)}},
    "a lock": lambda: Outer([threading.Lock()]),
    "functions and classes": lambda: Outer([lambda: 1, int, iter([1])]),
    "a circle": lambda: Outer(Circle()),
}


@pytest.mark.parametrize("what", sorted(UNEQUAL))
def test_a_config_with_what_has_no_equal_copy_is_known_again(what: str) -> None:
    """By its identity: another array in its place is another model."""
    config = UNEQUAL[what]()
    model, verdicts = Model(config), Verdicts[int]()
    verdicts.of(model)["answer"] = 1
    assert verdicts.of(model) == {"answer": 1}
    if what == "arrays":
        config["arrays"]["one"] = np.zeros(2)
        assert verdicts.of(model) == {}
