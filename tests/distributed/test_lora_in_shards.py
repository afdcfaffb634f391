"""Adapters over a base of which each worker has some rows: the same bits as over a whole one."""

from __future__ import annotations

from typing import Any

import pytest
from workers import Group

LORA: dict[str, Any] = {
    "adapters": {"lora": {"rank": 2}},
    "dropout, an odd base": {"lora": {"rank": 3, "dropout": 0.2}, "odd": True},
    "dora, and norms beside": {
        "lora": {"rank": 2, "dora": True, "train": ("norm.weight",)},
        "layers": 1,
    },
    "recomputed blocks": {"lora": {"rank": 2}, "step": {"checkpoint": "model.layers.*"}},
    # One row, so that a worker has none.
    "recomputed inside": {"lora": {"rank": 1}, "step": {"checkpoint": "model.layers.*.mlp"}},
    "donated": {"lora": {"rank": 2}, "step": {"donate": True}},
    "logits by chunks": {"lora": {"rank": 1}, "layers": 1, "chunks": True},
    "dpo against the base": {"lora": {"rank": 2, "dora": True}, "stage": "dpo"},
    "a reference in shards": {"lora": {"rank": 2}, "stage": "dpo", "reference": "sharded"},
}
ON_TWO = {"adapters", "recomputed inside", "logits by chunks", "dpo against the base"}
ON_FOUR = {"dora, and norms beside"}


@pytest.mark.parametrize(
    ("name", "size"),
    [
        pytest.param(name, size, marks=() if name in ordinary else pytest.mark.long)
        for size, ordinary in ((2, ON_TWO), (4, ON_FOUR))
        for name in LORA
    ],
)
def test_the_bits_are_those_of_one_process(group: Group, name: str, size: int) -> None:
    options = {**LORA[name], "step": {"microbatches": 2 * size, **LORA[name].get("step", {})}}
    alone = group.alone(options)
    options |= {"base": "sharded", "step": {**options["step"], "sharded": True}}
    assert all(each == alone for each in group.values("steps", size, options))


def test_a_whole_base_stays_whole_under_adapters_in_shards(group: Group) -> None:
    options: dict[str, Any] = {"lora": {"rank": 2}, "step": {"microbatches": 4}}
    alone = group.alone(options)
    options["step"]["sharded"] = True
    assert group.values("steps", 2, options) == [alone, alone]


@pytest.mark.parametrize(
    ("size", "more"), [(2, {}), (4, {"dora": True, "train": ("norm.weight",)})]
)
def test_each_worker_has_its_rows_and_merges_to_the_same_model(
    group: Group, size: int, more: Any
) -> None:
    lora = {"lora": {"rank": 2, **more}, "step": {"microbatches": 4}}
    (alone,) = group.values("adapted", 1, lora)
    assert alone["bytes"] == alone["whole"]
    assert not alone["sharded"]
    sharded = {**lora, "base": "sharded", "step": {"microbatches": 4, "sharded": True}}
    for each in group.values("adapted", size, sharded):
        assert each["merged"] == alone["merged"]
        assert each["sharded"]
        assert each["bytes"] == pytest.approx(each["whole"] / size, rel=0.01)


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("replicated", "ConfigError", "is in shards, of which each worker has some rows; give the"),
        (
            "generated",
            "ArchitectureError",
            "is in shards, of which each worker has some rows; train",
        ),
        ("mixed", "StateError", "some are in shards and some are whole; give all in shards"),
    ],
)
def test_a_base_in_shards_that_is_misused_is_refused(
    group: Group, how: str, kind: str, message: str
) -> None:
    for each in group.run("misused", 2, {"how": how}):
        assert each["error"][0] == kind
        assert message in each["error"][1]


def test_what_is_trained_beside_adapters_over_a_whole_base_is_merged_whole(group: Group) -> None:
    lora = {"lora": {"rank": 2, "train": ("norm.weight",)}, "layers": 1}
    (alone,) = group.values("adapted", 1, lora)
    for each in group.values("adapted", 2, {**lora, "step": {"sharded": True}}):
        assert each["merged"] == alone["merged"]
        assert not each["sharded"]


def test_adapters_over_some_layers_only(group: Group) -> None:
    """Frozen blocks lie between those that train, and before them."""
    options: dict[str, Any] = {"lora": {"rank": 2, "targets": ("layers.2.*.q_proj",)}, "layers": 3}
    options["step"] = {"microbatches": 4}
    alone = group.alone(options)
    options |= {"base": "sharded", "step": {"microbatches": 4, "sharded": True}}
    assert group.values("steps", 2, options) == [alone, alone]
