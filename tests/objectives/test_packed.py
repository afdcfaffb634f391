"""A packed batch is its documents one by one: the same loss, metrics and gradients.

Tolerances are those of tests/objectives/test_layouts.py, for the reasons given there.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from objectives import formulas
from objectives.test_layouts import (
    NARROWED,
    ROUNDING,
    Changed,
    _counting,
    _head,
    _huggingface,
    _split,
    _without,
)
from torch import Tensor, nn

import functrain as ft
from functrain import data, testing
from functrain.models.decoder import Decoder
from functrain.objectives import packed as packed_batches
from functrain.objectives.batches import count_padding, known_packed, split_batch, to_device
from functrain.objectives.layouts import padding_free
from functrain.objectives.logprobs import token_scores
from functrain.objectives.support import fault

TIME = 12
NAMES = ["tied", "untied", "checkpointing", "llama-sdpa", "llama-eager", "qwen3-sdpa"]


@st.composite
def documents(draw: st.DrawFn) -> data.Chats:
    """Documents with a target, of which some labels and perhaps the first one are none."""
    examples = []
    for _ in range(draw(st.integers(1, 8))):
        ids = draw(st.lists(st.integers(0, zoo.VOCABULARY - 1), min_size=2, max_size=TIME))
        ignored = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
        labels = [-100 if out else i for i, out in zip(ids, ignored, strict=True)]
        labels[-1] = ids[-1]
        examples.append((tuple(ids), tuple(labels)))
    return data.Chats(examples=tuple(examples), batch_size=len(examples), shuffle=False)


def _step(name: str, **options: Any) -> tuple[ft.Step, ft.TrainState]:
    architecture, params, buffers = _split(name, options.pop("dtype", torch.float64))
    step = ft.sft_step(architecture, ft.optim.adamw(1e-2), **options)
    return step, step.init(params, buffers)


_kept = functools.cache(_step)  # a state is a value: every example begins at the same one


def _all(source: Any) -> Any:
    (batch,) = data.all_batches(source, len(source))
    return batch


def _assert_same(name: str, source: data.Chats) -> None:
    tolerance = NARROWED if "-" in name else ROUNDING
    step, state = _kept(name)
    padded, ours = _all(source), _all(data.packed(source, time=TIME))
    step.objective.check(ours, zoo.VOCABULARY)
    one, other = (
        step.value_and_grad(state.params, state.buffers, batch) for batch in (padded, ours)
    )
    seen, expected = one.metrics.to_dict(), other.metrics.to_dict()
    assert seen.keys() == expected.keys()
    for key, value in expected.items():
        if key != "padding":
            assert seen[key] == pytest.approx(value, rel=tolerance, abs=tolerance), key
    size = max(float(grad.abs().max()) for grad in one.grads.values())
    for leaf, grad in one.grads.items():
        torch.testing.assert_close(other.grads[leaf], grad, rtol=0, atol=tolerance * size, msg=leaf)


@pytest.mark.parametrize("name", NAMES[:3])
@given(source=documents(), chunked=st.booleans())
def test_packing_changes_neither_loss_nor_gradient(
    name: str, source: data.Chats, chunked: bool
) -> None:
    with _head(chunked):
        _assert_same(name, source)


@pytest.mark.parametrize("name", NAMES[3:])
@settings(max_examples=10)
@given(source=documents(), chunked=st.booleans())
def test_so_it_is_with_models_of_transformers(name: str, source: data.Chats, chunked: bool) -> None:
    with _head(chunked):
        _assert_same(name, source)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=10)
@given(source=documents(), pick=st.integers(0, 7), shift=st.integers(1, zoo.VOCABULARY - 1))
def test_no_document_sees_another(name: str, source: data.Chats, pick: int, shift: int) -> None:
    """Other tokens in one document leave the log-probs of every other the same bits."""
    pick %= len(source)
    ours = data.packed(source, time=TIME)
    begin, length = int(ours.begins[pick]), int(ours.lengths[pick])
    ids = ours.ids.copy()
    ids[begin : begin + length] = (ids[begin : begin + length] + shift) % zoo.VOCABULARY
    other = data.Packed(
        ids=ids,
        labels=np.where(ours.labels < 0, ours.labels, ids),
        begins=ours.begins,
        lengths=ours.lengths,
        packs=ours.packs,
        packing=ours.packing,
        batch_size=1,
        shuffle=False,
    )
    logps = [_logps(name, _all(each)) for each in (ours.ordered(), other)]
    changed = torch.zeros_like(logps[0], dtype=torch.bool)
    (row,) = [n for n, documents in enumerate(ours.packs) if pick in documents]
    at = sum(int(ours.lengths[d]) for d in ours.packs[row][: ours.packs[row].index(pick)])
    changed[row, at : at + length - 1] = True
    assert torch.equal(logps[0][~changed], logps[1][~changed])


def _logps(name: str, batch: Any) -> Tensor:
    architecture, params, buffers = _split(name)
    with torch.no_grad(), ft.bound(architecture, params, buffers, "eval") as model:
        return token_scores(model, batch).logps


@pytest.mark.parametrize("name", NAMES)
def test_the_public_law_of_isolation_holds(name: str) -> None:
    step, state = _step(name)
    testing.assert_packing_isolated(step, state, _texts().at(0, 3))


def test_the_public_law_finds_documents_that_see_each_other() -> None:
    architecture, params, buffers = ft.split(Changed(_without("position_ids")))
    step = ft.pretrain_step(architecture, ft.optim.adamw(1e-2))
    state = step.init(params, buffers)
    with pytest.raises(AssertionError, match="another document sees the one that begins at"):
        testing.assert_packing_isolated(step, state, _texts().at(0, 3))
    with pytest.raises(AssertionError, match="not a packed batch"):
        testing.assert_packing_isolated(step, state, zoo.batch())


@given(source=documents(), parts=st.data())
def test_packed_rows_accumulate_and_evaluate_as_one(source: data.Chats, parts: Any) -> None:
    step, state = _kept("tied")
    batch = _all(data.packed(source, time=TIME))
    cut = parts.draw(testing.partitions(len(batch["input_ids"])))
    targets = [int((each["labels"][:, 1:] != -100).sum()) for each in testing._cut(batch, cut)]
    assert sum(targets)
    testing.assert_accumulation_invariant(step, state, batch, cut)
    testing.assert_evaluation_invariant(step, state, batch, cut)


class Letters:
    """Letters as ids below the zoo's vocabulary."""

    vocabulary, end = zoo.VOCABULARY, 30

    def encode(self, text: str) -> list[int]:
        return [ord(each) % 29 for each in text]

    def decode(self, ids: Any) -> str:
        return " ".join(map(str, ids))


