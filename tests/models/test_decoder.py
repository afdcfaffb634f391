"""The built-in decoder: causal, blind to padding, and Llama to the bit of its arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import functrain as ft
from functrain import models, testing
from functrain.models.decoder import _within
from functrain.objectives import LanguageModeling

CONFIG = ft.models.DecoderConfig(
    vocabulary=23, width=16, layers=2, heads=4, kv_heads=2, hidden=24, tied=False
)


def _model(**changes: Any) -> ft.models.Decoder:
    return ft.models.decoder(attrs.evolve(CONFIG, **changes), seed=5).double().eval()


def _ids(seed: int, rows: int, time: int) -> torch.Tensor:
    return torch.randint(0, 23, (rows, time), generator=torch.Generator().manual_seed(seed))


@given(
    seed=st.integers(0, 99), time=st.integers(1, 9), left=st.integers(0, 4), right=st.integers(0, 4)
)
def test_padding_on_either_side_changes_no_logit(
    seed: int, time: int, left: int, right: int
) -> None:
    model, ids = _model(), _ids(seed, 2, time)
    padded = torch.nn.functional.pad(ids, (left, right), value=3)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (left, right))
    logits = model(padded, mask)
    assert bool(logits.isfinite().all())
    torch.testing.assert_close(logits[:, left : left + time], model(ids), rtol=1e-9, atol=1e-10)


@given(seed=st.integers(0, 99), time=st.integers(2, 9), data=st.data())
def test_a_later_token_changes_no_earlier_logit(seed: int, time: int, data: st.DataObject) -> None:
    model, ids = _model(), _ids(seed, 2, time)
    at = data.draw(st.integers(1, time - 1))
    changed = ids.clone()
    changed[:, at] = (changed[:, at] + 1) % 23
    masked = data.draw(st.booleans())
    mask = torch.ones_like(ids) if masked else None
    before, after = model(ids, mask), model(changed, mask)
    torch.testing.assert_close(before[:, :at], after[:, :at], rtol=1e-12, atol=1e-12)
    assert not torch.equal(before[:, at], after[:, at])


def test_grouped_queries_are_repeated_keys() -> None:
    grouped, full = _model(), _model(kv_heads=None)
    state = {}
    for name, value in grouped.state_dict().items():
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            value = value.view(2, 4, 16).repeat_interleave(2, 0).reshape(16, 16)
        state[name] = value
    full.load_state_dict(state)
    ids = _ids(0, 2, 9)
    torch.testing.assert_close(grouped(ids), full(ids), rtol=1e-12, atol=1e-12)


@given(
    vocabulary=st.integers(1, 9),
    layers=st.integers(1, 3),
    pairs=st.integers(1, 3),
    heads=st.sampled_from([(1, None), (4, 2), (3, 1), (6, 3), (2, None)]),
    hidden=st.none() | st.integers(1, 9),
    tied=st.booleans(),
)
def test_parameters_are_counted_from_the_config(
    vocabulary: int,
    layers: int,
    pairs: int,
    heads: tuple[int, int | None],
    hidden: int | None,
    tied: bool,
) -> None:
    config = ft.models.DecoderConfig(
        vocabulary=vocabulary,
        width=2 * pairs * heads[0],
        layers=layers,
        heads=heads[0],
        kv_heads=heads[1],
        hidden=hidden,
        tied=tied,
    )
    made = ft.models.decoder(config)
    assert config.parameters == sum(each.numel() for each in made.parameters())


@pytest.mark.parametrize("tied", [False, True])
def test_it_is_the_llama_of_transformers(tied: bool) -> None:
    transformers = pytest.importorskip("transformers")
    ours = _model(tied=tied).float()
    config = transformers.LlamaConfig(
        vocab_size=23,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=CONFIG.eps,
        tie_word_embeddings=tied,
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    architecture, params, buffers = ft.split(_model(tied=tied).float())
    # The names are theirs: what a checkpoint's model.safetensors holds loads as it is.
    missing = theirs.load_state_dict(dict(params), strict=False)
    assert missing.unexpected_keys == []
    assert missing.missing_keys == (["lm_head.weight"] if tied else [])
    ids = _ids(1, 2, 9)
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    for given_mask in (None, mask):
        expected = theirs(ids, attention_mask=given_mask).logits
        seen = ours(ids, given_mask)
        rows = slice(None) if given_mask is None else mask.bool()
        torch.testing.assert_close(seen[rows], expected[rows], rtol=1e-4, atol=1e-6)
    del architecture, buffers


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_changes_no_bit(dropout: float) -> None:
    reached = []
    for checkpointing in (False, True):
        config = attrs.evolve(CONFIG, checkpointing=checkpointing, dropout=dropout)
        architecture, params, buffers = ft.split(ft.models.decoder(config, seed=1))
        step = ft.pretrain_step(architecture, ft.optim.adamw(1e-2), microbatches=2)
        state = step.init(params, buffers)
        for seed in range(3):
            ids = _ids(seed, 4, 8)
            state, _ = step(state, {"input_ids": ids, "labels": ids})
        reached.append(ft.fingerprint(state))
    assert reached[0] == reached[1]


def test_weights_are_a_function_of_the_seed_and_no_generator_moves() -> None:
    before = torch.get_rng_state()
    torch.manual_seed(1)
    one = ft.split(ft.models.decoder(CONFIG, seed=3))[1]
    torch.manual_seed(2)
    other = ft.split(ft.models.decoder(CONFIG, seed=3))[1]
    moved = ft.split(ft.models.decoder(CONFIG, seed=4))[1]
    torch.set_rng_state(before)
    assert all(torch.equal(one[name], other[name]) for name in one)
    name = "model.layers.0.self_attn.o_proj.weight"
    assert not torch.equal(one[name], moved[name])
    assert float(one["model.embed_tokens.weight"].std()) == pytest.approx(0.02, rel=0.2)
    assert float(one[name].std()) == pytest.approx(0.01, rel=0.2)


def test_logits_are_the_head_of_the_hidden_states() -> None:
    model, ids = _model(), _ids(0, 1, 5)
    assert torch.equal(model(ids), model.lm_head(model.model(ids, None, None, None)))
    assert model.get_input_embeddings().num_embeddings == 23


BAD: list[tuple[dict[str, Any], str]] = [
    ({"width": 15}, "width: 15 over 4 heads"),
    ({"width": 12}, "heads of an even width"),
    ({"kv_heads": 3}, "kv_heads: 3 does not divide 4 heads"),
    ({"layers": 0}, "layers: 0"),
    ({"vocabulary": 2.5}, "vocabulary: 2.5"),
    ({"dropout": 1.0}, "dropout: 1.0"),
    ({"theta": 0.0}, "theta: 0.0"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_a_shape_that_cannot_be_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ft.ConfigError, match=message):
        attrs.evolve(CONFIG, **changes)


def test_positions_that_are_given_are_used() -> None:
    """Rotary attention sees distances: all shifted alike is the same, a gap is not.

    Under a mask; without one a gap would begin another sequence.
    """
    model, ids = _model(), _ids(0, 2, 6)
    places = torch.arange(6).expand(2, 6)
    plain = model(ids)
    torch.testing.assert_close(model(ids, position_ids=places), plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model(ids, position_ids=places + 9), plain, rtol=1e-9, atol=1e-10)
    gap = model(ids, torch.ones_like(ids), places + 9 * (places >= 3))
    torch.testing.assert_close(gap[:, :3], plain[:, :3], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(gap[:, 3:], plain[:, 3:], rtol=1e-3, atol=1e-5)
    apart = model(ids, position_ids=places + 9 * (places >= 3))
    torch.testing.assert_close(apart[:, 3:], model(ids[:, 3:]), rtol=1e-9, atol=1e-10)
    assert not torch.allclose(gap[:, 3:], apart[:, 3:], rtol=1e-3, atol=1e-5)


def _packed(lengths: Sequence[Sequence[int]]) -> torch.Tensor:
    """Positions of rows of sequences of these lengths."""
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])


@given(seed=st.integers(0, 99), data=st.data())
def test_sequences_packed_in_a_row_are_as_they_are_alone(seed: int, data: st.DataObject) -> None:
    """In every row of a batch, each with lengths of its own; their gradients too."""
    time, rows = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 3))
    lengths = [data.draw(testing.partitions(time)) for _ in range(rows)]
    model, ids = _model(), _ids(seed, rows, time)
    packed = model(ids, position_ids=_packed(lengths))
    alone = [
        torch.cat([model(part.unsqueeze(0))[0] for part in row.split(cut)])
        for row, cut in zip(ids, lengths, strict=True)
    ]
    torch.testing.assert_close(packed, torch.stack(alone), rtol=1e-9, atol=1e-10)
    weights = list(model.parameters())
    ours = torch.autograd.grad(packed.logsumexp(-1).sum(), weights)
    theirs = torch.autograd.grad(torch.stack(alone).logsumexp(-1).sum(), weights)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def test_sequences_are_told_apart_as_transformers_tells_them() -> None:
    masking = pytest.importorskip("transformers.masking_utils")
    positions = torch.tensor(
        [[0, 1, 2, 0, 1, 0], [5, 6, 7, 8, 9, 10], [0, 0, 0, 1, 3, 4], [4, 3, 0, 1, 2, 3]]
    )
    sequence = masking.find_packed_sequence_indices(positions)
    same = sequence.unsqueeze(2) == sequence.unsqueeze(1)
    seen = _within(positions)
    assert seen is not None
    assert torch.equal(seen.squeeze(1), same.tril())


def test_where_nothing_is_packed_the_causal_kernel_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    original = F.scaled_dot_product_attention

    def spying(*inputs: Any, **options: Any) -> Any:
        seen.append(options["is_causal"])
        return original(*inputs, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spying)
    model, ids = _model(layers=1), _ids(0, 2, 6)
    plain = _packed([[6], [6]])
    for positions in (None, plain, plain + 3, plain[:1], _packed([[6], [2, 4]])):
        model(ids, position_ids=positions)
    assert seen == [True, True, True, True, False]


def test_positions_beside_a_cache_are_positions_alone() -> None:
    """What was cached is of the same sequence, as in transformers."""
    model, ids = _model(), _ids(0, 2, 7)
    places = torch.tensor([0, 1, 2, 3, 4, 9, 10]).expand(2, 7)
    cache: list[Any] = []
    cut = (slice(0, 4), slice(4, 7))
    parts = [model(ids[:, at], None, places[:, at], cache) for at in cut]
    whole = model(ids, torch.ones_like(ids), places)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-10)


def test_a_mask_of_queries_and_keys_is_taken_as_it_is() -> None:
    """A prompt and two completions of it in one row; that of a mask by token is the same."""
    model, ids = _model(), _ids(0, 2, 9)
    allowed = torch.ones(9, 9, dtype=torch.bool).tril()
    allowed[6:, 3:6] = False
    positions = torch.tensor([0, 1, 2, 3, 4, 5, 3, 4, 5]).expand(2, 9)
    seen = model(ids, allowed.expand(2, 1, 9, 9), positions)
    torch.testing.assert_close(seen[:, :6], model(ids[:, :6]), rtol=1e-9, atol=1e-10)
    other = model(torch.cat([ids[:, :3], ids[:, 6:]], 1))
    torch.testing.assert_close(seen[:, 6:], other[:, 3:], rtol=1e-9, atol=1e-10)
    causal = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    torch.testing.assert_close(model(ids, causal), model(ids), rtol=1e-9, atol=1e-10)


def test_a_token_that_is_masked_in_the_middle_is_as_if_it_were_not_there() -> None:
    model, ids = _model(), _ids(0, 2, 7)
    mask = torch.ones_like(ids)
    mask[:, 3] = 0
    kept = mask[0].bool()
    torch.testing.assert_close(
        model(ids, mask)[:, kept], model(ids[:, kept]), rtol=1e-9, atol=1e-10
    )


def test_under_bf16_params_far_positions_are_told_apart() -> None:
    """In bfloat16 4,097 to 4,101 would be 4,096 or 4,112; large queries make the distance felt."""
    architecture, params, buffers = ft.split(models.decoder(CONFIG, seed=5))
    loud = {n: p * 30 if "q_proj" in n or "k_proj" in n else p for n, p in params.items()}
    gradient = ft.value_and_grad(LanguageModeling(), architecture, precision="bf16_params")
    ids, near = _ids(0, 4, 6), torch.arange(6).expand(4, 6)
    values = gradient.values(ft.trees.tensors(loud))
    with torch.no_grad(), ft.bound(architecture, values, buffers, "eval") as model:
        one, other = model(ids, position_ids=near), model(ids, position_ids=near + 4096)
        flat = model(ids, position_ids=near * 0)
    apart, felt = (one - other).abs().max(), (one - flat).abs().max()
    assert float(apart) < 0.3 * float(felt)


def test_dropout_is_on_the_embedding_and_on_both_branches_of_every_block() -> None:
    model = _model(dropout=0.5).train()
    model.requires_grad_(False)
    calls: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    model(_ids(0, 1, 5))
    blocks = [f"model.layers.{i}.dropout" for i in (0, 0, 1, 1)]
    assert calls == ["model.dropout", *blocks]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_checkpointing_runs_every_block_again_in_the_backward(checkpointing: bool) -> None:
    model = _model(checkpointing=checkpointing)
    runs: list[int] = []
    for block in model.model.layers:
        block.register_forward_pre_hook(lambda *_: runs.append(1))
    model(_ids(0, 2, 5)).sum().backward()
    assert len(runs) == (4 if checkpointing else 2)
    with torch.no_grad():
        model(_ids(0, 2, 5))
    assert len(runs) == (6 if checkpointing else 4)


def test_several_new_positions_after_cached_ones_are_causal() -> None:
    model, ids = _model(), _ids(0, 2, 9)
    cache: list[Any] = []
    parts = [model(ids[:, begin:end], cache=cache) for begin, end in ((0, 3), (3, 7), (7, 9))]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids), rtol=1e-9, atol=1e-10)
