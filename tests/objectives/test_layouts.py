"""Pairs without their padding, and with their prompts once, are what they are padded.

In float64 all sums are the same but for their order, and masked attention is another kernel than
causal attention: about 1e-14 of each other. `ROUNDING` leaves room for deep sums, and is far below
what a single token seen too many or too few makes of them. Llamas of transformers take norms and
the softmax of eager attention in float32 whatever their weights are, so `NARROWED` is what they
can be held to.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import pytest
import torch
import zoo
from halves import half
from hypothesis import given, settings
from hypothesis import strategies as st
from objectives import formulas
from objectives.formulas import PAIRED
from torch import Tensor, nn

import functrain as ft
from functrain import testing
from functrain.models.decoder import Decoder
from functrain.objectives import chunks, layouts, logprobs
from functrain.objectives.logprobs import token_scores
from functrain.objectives.pairs import concatenated

ROUNDING, NARROWED = 1e-9, 1e-5
LAYOUTS = ["padding_free", "shared_prompt"]
EVERY_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)
SMALL = {
    "vocab_size": zoo.VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "qwen3": GROUPED,
    "mistral": {**GROUPED, "sliding_window": 5},
    "gpt2": {
        "vocab_size": zoo.VOCABULARY,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
    },
}
DECODERS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tied": False, "kv_heads": None},
    "checkpointing": {"tied": False, "checkpointing": True},
}


def _huggingface(name: str, attention: str, **changes: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.CONFIG_MAPPING[name](**{**CONFIGS[name], **changes})
    with ft.keys.seeded(2):
        return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def _model(name: str) -> nn.Module:
    """A decoder by its options, or a model of transformers with its attention: `llama-sdpa`."""
    return zoo.decoder(**DECODERS[name]) if name in DECODERS else _huggingface(*name.split("-"))


@functools.cache
def _split(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """Weights large enough for attention to matter."""
    architecture, params, buffers = ft.split(_model(name).to(dtype))
    return architecture, formulas.elsewhere(params, 1, 0.2), buffers


def _step(case: str, name: str, layout: str, **options: Any) -> tuple[ft.Step, ft.TrainState]:
    dtype = options.pop("dtype", torch.float64)
    architecture, params, buffers = _split(name, dtype)
    reference = formulas.elsewhere(params, 2, 0.2)
    step = formulas.step_of(case, architecture, reference, layout=layout, **options)
    return step, step.init(params, buffers)


_kept = functools.cache(_step)  # a state is a value: every example begins at the same one


# Pairs of many forms.

Row = tuple[list[int], int]
"""Tokens, and how many of them are the prompt."""


@st.composite
def sequences(draw: st.DrawFn) -> tuple[Row, Row]:
    """A pair with a prompt in common, or none; completions may begin with the same tokens, and one
    may be the beginning of the other."""
    tokens = st.integers(0, zoo.VOCABULARY - 1)
    prompt = draw(st.lists(tokens, max_size=5))
    same = draw(st.lists(tokens, max_size=2))
    least = max(0, 2 - len(prompt) - len(same))  # nothing predicts the first token
    least = max(least, 0 if same else 1)
    chosen, rejected = (
        [*same, *draw(st.lists(tokens, min_size=least, max_size=5))] for _ in range(2)
    )
    if not prompt and not same:
        rejected[0] = (chosen[0] + 1) % zoo.VOCABULARY
    if chosen == rejected:
        rejected[-1] = (chosen[-1] + 1) % zoo.VOCABULARY
    return (prompt + chosen, len(prompt)), (prompt + rejected, len(prompt))


def _side(rows: list[Row], extra: int, left: bool, masked: bool, placed: bool) -> Any:
    width = max(len(tokens) for tokens, _ in rows) + extra
    shape = len(rows), width
    ids, labels = torch.full(shape, 7), torch.full(shape, -100)
    mask = torch.zeros(shape, dtype=torch.int64)
    for row, (tokens, prompt) in enumerate(rows):
        begin = width - len(tokens) if left else 0
        ids[row, begin : begin + len(tokens)] = torch.tensor(tokens)
        mask[row, begin : begin + len(tokens)] = 1
        first = max(prompt, 1)
        labels[row, begin + first : begin + len(tokens)] = torch.tensor(tokens[first:])
    side = {"input_ids": ids, "labels": labels}
    positions = (mask.cumsum(1) - 1).clamp(min=0) if masked else torch.arange(width).expand(shape)
    side |= {"attention_mask": mask} if masked else {}
    return side | ({"position_ids": positions + 2} if placed else {})


EITHER = st.booleans()


@st.composite
def pairs(
    draw: st.DrawFn,
    lefts: st.SearchStrategy[bool] = EITHER,
    placings: st.SearchStrategy[bool] = EITHER,
) -> Any:
    """Batches padded on either side or not, with and without masks and positions."""
    rows = draw(st.lists(sequences(), min_size=1, max_size=3))
    left, masked, placed = draw(lefts), draw(EITHER), draw(placings)
    extra = st.integers(0, 3)
    return {
        side: _side([row[at] for row in rows], draw(extra), left, masked, placed)
        for at, side in enumerate(("chosen", "rejected"))
    }


@contextmanager
def _head(chunked: bool) -> Generator[None]:
    """Within it, with `chunked`, 16 rows of logits at a time."""
    with pytest.MonkeyPatch.context() as patch:
        if chunked:
            patch.setattr(chunks, "BUDGET", 64)
        yield


# The same log-probs, losses, metrics and gradients.


def _scores(name: str, layout: Any, batch: Any) -> Any:
    architecture, params, buffers = _split(name)
    joined = concatenated(batch["chosen"], batch["rejected"])
    with torch.no_grad(), ft.bound(architecture, params, buffers, "eval") as model:
        return token_scores(model, joined, layout=layouts.laid_out(layout, model, joined))


def _assert_same(name: str, case: str, batch: Any, made: Sequence[str] = LAYOUTS) -> None:
    """In each of these layouts it is what it is padded."""
    tolerance = ROUNDING if name in DECODERS or name.startswith("gpt2") else NARROWED
    padded, whole = _scores(name, "padded", batch), _gradient(name, "padded", case, batch)
    size = max(float(grad.abs().max()) for grad in whole.grads.values())
    for layout in made:
        ours, cut = _scores(name, layout, batch), _gradient(name, layout, case, batch)
        for field in attrs.fields(type(ours)):
            one, other = (getattr(each, field.name) for each in (ours, padded))
            what = f"{layout}: {field.name}"
            if field.name not in ("logps", "mask"):  # the others are of targets alone
                one, other = one[ours.mask], other[ours.mask]
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, msg=what)
        _assert_equal(cut.metrics.to_dict(), whole.metrics.to_dict(), tolerance)
        for leaf, grad in whole.grads.items():
            torch.testing.assert_close(
                cut.grads[leaf], grad, rtol=0, atol=tolerance * size, msg=f"{layout}: {leaf}"
            )


def _gradient(name: str, layout: str, case: str, batch: Any) -> Any:
    step, state = _kept(case, name, layout)
    step.objective.check(batch, zoo.VOCABULARY)
    return step.value_and_grad(state.params, state.buffers, batch)


def _assert_equal(
    one: dict[str, float], other: dict[str, float], tolerance: float = ROUNDING
) -> None:
    assert one.keys() == other.keys()
    for name, value in other.items():
        if name == "padding":  # what a layout is to change
            continue
        assert one[name] == pytest.approx(value, rel=tolerance, abs=tolerance), name


@pytest.mark.parametrize("name", list(DECODERS))
@given(batch=pairs(), case=st.sampled_from(PAIRED), chunked=st.booleans())
def test_whatever_the_pairs_a_layout_changes_nothing(
    name: str, batch: Any, case: str, chunked: bool
) -> None:
    with _head(chunked):
        _assert_same(name, case, batch)


@half("case, chunked", PAIRED, [False, True])
def test_every_loss_is_the_same(case: str, chunked: bool) -> None:
    """Modifiers, likelihoods and mixes too."""
    with _head(chunked):
        _assert_same("tied", case, formulas.batch_of(case))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
@settings(max_examples=6)
@given(data=st.data(), case=st.sampled_from(PAIRED), chunked=st.booleans())
def test_so_it_is_with_models_of_transformers(
    name: str, attention: str, data: st.DataObject, case: str, chunked: bool
) -> None:
    """Under padding on the left they count no positions of their own, so these are given; and in
    float64 eager attention makes NaN of what is padded there."""
    lefts = EITHER if attention == "sdpa" else st.just(False)
    batch = data.draw(pairs(lefts, placings=st.just(True)))
    with _head(chunked):
        _assert_same(f"{name}-{attention}", case, batch)


# Micro-batches, references ahead, evaluations: what is made of the scores is as it was.


@pytest.mark.parametrize("case", [case for case in PAIRED if formulas.coupled(case)])
def test_a_coupled_loss_over_micro_batches_is_the_same(case: str) -> None:
    """Of gradients as they are: Adam would make large ones of rounding."""
    reached = []
    for layout in ("padded", *LAYOUTS):
        step, state = _step(case, "tied", layout, optimizer=ft.optim.sgd(0.1))
        for seed, cut in enumerate(([2, 2], [1, 3], [4])):
            parts = list(testing._cut(formulas.batch_of(case, seed), cut))
            state, metrics = step(state, parts)
        reached.append((state, metrics.to_dict()))
    (padded, expected), *others = reached
    for ours, seen in others:
        _assert_equal(seen, expected)
        for name, param in padded.params.items():
            torch.testing.assert_close(ours.params[name], param, rtol=ROUNDING, atol=ROUNDING)


@EVERY_LAYOUT
@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_reference_ahead_is_the_one_online(layout: Any, by_token: bool, chunked: bool) -> None:
    """To the bit in the same layout, to rounding in another."""
    step, state = _step("sigmoid", "untied", layout)
    architecture, _, buffers = _split("untied")
    batch = formulas.batch_of("sigmoid")
    reference = step.objective.kept()
    assert reference is not None
    attach = functools.partial(
        ft.attach_reference, architecture, reference, buffers, by_token=by_token
    )
    with _head(chunked):
        online, one = step(state, batch)
        ahead, other = step(state, attach(layout=layout)(batch))
        padded = ft.evaluate(step, state, [attach()(batch)]).to_dict()
        _assert_equal(ft.evaluate(step, state, [batch]).to_dict(), padded)
    testing.assert_same(online, ahead, "online and ahead")
    assert one.to_dict() == other.to_dict()


@EVERY_LAYOUT
@pytest.mark.parametrize("case", ["sigmoid", "ld", "rpo", "orpo", "bco_pair"])
def test_a_step_is_pure_and_donated_it_is_the_same(case: str, layout: str) -> None:
    step, state = _step(case, "tied", layout, dtype=torch.float32)
    several = attrs.evolve(step, microbatches=2)
    testing.assert_pure(several, state, formulas.batch_of(case))
    testing.assert_donation_equal(several, state, formulas.batch_of(case))


@EVERY_LAYOUT
def test_laws_of_accumulation_and_evaluation_hold(layout: str) -> None:
    step, state = _step("everything", "tied", layout)
    batch = formulas.batch_of("everything")
    for parts in ([2, 2], [1, 3], [1, 1, 1, 1]):
        testing.assert_evaluation_invariant(step, state, batch, parts)


@EVERY_LAYOUT
def test_where_the_policy_is_the_reference_the_margin_is_exactly_zero(layout: str) -> None:
    architecture, params, buffers = _split("tied", torch.float32)
    step = formulas.step_of("sigmoid", architecture, ft.trees.clone(params), layout=layout)
    _, metrics = step(step.init(params, buffers), formulas.batch_of("sigmoid"))
    assert float(metrics["rewards/margins"]) == 0.0
    assert float(metrics["loss"]) == float(torch.tensor(2.0).log())


@EVERY_LAYOUT
def test_dropout_is_allowed_and_derived(layout: str) -> None:
    architecture, params, buffers = ft.split(zoo.decoder(dropout=0.3))
    make = functools.partial(formulas.step_of, "sigmoid", architecture, params, dropout=True)
    batch = formulas.batch_of("sigmoid")
    step = make(layout=layout)
    losses = [float(step(step.init(params, buffers), batch)[1]["loss"]) for _ in range(2)]
    assert losses[0] == losses[1]
    assert losses[0] != float(torch.tensor(2.0).log())


@EVERY_LAYOUT
@pytest.mark.parametrize("precision", ["bf16", "bf16_params"])
@pytest.mark.parametrize("name", ["tied", "llama-sdpa", "llama-eager", "gpt2-eager"])
def test_half_precision_is_supported(name: str, precision: str, layout: str) -> None:
    found = []
    for each in ("padded", layout):
        step, state = _step("sigmoid", name, each, dtype=torch.float32, precision=precision)
        found.append(ft.evaluate(step, state, [formulas.batch_of("sigmoid")]).to_dict())
    assert found[0]["eval_logps/chosen"] == pytest.approx(found[1]["eval_logps/chosen"], rel=0.02)


# What is computed.


def _counting(module: nn.Module) -> list[int]:
    """How many tokens each call of the module has."""
    seen: list[int] = []
    module.register_forward_pre_hook(
        lambda _module, _given, inputs: seen.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(("layout", "tokens"), [*zip(LAYOUTS, [40, 36], strict=True)])
def test_a_layout_is_less_work(layout: str, tokens: int, chunked: bool) -> None:
    """Two pairs with prompts of 8 and 4 tokens and completions of 4 and 8, and of 4 and 4.

    Padded to 20 these are 80 tokens. Without padding and the last of each 11 + 15 + 7 + 7; with
    prompts once two rows as long as the longer, 8 + 3 + 7.
    """
    long, short = list(range(8)), list(range(4))
    rows = [
        ((long + [9] * 4, 8), (long + [10] * 8, 8)),
        ((short + [9] * 4, 4), (short + [10] * 4, 4)),
    ]
    batch = {
        side: _side([row[at] for row in rows], extra, False, True, False)
        for at, side, extra in ((0, "chosen", 0), (1, "rejected", 4))
    }
    architecture, params, buffers = ft.split(zoo.decoder())
    seen = _counting(architecture)
    counts = {}
    for each in ("padded", layout):
        step = formulas.step_of("sigmoid", architecture, params, layout=each)
        step(step.init(params, buffers), batch)  # which tries what is to be tried
        seen.clear()
        with _head(chunked):
            step(step.init(params, buffers), batch)
        counts[each] = [*seen]
    assert counts["padded"] == [80, 80], "one forward of the policy, one of the reference"
    assert counts[layout] == [tokens, tokens]


@EVERY_LAYOUT
def test_so_it_is_in_both_passes_of_a_coupled_loss(layout: str) -> None:
    """Of policy and reference, for each of two micro-batches."""
    architecture, params, buffers = ft.split(zoo.decoder())
    batch = formulas.batch_of("aot")
    step = formulas.step_of("aot", architecture, params, layout=layout, microbatches=2)
    step(step.init(params, buffers), batch)
    seen = _counting(architecture)
    step(step.init(params, buffers), batch)
    assert len(seen) == 8
    assert seen[::2] == seen[1::2]
    assert sorted(seen[:4]) == sorted(seen[4:])
    assert max(seen) < 4 * 10


def test_logits_are_made_of_rows_that_have_a_target() -> None:
    """By chunks, as many as there are targets; whole, as many as tokens."""
    architecture, params, buffers = _split("untied")
    batch = formulas.batch_of("sigmoid")
    joined = concatenated(batch["chosen"], batch["rejected"])
    targets = int((joined["labels"][:, 1:] != -100).sum())
    with torch.no_grad(), ft.bound(architecture, params, buffers, "eval") as model:
        made = layouts.laid_out("padding_free", model, joined)
        rows: list[int] = []
        projection = model.get_output_embeddings()
        handle = projection.register_forward_pre_hook(
            lambda _module, given: rows.append(given[0].shape[:-1].numel())
        )
        token_scores(model, joined, layout=made, head="full")
        handle.remove()
        with _head(True), pytest.MonkeyPatch.context() as patch:
            original = logprobs.scored
            patch.setattr(
                logprobs,
                "scored",
                lambda hidden, *given, **options: (
                    rows.append(len(hidden)) or original(hidden, *given, **options)
                ),
            )
            token_scores(model, joined, layout=made)
    assert made is not None
    assert rows == [made.inputs["input_ids"].numel(), targets]


def test_a_row_without_padding_by_example() -> None:
    made = layouts.padding_free(_example())
    assert made.inputs["input_ids"].tolist() == [[1, 2, 3, 4, 1, 2, 5]]
    assert made.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert "attention_mask" not in made.inputs
    assert made.index[0, :4].tolist() == [0, 1, 2, 3]
    assert made.index[1, 1:4].tolist() == [4, 5, 6]


def test_a_row_with_the_prompt_once_by_example() -> None:
    made = layouts._shared_prompt(_example())
    assert made.inputs["input_ids"].tolist() == [[1, 2, 3, 4, 5]]
    assert made.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 2]]
    assert made.index[0, :4].tolist() == [0, 1, 2, 3]
    assert made.index[1, 1:4].tolist() == [0, 1, 4]
    assert made.inputs["attention_mask"].int().tolist() == [
        [[[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1]]]
    ]


def test_only_what_is_the_same_at_the_same_position_is_shared() -> None:
    """And no more than either has: here the rejected's only target is the chosen's third token."""
    shifted = {**_example(), "position_ids": torch.tensor([[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]])}
    made = layouts._shared_prompt(shifted)
    assert made.inputs["input_ids"].tolist() == [[1, 2, 3, 4, 1, 2, 5]]
    assert made.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 1, 2, 3]]
    beginning = {
        "input_ids": torch.tensor([[1, 2, 3, 4, 6], [1, 2, 3, 4, 6]]),
        "labels": torch.tensor([[-100, -100, 3, 4, 6], [-100, -100, 3, -100, -100]]),
        "position_ids": torch.arange(5).expand(2, 5),
    }
    made = layouts._shared_prompt(beginning)
    assert made.inputs["input_ids"].tolist() == [[1, 2, 3, 4]]
    assert made.index[1, :2].tolist() == [0, 1]


def _example() -> dict[str, Tensor]:
    """1 2 | 3 4 6 is preferred to 1 2 | 5 8, which has padding before it."""
    return {
        "input_ids": torch.tensor([[1, 2, 3, 4, 6], [0, 1, 2, 5, 8]]),
        "labels": torch.tensor([[-100, -100, 3, 4, 6], [-100, -100, -100, 5, 8]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]]),
    }


# Support is found by trying.


class Changed(Decoder):
    """The decoder, with something made of its inputs first."""

    def __init__(self, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        config = ft.models.DecoderConfig(vocabulary=zoo.VOCABULARY, width=16, layers=1, hidden=24)
        with ft.keys.seeded(3):
            super().__init__(config)
        self.change = change

    def forward(self, **inputs: Any) -> Any:  # type: ignore[override]
        return super().forward(**self.change(inputs))


def _without(*keys: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda inputs: {key: value for key, value in inputs.items() if key not in keys}


def _refused(model: nn.Module, layout: Any, **options: Any) -> str:
    """What a model is refused with, by step and evaluation alike."""
    architecture, params, buffers = ft.split(model)
    step = formulas.step_of("sigmoid", architecture, params, layout=layout, **options)
    state, batch = step.init(params, buffers), formulas.batch_of("sigmoid")
    with pytest.raises(ft.ArchitectureError, match=f"does not support {layout!r}") as first:
        step(state, batch)
    with pytest.raises(ft.ArchitectureError) as second:
        ft.evaluate(step, state, [batch])
    assert str(first.value) == str(second.value)
    assert "use layout='padded'" in str(first.value)
    return str(first.value)


@EVERY_LAYOUT
def test_a_model_that_ignores_positions_or_masks_is_refused(layout: str) -> None:
    for keys in (("position_ids",), ("position_ids", "attention_mask")):
        assert "of the largest away from those of each sequence" in _refused(
            Changed(_without(*keys)), layout
        )


def test_a_model_that_takes_no_mask_of_queries_and_keys_is_refused() -> None:
    assert "away from those" in _refused(Changed(_without("attention_mask")), "shared_prompt")
    assert "its forward raised RuntimeError" in _refused(zoo.model("tied"), "shared_prompt")


def test_one_that_separates_by_mask_but_counts_through_is_refused() -> None:
    """Distances to the prompt are what the places in the row say."""

    def counted(inputs: dict[str, Any]) -> dict[str, Any]:
        places = torch.arange(inputs["input_ids"].shape[1]).unsqueeze(0)
        return {**inputs, "position_ids": places}

    assert "away from those" in _refused(Changed(counted), "shared_prompt")


@EVERY_LAYOUT
def test_zeros_hide_no_fault(layout: str) -> None:
    """A layer that hands nothing on yet would make every layout look right; and half precision
    the little that a fresh model hands on."""

    def quiet(model: nn.Module) -> nn.Module:
        for name, param in model.named_parameters():
            if name.endswith(("o_proj.weight", "embed_tokens.weight")):
                param.data.zero_()
        return model

    half = {"precision": "bf16_params"}
    _refused(quiet(Changed(_without("position_ids", "attention_mask"))), layout, **half)
    architecture, params, buffers = ft.split(quiet(zoo.decoder()))
    step = formulas.step_of("sigmoid", architecture, params, layout=layout, **half)
    step(step.init(params, buffers), formulas.batch_of("sigmoid"))


@EVERY_LAYOUT
def test_where_no_token_sees_another_it_cannot_be_told(layout: str) -> None:
    assert "cannot be told" in _refused(zoo.model("normed"), layout)


def test_a_window_of_attention_is_not_done_away_with() -> None:
    """The mask of a layout would be used as it is, in the place of one with the window."""
    batch = formulas.batch_of("sigmoid")
    with pytest.raises(ft.ArchitectureError, match=r"window of 5 \(sliding_window\)"):
        _scores("mistral-sdpa", "shared_prompt", batch)
    _assert_same("mistral-sdpa", "sigmoid", batch, ["padding_free"])
    assert not torch.allclose(
        _scores("mistral-sdpa", "padded", batch).logps,
        _scores("llama-sdpa", "padded", batch).logps,
    )


@EVERY_LAYOUT
def test_an_architecture_is_tried_once_for_each_kind_of_attention(layout: str) -> None:
    architecture, params, buffers = ft.split(_huggingface("llama", "sdpa"))
    seen = _counting(architecture)
    step = formulas.step_of("sigmoid", architecture, params, layout=layout, head="full")
    state, batch = step.init(params, buffers), formulas.batch_of("sigmoid")
    calls = []
    for attention in ("sdpa", "sdpa", "eager", "sdpa"):
        architecture.set_attn_implementation(attention)
        seen.clear()
        step(state, batch)
        calls.append(len(seen))
    assert calls[1] == calls[3] == 2
    assert calls[0] > 2
    assert calls[2] > 2


@EVERY_LAYOUT
def test_the_trial_moves_neither_buffers_nor_generators_nor_modes(layout: Any) -> None:
    modes: list[tuple[bool, bool]] = []

    class Drawing(Changed):
        def forward(self, **inputs: Any) -> Any:  # type: ignore[override]
            modes.append((self.training, torch.is_grad_enabled()))
            self.calls += 1
            torch.rand(())
            return super().forward(**inputs)

    model = Drawing(lambda inputs: inputs).train()
    model.register_buffer("calls", torch.zeros(()))
    model.model.norm.eval()
    before = {name: ft.trees.digest(t) for name, t in model.state_dict().items()}
    state = torch.get_rng_state()
    joined = concatenated(*formulas.batch_of("sigmoid").values())
    assert layouts.laid_out(layout, model, joined) is not None
    assert set(modes) == {(False, False)}
    assert model.training
    assert not model.model.norm.training
    assert {name: ft.trees.digest(t) for name, t in model.state_dict().items()} == before
    assert torch.equal(torch.get_rng_state(), state)


@EVERY_LAYOUT
def test_without_weights_nothing_is_decided(layout: Any) -> None:
    architecture, params, buffers = ft.split(zoo.decoder())
    joined = concatenated(*formulas.batch_of("sigmoid").values())
    with pytest.raises(ft.ArchitectureError, match="no weights to try it with"):
        layouts.laid_out(layout, architecture, joined)
    with ft.bound(architecture, params, buffers, "eval") as model:
        assert layouts.laid_out(layout, model, joined) is not None


# What makes no sense is refused, in words.


def test_an_unknown_layout_is_named() -> None:
    with pytest.raises(ft.ConfigError, match="layout: 'packed', expected 'padded', 'padding_free'"):
        _step("sigmoid", "tied", "packed")
    with pytest.raises(ft.ConfigError, match="layout: 'packed', expected"):
        ft.attach_reference(*_split("tied"), layout="packed")  # type: ignore[arg-type]


def test_completions_without_a_pair_have_no_layout() -> None:
    attach = ft.attach_reference(*_split("tied"), layout="shared_prompt")
    with pytest.raises(ft.BatchError, match="layout='shared_prompt' is for pairs"):
        attach(formulas.batch_of("kto"))


@EVERY_LAYOUT
def test_what_a_layout_has_no_place_for_is_named(layout: str) -> None:
    rows = [([1, 2, 3, 4], 1), ([1, 2, 5, 6], 1)]
    good = {
        side: _side([row], 0, False, True, True)
        for side, row in zip(("chosen", "rejected"), rows, strict=True)
    }
    step, state = _step("sigmoid", "tied", layout)
    step(state, good)

    def changed(key: str, at: int, value: int) -> Any:
        side = {**good["rejected"], key: good["rejected"][key].clone()}
        side[key][0, at] = value
        return {**good, "rejected": side}

    with pytest.raises(ft.BatchError, match=r"rejected\.labels: a target at \[0, 2\], after"):
        step(state, changed("attention_mask", 1, 0))
    with pytest.raises(ft.BatchError, match=r"rejected\.position_ids: 9 at \[0, 2\]; layout="):
        step(state, changed("position_ids", 2, 9))
    shifted = {**good["rejected"], "position_ids": good["rejected"]["position_ids"] + 1}
    with pytest.raises(ft.BatchError, match=r"rejected\.position_ids: 3 at \[0, 0\].*from 2"):
        step(state, {**good, "rejected": shifted})