def _texts() -> data.Packed:
    return data.packed_text(
        ["abcdefg"[: 5 * n % 7 + 1] for n in range(30)], Letters(), time=TIME, batch_size=4
    )


def test_a_packed_run_resumes_to_the_bit_from_every_step(tmp_path: Path) -> None:
    architecture, params, buffers = ft.split(zoo.decoder(dropout=0.1))
    step = ft.pretrain_step(architecture, ft.optim.adamw(1e-2), microbatches=2)
    testing.assert_resumable(step, step.init(params, buffers), _texts(), 7, tmp_path)


def test_rows_that_microbatches_do_not_divide_are_named() -> None:
    step, state = _step("tied", microbatches=3)
    with pytest.raises(
        ft.BatchError, match="microbatches=3 does not divide the batch's 4 examples"
    ):
        step(state, _texts().at(0, 4))


# What a batch must be.


def test_a_target_that_another_document_would_predict_is_named() -> None:
    batch = {**_texts().at(0, 4)}
    row, place = ((batch["position_ids"] == 0) & (batch["input_ids"] != 0)).nonzero()[-1].tolist()
    labels = batch["labels"].clone()
    labels[row, place] = 3
    step, state = _step("tied")
    if place == 0:
        pytest.fail("the example has no second document")
    with pytest.raises(
        ft.BatchError, match=rf"labels: 3 at \[{row}, {place}\], where position_ids"
    ):
        step(state, {**batch, "labels": labels})
    # Under a mask the positions say nothing of documents.
    step(state, {**batch, "labels": labels, "attention_mask": torch.ones_like(labels)})


# Support is found by trying.


