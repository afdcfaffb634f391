"""A guard against slow changes that is no timer: kernels called and bytes allocated by a step.

The counts are functions of the code and of torch's version alone. Where a change makes them
smaller, the budget here is lowered with it; where it makes them larger, it has to say why.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import functrain as ft
from functrain import accumulators
from functrain.models import DecoderConfig, decoder
from functrain.objectives import chunks

VOCABULARY, ROWS, TIME = 2_000, 4, 64
SHAPE = DecoderConfig(vocabulary=VOCABULARY, width=32, layers=2, heads=2, hidden=64)
TABLE = VOCABULARY * 32 * 4

BUDGETS: dict[str, tuple[int, float]] = {
    "pretrain": (462, 26.9),
    "pretrain, 4 micro-batches": (1_216, 69.3),
    "pretrain, pure": (542, 30.9),
    "pretrain, fp16": (605, 36.7),
    "pretrain, canonical, 4 micro-batches": (1_195, 76.1),
    "pretrain, whole logits": (322, 73.9),
    "dpo": (1_135, 69.5),
    "dpo, shared prompt": (1_224, 56.7),
}
"""Kernel calls, and bytes of new memory in units of the embedding table's, of one step.

For the norm, small tensors are laid side by side: a third of a table, and fewer calls. Whole logits
have the bits of an ordinary loop, whose table's gradient is dense. Whether targets are modes is
seven small calls for each chunk of many logits, where `argmax` was one, of four times their time.
Of DPO the loss is differentiated for each pair while its logits are there: some 70 calls on as many
numbers as it has tokens, and no logits a second time.
"""


class Work(TorchDispatchMode):
    """Counts the operations that reach a backend, and the bytes of the memory they make."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.bytes = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.is_view or func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return found
        self.calls += 1
        flat = torch.utils._pytree.tree_leaves((args, kwargs))
        given = {t.untyped_storage().data_ptr() for t in flat if isinstance(t, Tensor)}
        made: dict[int, int] = {}
        for each in torch.utils._pytree.tree_leaves(found):
            if isinstance(each, Tensor):
                storage = each.untyped_storage()
                if storage.data_ptr() not in given:
                    made[storage.data_ptr()] = storage.nbytes()
        self.bytes += sum(made.values())
        return found


def _sequences(seed: int) -> dict[str, Tensor]:
    ids = torch.randint(0, VOCABULARY, (ROWS, TIME), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.clone()}


def _pairs() -> dict[str, Any]:
    sides = {name: _sequences(seed) for seed, name in enumerate(("chosen", "rejected"))}
    for side in sides.values():
        side["input_ids"][:, : TIME // 2] = sides["chosen"]["input_ids"][:, : TIME // 2]
        side["labels"][:, : TIME // 2] = -100
    return sides


def _work(name: str) -> tuple[int, float]:
    architecture, params, buffers = ft.split(decoder(SHAPE, seed=1))
    options: dict[str, Any] = {"max_grad_norm": 1.0, "donate": "pure" not in name}
    options["microbatches"] = 4 if "4 micro" in name else 1
    optimizer = ft.optim.adamw(1e-3)
    batch: dict[str, Any] = _sequences(0)
    if "dpo" in name:
        options["layout"] = "shared_prompt" if "shared" in name else "padded"
        options["reference"] = ft.trees.clone(params)
        batch = _pairs()
        step = ft.dpo_step(architecture, optimizer, **options)
    else:
        options["precision"] = "fp16" if "fp16" in name else "fp32"
        options["reduction"] = "canonical" if "canonical" in name else "fast"
        options["head"] = "full" if "whole" in name else "auto"
        step = ft.pretrain_step(architecture, optimizer, **options)
    state, _ = step(step.init(params, buffers), batch)  # what is found once is found
    with Work() as work:
        step(state, batch)
    return work.calls, work.bytes / TABLE


@pytest.mark.parametrize("name", sorted(BUDGETS))
def test_a_step_does_no_more_work_than_its_budget(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "BUDGET", 64 * VOCABULARY * 4)
    monkeypatch.setattr(accumulators, "TABLE", TABLE)
    calls, tables = _work(name)
    most_calls, most_tables = BUDGETS[name]
    assert calls <= most_calls, f"{calls} kernel calls, and the budget is {most_calls}"
    assert tables <= most_tables + 0.1, f"{tables:.2f} tables, and the budget is {most_tables}"
    # A budget that is far too large guards nothing.
    assert calls >= 0.95 * most_calls
    assert tables >= 0.95 * most_tables
