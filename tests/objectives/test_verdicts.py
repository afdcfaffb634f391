"""What was found by trying a model holds for its config as it was, and for that alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo

pytest.importorskip("transformers")
import transformers
from models import families

import functrain as ft
from functrain.objectives.language import LanguageModeling
from functrain.objectives.verdicts import _KEPT, Verdicts


def test_a_cache_that_is_switched_on_later_mixes_documents_and_is_refused() -> None:
    architecture, params, buffers = families.stirred(families.CONFIGS["llama"]())
    position = torch.tensor([[*range(7), *range(5)]])
    ids = zoo.batch(examples=1, time=12)["input_ids"]
    labels = ids.masked_fill(position == 0, -100)
    batch = {"input_ids": ids, "labels": labels, "position_ids": position}
    for caching in (False, True, False):
        architecture.config.use_cache = caching
        gradient = ft.value_and_grad(LanguageModeling(), architecture)
        if not caching:
            gradient(params, buffers, batch)
            continue
        with pytest.raises(ft.ArchitectureError, match=r"under config\.use_cache"):
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


def test_a_config_with_what_has_no_equal_copy_is_known_again() -> None:
    config = transformers.LlamaConfig(vocab_size=8)
    config.extra = [float("nan"), object()]
    verdicts = Verdicts[int]()
    for given in (config, None, ft.models.DecoderConfig(vocabulary=8)):
        model = Model(given)
        verdicts.of(model)["answer"] = 1
        assert verdicts.of(model) == {"answer": 1}