def _refused(model: nn.Module, batch: Any, **options: Any) -> str:
    architecture, params, buffers = ft.split(model)
    step = ft.pretrain_step(architecture, ft.optim.adamw(1e-2), **options)
    state = step.init(params, buffers)
    with pytest.raises(ft.ArchitectureError) as first:
        step(state, batch)
    with pytest.raises(ft.ArchitectureError) as second:
        ft.evaluate(step, state, [batch])
    assert "does not keep such documents apart" in str(first.value)
    if len(batch["input_ids"]) > 1 and "microbatches" not in options:
        assert str(first.value) == str(second.value)
    return str(first.value)


@pytest.mark.parametrize("rows", [1, 4])
def test_a_model_whose_documents_see_each_other_is_refused(rows: int) -> None:
    batch = _texts().at(0, rows)
    message = _refused(Changed(_without("position_ids")), batch)
    assert "of the largest away from those of each sequence" in message
    assert message.endswith("; do without packing")
    _refused(zoo.model("tied"), batch)
    assert "cannot be told" in _refused(zoo.model("normed"), batch)


class Convolved(Decoder):
    """A decoder that a short convolution over the row is added to, across its documents."""

    def __init__(self, gate: float, kernel: float, share: float) -> None:
        config = ft.models.DecoderConfig(vocabulary=zoo.VOCABULARY, width=16, layers=1, hidden=24)
        with ft.keys.seeded(3):
            super().__init__(config)
            self.conv = nn.Conv1d(zoo.VOCABULARY, zoo.VOCABULARY, 2, groups=zoo.VOCABULARY)
        self.conv.weight.data.mul_(kernel)
        self.conv.bias.data.zero_()
        self.gate = nn.Parameter(torch.tensor(gate))
        self.share = share

    def forward(self, **inputs: Any) -> Any:  # type: ignore[override]
        logits = super().forward(**inputs)
        mixed = self.conv(F.pad(logits.transpose(1, 2), (1, 0))).transpose(1, 2)
        return logits + self.share * self.gate * mixed


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_params"])
@pytest.mark.parametrize(
    ("gate", "kernel", "share"),
    [(0.0, 1.0, 1.0), (1e-9, 1.0, 1.0), (1.0, 0.0, 1.0), (1.0, 1.0, 1e-4)],
    ids=["no gate", "a small gate", "no kernel", "a small share"],
)
def test_what_training_would_have_documents_see_is_seen_before(
    gate: float, kernel: float, share: float, precision: str, rows: int
) -> None:
    """Whatever the weights are now, in any precision, and however little it is."""
    message = _refused(
        Convolved(gate, kernel, share), _texts().at(0, rows), precision=precision, head="full"
    )
    if share < 1:
        assert "changed with the tokens of others by" in message


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_params"])
@pytest.mark.parametrize("name", ["falcon_h1", "lfm2", "recurrent_gemma"])
def test_mixtures_of_attention_and_states_are_refused_in_any_precision(
    name: str, precision: str
) -> None:
    """What their convolutions and states tell of another document is little in a fresh model."""
    transformers = pytest.importorskip("transformers")
    from models import families

    config = transformers.FalconH1Config(**STATEFUL) if name == "falcon_h1" else None
    config = families.CONFIGS[name]() if config is None else config
    with ft.keys.seeded(2):
        model = transformers.AutoModelForCausalLM.from_config(config)
    _refused(model, _texts().at(0, 4), precision=precision)


STATEFUL = {
    "vocab_size": zoo.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 4,
    **dict.fromkeys(["pad_token_id", "bos_token_id", "eos_token_id"], 0),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16_params"])
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gemma3", "qwen3_moe"])
def test_experts_and_windows_are_not_in_the_way(name: str, precision: str) -> None:
    """Experts are handed other numbers of tokens with other tokens, and may round otherwise."""
    transformers = pytest.importorskip("transformers")
    from models import families

    config = families.CONFIGS[name]()
    with ft.keys.seeded(2):
        model = transformers.AutoModelForCausalLM.from_config(config)
    if precision == "bf16_params":
        model = model.bfloat16()
    for make in (padding_free, packed_batches.two_rows):
        assert fault(model, make) is None


def test_a_model_that_knows_no_float32_is_tried_as_it_is() -> None:
    """As flash attention is; whatever may be left of float32 elsewhere is put back."""

    class Half(Changed):
        def forward(self, **inputs: Any) -> Any:
            if self.lm_head.weight.dtype != torch.bfloat16:
                raise RuntimeError("only half precision")
            return super().forward(**inputs)

    backends: Any = torch.backends
    places = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul)
    before = [place.fp32_precision for place in places]
    batch = _texts().at(0, 4)
    for change, separates in ((lambda inputs: inputs, True), (_without("position_ids"), False)):
        model = Half(change).bfloat16()
        found = fault(model, packed_batches.two_rows)
        assert (found is None) == separates
    assert "raised RuntimeError: only half" in _refused(Half(lambda inputs: inputs), batch)
    assert [place.fp32_precision for place in places] == before


def test_one_that_separates_the_documents_of_one_row_only_is_told_how() -> None:
    """As flash attention in transformers is: of several rows it takes the positions for granted."""

    def one_row(inputs: dict[str, Any]) -> dict[str, Any]:
        alone = len(inputs["input_ids"]) == 1
        return inputs if alone else _without("position_ids")(inputs)

    batch = _texts().at(0, 4)
    message = _refused(Changed(one_row), batch)
    assert "give each row a micro-batch of its own" in message
    architecture, params, buffers = ft.split(Changed(one_row))
    step = ft.pretrain_step(architecture, ft.optim.adamw(1e-2), microbatches=4)
    step(step.init(params, buffers), batch)


def test_positions_that_go_on_and_those_under_a_mask_are_as_before() -> None:
    """Whatever the model makes of them."""
    for name in ("tied", "normed"):
        architecture, params, buffers = zoo.split(name)
        step = ft.pretrain_step(architecture, ft.optim.adamw(1e-2))
        state = step.init(params, buffers)
        plain = zoo.batch()
        step(state, zoo.full(plain))
        ids = plain["input_ids"]
        step(state, {**plain, "position_ids": torch.arange(ids.shape[1]).expand_as(ids) + 3})


def test_an_architecture_is_tried_once_for_each_kind_of_attention_and_rows() -> None:
    architecture, params, buffers = ft.split(_huggingface("llama", "sdpa"))
    seen = _counting(architecture)
    step = ft.sft_step(architecture, ft.optim.adamw(1e-2), head="full")
    state, batch = step.init(params, buffers), _texts().at(0, 4)
    calls = []
    for attention, rows in (("sdpa", 4), ("sdpa", 4), ("eager", 4), ("sdpa", 1), ("sdpa", 3)):
        architecture.set_attn_implementation(attention)
        seen.clear()
        step(state, {key: value[:rows] for key, value in batch.items()})
        calls.append(len(seen))
    assert [each > 1 for each in calls] == [True, False, True, True, False]


def test_without_weights_nothing_is_decided() -> None:
    architecture, params, buffers = ft.split(zoo.decoder())
    batch = _texts().at(0, 4)
    with pytest.raises(ft.ArchitectureError, match="has no weights to try it with"):
        packed_batches.check_separated(architecture, batch)
    with ft.bound(architecture, params, buffers, "eval") as model:
        packed_batches.check_separated(model, batch)


META = torch.device("meta")
"""Where no value can be read, as none can be of an accelerator without a wait."""


@pytest.mark.parametrize("rows", [1, 2])
def test_of_a_batch_that_was_moved_no_value_is_read(rows: int) -> None:
    """Neither by a model that separates documents nor by one that does not; errors as ever."""
    packed, plain = _texts().at(0, 2), zoo.batch(examples=2)
    plain["position_ids"] = torch.arange(plain["input_ids"].shape[1]).expand(2, -1) + 3
    for model in (zoo.decoder(), zoo.model("tied")):
        for each in (packed, plain, plain):
            for part in split_batch(each, 2 // rows):
                moved = to_device(part, META)
                if each is plain or isinstance(model, ft.models.Decoder):
                    packed_batches.check_separated(model, moved)
                    continue
                with pytest.raises(ft.ArchitectureError, match="does not keep such documents"):
                    packed_batches.check_separated(model, moved)


def test_of_one_that_was_handed_over_elsewhere_none_where_the_model_separates() -> None:
    for each in (zoo.full(zoo.batch()), _texts().at(0, 4)):
        given = {key: value.to(META) for key, value in each.items() if key != "attention_mask"}
        packed_batches.check_separated(zoo.decoder(), given)


def test_what_is_known_of_positions_is_known_without_a_mask() -> None:
    packed = _texts().at(0, 4)
    moved = to_device({**packed, "attention_mask": torch.ones_like(packed["labels"])}, META)
    assert known_packed(moved) is False
    assert known_packed({"position_ids": moved["position_ids"]}) is None
    assert known_packed(to_device(packed, META)) is True
    to_device({"position_ids": torch.arange(3)}, META)


def test_rows_of_a_trial_by_example() -> None:
    ids = torch.arange(1, 25).view(4, 6)
    labels = ids.masked_fill(torch.arange(6) >= torch.tensor([[6], [4], [5], [5]]), -100)
    made = packed_batches.two_rows({"input_ids": ids, "labels": labels})
    assert made.inputs["position_ids"].tolist() == [
        [0, 1, 2, 3, 4, 0, 1, 2, 0, 0],
        [0, 1, 2, 3, 0, 1, 2, 3, 0, 0],
    ]
    assert made.inputs["input_ids"][1].tolist() == [13, 14, 15, 16, 19, 20, 21, 22, 0, 0]
    assert [int(n) for n in made.count_padding()] == [4, 20]
    assert made.index[3, :4].tolist() == [14, 15, 16, 17]


# What is padding.


def test_padding_is_counted_by_mask_by_position_or_by_target() -> None:
    ids, labels = torch.ones(2, 5, dtype=torch.int64), torch.tensor([[1, 1, -100, 1, -100]] * 2)
    plain = {"input_ids": ids, "labels": labels}
    masked = {**plain, "attention_mask": torch.tensor([[1, 1, 0, 0, 0], [0, 1, 1, 1, 1]])}
    placed = {**plain, "position_ids": torch.tensor([[0, 1, 0, 1, 0], [0, 1, 2, 3, 4]])}
    none = {**plain, "labels": torch.full_like(labels, -100)}
    found = [tuple(map(int, count_padding(each))) for each in (plain, masked, placed, none)]
    assert found == [(2, 10), (4, 10), (1, 10), (10, 10)]


def test_a_step_says_how_much_is_padding() -> None:
    """Over micro-batches, and whatever the objective; an evaluation does not say it."""
    step, state = _step("tied", microbatches=2)
    batch = _texts().at(0, 4)
    padding, made = count_padding(batch)
    _, metrics = step(state, batch)
    assert float(metrics["padding"]) == pytest.approx(int(padding) / made)
    assert "eval_padding" not in ft.evaluate(step, state, [batch])


@pytest.mark.parametrize(
    ("layout", "padding"), [("padded", 40 / 80), ("padding_free", 0.0), ("shared_prompt", 8 / 36)]
)
def test_so_it_is_for_pairs_as_they_are_laid_out(layout: Any, padding: float) -> None:
    """Prompts of 8 and 4 tokens with completions of 4 and 8, and of 4 and 4, as in
    `test_a_layout_is_less_work`: with prompts once, one of two rows of 18 is 10 tokens."""
    records = [
        {"prompt": "a" * 8, "chosen": "b" * 3, "rejected": "c" * 7},
        {"prompt": "a" * 4, "chosen": "b" * 3, "rejected": "c" * 3},
    ]
    source = data.preference(records, data.ByteTokenizer(), time=20, batch_size=2, shuffle=False)
    model = ft.models.decoder(ft.models.DecoderConfig(vocabulary=257, width=16, layers=1))
    architecture, params, buffers = ft.split(model)
    step = ft.dpo_step(
        architecture, ft.optim.adamw(), reference=ft.trees.clone(params), layout=layout
    )
    batch = source.at(0, 2)
    _, metrics = step(step.init(params, buffers), batch)
    if layout == "padded":
        real = sum(int(batch[side]["attention_mask"].sum()) for side in ("chosen", "rejected"))
        padding = 1 - real / (4 * batch["rejected"]["input_ids"].shape[1])
    assert float(metrics["padding"]) == pytest.approx(padding)


def test_and_for_completions_without_a_pair() -> None:
    architecture, params, buffers = ft.split(zoo.decoder())
    step = ft.kto_step(architecture, ft.optim.adamw(), reference=ft.trees.clone(params))
    batch = formulas.batch_of("kto")
    _, metrics = step(step.init(params, buffers), batch)
    counts = [count_padding(batch[side]) for side in ("completion", "mismatched")]
    expected = sum(int(n) for n, _ in counts) / sum(n for _, n in counts)
    assert float(metrics["padding"]) == pytest.approx(expected)
