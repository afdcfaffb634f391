"""The laws of `functrain.testing`, applied to every model, stage and precision that should obey."""

from __future__ import annotations

import ast
import copy
import functools
import sys
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import functrain as ft
from functrain import keys, testing
from functrain.errors import ConfigError
from functrain.objectives.language import LanguageModeling

EVERY = pytest.mark.parametrize("name", sorted(zoo.MODELS))
STAGES = pytest.mark.parametrize("stage", ["pretrain", "sft", "dpo"])


def _step(architecture: Any, stage: str, params: Any, **options: Any) -> Any:
    options = {"schedule": ft.schedules.cosine(1e-2, total=50, warmup=2), **options}
    optimizer = options.pop("optimizer", ft.optim.adamw(weight_decay=0.1))
    if stage == "dpo":
        reference = ft.trees.clone(params)
        return ft.dpo_step(architecture, optimizer, reference=reference, dropout=True, **options)
    make = ft.pretrain_step if stage == "pretrain" else ft.sft_step
    return make(architecture, optimizer, **options)


def _batch(stage: str, seed: int = 0, examples: int = 4) -> dict[str, Any]:
    return zoo.pairs(seed, examples) if stage == "dpo" else zoo.batch(seed, examples)


def _started(name: str, stage: str, **options: Any) -> tuple[Any, Any]:
    """A step and a state two steps on, so that no field is at its default."""
    architecture, params, buffers = zoo.split(name)
    step = _step(architecture, stage, params, max_grad_norm=0.5, **options)
    state = step.init(params, buffers, seed=5)
    for seed in (1, 2):
        state, _ = step(state, _batch(stage, seed), donate=False)
    return step, state


PRECISIONS = ("fp32", "bf16", "fp16", "bf16_params")
# Every two of a model, a stage and a precision meet in the ordinary run; all three in the long one.
MET = [
    pytest.param(name, stage, precision, marks=pytest.mark.long if (i - j - k) % 3 else [])
    for i, name in enumerate(sorted(zoo.MODELS))
    for j, stage in enumerate(("pretrain", "sft", "dpo"))
    for k, precision in enumerate(PRECISIONS)
]


@pytest.mark.parametrize(("name", "stage", "precision"), MET)
def test_a_step_is_pure(name: str, stage: str, precision: str) -> None:
    step, state = _started(name, stage, precision=precision, microbatches=2)
    testing.assert_pure(step, state, _batch(stage))


@EVERY
@STAGES
def test_donation_equals_pure(name: str, stage: str) -> None:
    step, state = _started(name, stage, precision="bf16", microbatches=2, ema_decay=0.9)
    testing.assert_donation_equal(step, state, _batch(stage))


@pytest.mark.parametrize(
    "optimizer",
    [
        ft.optim.adam(amsgrad=True),
        ft.optim.sgd(momentum=0.9),
        ft.optim.adafactor(),
        ft.optim.muon(),
        ft.optim.from_torch(torch.optim.RAdam),
    ],
    ids=lambda o: o.kind,
)
def test_every_optimizer_obeys(optimizer: Any, tmp_path: Path) -> None:
    step, state = _started("tied", "pretrain", optimizer=optimizer)
    testing.assert_pure(step, state, zoo.batch())
    testing.assert_donation_equal(step, state, zoo.batch())
    testing.assert_resumable(step, state, zoo.Batches(), state.step + 3, tmp_path)


@functools.cache
def _in_eval_mode(name: str, stage: str = "pretrain") -> tuple[Any, Any]:
    """Float64, and eval mode: BatchNorm couples the examples of a batch, dropout draws."""
    architecture, params, buffers = zoo.split(name, torch.float64)
    if stage == "dpo":
        step = ft.dpo_step(architecture, ft.optim.adamw(), reference=ft.trees.clone(params))
    else:
        step = ft.make_step(
            LanguageModeling(mode="eval"), ft.optim.adamw(), architecture=architecture
        )
    state = step.init(params, buffers)
    state, _ = step(state, _batch(stage), donate=False)
    return step, state


@EVERY
@given(data=st.data())
def test_any_partition_gives_the_same_gradient(name: str, data: st.DataObject) -> None:
    batch = data.draw(testing.batches(zoo.VOCABULARY))
    parts = data.draw(testing.partitions(len(batch["input_ids"])))
    step, state = _in_eval_mode(name)
    testing.assert_accumulation_invariant(step, state, batch, parts)


@EVERY
@given(data=st.data())
def test_any_partition_of_pairs_gives_the_same_gradient(name: str, data: st.DataObject) -> None:
    batch = data.draw(testing.pairs(zoo.VOCABULARY))
    parts = data.draw(testing.partitions(len(batch["chosen"]["input_ids"])))
    step, state = _in_eval_mode(name, "dpo")
    testing.assert_accumulation_invariant(step, state, batch, parts)


@EVERY
@given(data=st.data())
def test_an_evaluation_is_the_same_over_any_partition(name: str, data: st.DataObject) -> None:
    batch = data.draw(testing.batches(zoo.VOCABULARY))
    parts = data.draw(testing.partitions(len(batch["input_ids"])))
    step, state = _in_eval_mode(name)
    testing.assert_evaluation_invariant(step, state, batch, parts)


@pytest.mark.parametrize("name", ["decoder", "tied"])
@given(data=st.data())
def test_padding_changes_nothing(name: str, data: st.DataObject) -> None:
    batch = data.draw(testing.batches(zoo.VOCABULARY))
    step, state = _in_eval_mode(name)
    testing.assert_padding_invariant(step, state, batch, data.draw(st.integers(1, 5)))


@pytest.mark.parametrize("name", ["decoder", "tied"])
@given(batch=testing.pairs(zoo.VOCABULARY), columns=st.integers(1, 5))
def test_padding_pairs_changes_nothing(name: str, batch: Any, columns: int) -> None:
    step, state = _in_eval_mode(name, "dpo")
    testing.assert_padding_invariant(step, state, batch, columns)


def test_padding_pairs_with_log_probs_of_each_token_changes_nothing() -> None:
    architecture, params, buffers = zoo.split("tied")
    attach = ft.attach_reference(architecture, params, buffers, by_token=True)
    step = ft.dpo_step(architecture, ft.optim.adamw(1e-3), ld_alpha=0.5)
    batch = attach(zoo.pairs())
    testing.assert_padding_invariant(step, step.init(params, buffers), batch, 3)


class Maskless(nn.Module):
    """A model without `attention_mask`: causal, unless it is to see what comes `after`."""

    def __init__(self, after: bool) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(zoo.VOCABULARY, 8), nn.Linear(8, zoo.VOCABULARY)
        self.after = after

    def forward(self, input_ids: torch.Tensor, position_ids: Any = None) -> torch.Tensor:
        hidden = self.embedding(input_ids)
        if position_ids is not None:
            hidden = hidden * position_ids.unsqueeze(-1).cos()
        hidden = hidden.flip(1).cumsum(1).flip(1) if self.after else hidden.cumsum(1)
        logits: torch.Tensor = self.head(hidden.tanh())
        return logits


@pytest.mark.filterwarnings("ignore:.*depend on tokens that come after them")
@pytest.mark.parametrize("after", [False, True])
def test_a_model_without_a_mask_is_padded_without_one(after: bool) -> None:
    """With positions they go on, for those that begin anew would be of another document."""
    with keys.seeded(7):
        architecture, params, buffers = ft.split(Maskless(after).double())
    step = ft.sft_step(architecture, ft.optim.adamw())
    state, batch = step.init(params, buffers), zoo.batch()
    for each in (batch, {**batch, "position_ids": torch.arange(8).expand(4, 8)}):
        if after:
            with pytest.raises(AssertionError, match="3 columns of padding: the gradient"):
                testing.assert_padding_invariant(step, state, each)
        else:
            testing.assert_padding_invariant(step, state, each)


class Rounding(zoo.Tied):
    """With few rows it rounds otherwise where gradients are wanted, as torch's RNNs may."""

    def forward(self, input_ids: torch.Tensor, *args: Any, **rest: Any) -> Any:
        logits = super().forward(input_ids, *args, **rest)["logits"]
        few = len(input_ids) < 4 and torch.is_grad_enabled()
        return {"logits": logits * (1 + 1e-6) if few else logits}


def test_only_pairs_that_are_all_but_tied_may_be_turned_by_rounding() -> None:
    with keys.seeded(7):
        architecture, params, buffers = ft.split(Rounding())
    step = ft.dpo_step(architecture, ft.optim.adamw(1e-2), reference=ft.trees.clone(params))
    state, batch = step.init(params, buffers), zoo.pairs()
    testing.assert_accumulation_invariant(step, state, batch, [1, 1, 1, 1])
    for _ in range(2):
        metrics = step.value_and_grad(state.params, state.buffers, batch).metrics
        accuracy = metrics.metric("rewards/accuracies")
        other = attrs.evolve(accuracy, sum=(accuracy.sum - 1).abs())
        turned = metrics | ft.metrics.Metrics({"rewards/accuracies": other})
        if state.step == 0:
            testing._assert_metrics_close(step, state, batch, metrics, turned, "turned")
        else:
            with pytest.raises(AssertionError, match=r"turned: rewards/accuracies 1\.0 and 0\.75"):
                testing._assert_metrics_close(step, state, batch, metrics, turned, "turned")
        state, _ = step(state, batch, donate=False)


@EVERY
def test_a_token_weighs_the_same_wherever_it_stands(name: str) -> None:
    """Micro-batches of 1 and of 13 targets: the mean over all 14, not the mean of two means."""
    step, state = _in_eval_mode(name)
    short, long = zoo.batch(1, 1, 2, ignored=0), zoo.batch(2, 1, 14, ignored=0)
    losses = [float(ft.evaluate(step, state, [each])["eval_loss"]) for each in (short, long)]
    _, metrics = step(state, [short, long])
    assert float(metrics["num_tokens"]) == 14
    assert float(metrics["loss"]) == pytest.approx((losses[0] + 13 * losses[1]) / 14, rel=1e-12)
    parts = [step.value_and_grad(state.params, state.buffers, each) for each in (short, long)]
    both = step.value_and_grad(state.params, state.buffers, [short, long])
    for name_, grad in both.grads.items():
        expected = (parts[0].grads[name_] + 13 * parts[1].grads[name_]) / 14
        torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-12)


def test_micro_batches_of_different_lengths_equal_one_padded_batch() -> None:
    step, state = _in_eval_mode("tied")
    ready = [zoo.batch(1, 2, 5), zoo.batch(2, 3, 9)]
    padded = [testing._padded(ready[0], 4), testing._padded(ready[1], 0)]
    batch = zoo.concatenated(padded)
    whole = step.value_and_grad(state.params, state.buffers, batch)
    cut = step.value_and_grad(state.params, state.buffers, ready)
    testing._assert_close(step, state, batch, whole, cut, "lengths 5 and 9")


@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.floats(1e-3, 1e3),
    max_norm=st.floats(1e-3, 1e3),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_clip_laws(seed: int, size: float, max_norm: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    grads = {
        name: (torch.randn(shape, generator=generator, dtype=torch.float64) * size).to(dtype)
        for name, shape in (("a", (3, 4)), ("b", (5,)), ("c", ()))
    }
    grads["small"] = grads["b"] * 1e-5
    testing.assert_clip_laws(grads, max_norm)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("spoilt", [1.02, 0.0])
def test_clipping_that_breaks_its_laws_is_noticed(
    dtype: torch.dtype, spoilt: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too long, or of another direction; in a narrow dtype by more than its rounding."""

    def clip(grads: Any, max_norm: float) -> Any:
        clipped, norm = ft.clip_by_global_norm(grads, max_norm)
        return {**clipped, "b": clipped["b"] * spoilt}, norm

    monkeypatch.setattr(testing, "clip_by_global_norm", clip)
    grads = {"a": torch.ones(2, dtype=dtype), "b": torch.full((3,), 100.0, dtype=dtype)}
    with pytest.raises(AssertionError, match="after clipping"):
        testing.assert_clip_laws(grads, 1.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_is_named(value: float) -> None:
    with pytest.raises(AssertionError, match=f"the gradients' norm is {value}"):
        testing.assert_clip_laws({"a": torch.tensor([value, 1.0])}, 1.0)


@EVERY
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_run_resumed_anywhere_ends_with_the_same_bits(
    name: str, precision: str, tmp_path: Path
) -> None:
    architecture, params, buffers = zoo.split(name)
    step = _step(
        architecture, "pretrain", params, precision=precision, max_grad_norm=0.5, ema_decay=0.9
    )
    state = step.init(params, buffers, seed=11)
    testing.assert_resumable(step, state, zoo.Batches(length=12), 6, tmp_path)


def _by_columns(matrix: torch.Tensor) -> torch.Tensor:
    """The same numbers in other strides, as `torch.linalg.qr` gives them."""
    return matrix.t().contiguous().t()


class ByColumns(zoo.Tied):
    """Matrices that were made by columns, and every second column of other weights."""

    def __init__(self) -> None:
        super().__init__(width=8)
        self.mix.weight = nn.Parameter(_by_columns(self.mix.weight.detach()))
        self.embedding.weight = nn.Parameter(torch.randn(zoo.VOCABULARY, 16)[:, ::2] / 4)
        self.head.weight = self.embedding.weight
        self.turn = nn.Parameter(torch.linalg.qr(torch.randn(8, 8))[0])
        self.register_buffer("back", _by_columns(torch.linalg.qr(torch.randn(8, 8))[0]))

    def forward(self, input_ids: torch.Tensor, **rest: Any) -> Any:
        hidden = self.mix(self.embedding(input_ids) @ self.turn)
        return self.head(self.norm(hidden.cumsum(1) @ self.back))


class Rotated(zoo.Own):
    """As SOAP: momentum in a basis that is made anew by QR, whose matrix is one by columns."""

    def _update(self, group: dict[str, Any], param: Any) -> None:
        grad, state = param.grad.view(len(param), -1), self.state[param]
        past = state.get("basis", torch.eye(len(param)))
        state["basis"] = torch.linalg.qr(grad @ grad.t() + past)[0]
        param.sub_((state["basis"] @ (past.t() @ grad)).view_as(param) * group["lr"])


@pytest.mark.parametrize("optimizer", [ft.optim.adamw(), ft.optim.from_torch(Rotated)])
def test_no_bit_depends_on_how_numbers_lay_in_memory(optimizer: Any, tmp_path: Path) -> None:
    """What is saved is read again in order; and so are the copies that a branch is made of."""
    with keys.seeded(3):
        architecture, params, buffers = ft.split(ByColumns())
    step = ft.pretrain_step(architecture, optimizer, schedule=1e-2)
    state = step.init(params, buffers)
    testing.assert_resumable(step, state, zoo.Batches(), 3, tmp_path)
    for _ in range(2):
        testing.assert_donation_equal(step, state, zoo.batch())
        state, _ = step(state, zoo.batch())


class Noisy(zoo.Own):
    """Langevin dynamics: a descent with noise, which the class draws itself."""

    def _update(self, group: dict[str, Any], param: Any) -> None:
        param.sub_((param.grad + torch.randn_like(param)) * group["lr"])


def test_what_an_optimizer_draws_is_of_the_states_key(tmp_path: Path) -> None:
    parts = [("noisy", ft.optim.is_any, ft.optim.from_torch(Noisy))]
    for optimizer in (parts[0][2], ft.optim.partition(parts)):
        step, state = _started("tied", "pretrain", optimizer=optimizer)
        testing.assert_pure(step, state, zoo.batch())
        testing.assert_donation_equal(step, state, zoo.batch())
        testing.assert_resumable(
            step, state, zoo.Batches(), state.step + 2, tmp_path / step.optimizer.kind
        )
        other = attrs.evolve(state, key=state.key + 1)
        one, two = (step(each, zoo.batch())[0].params["mix.bias"] for each in (state, other))
        assert not torch.equal(one, two)


@functools.cache
def _preferring(name: str) -> tuple[Any, Any]:
    """A step of pairs, and its state at the start."""
    architecture, params, buffers = zoo.split(name)
    step = ft.dpo_step(
        architecture, ft.optim.adamw(1e-2), reference=ft.trees.clone(params), beta=0.3
    )
    return step, step.init(params, buffers)


@EVERY
@given(batch=testing.pairs(zoo.VOCABULARY))
def test_preference_laws(name: str, batch: Any) -> None:
    testing.assert_preference_laws(*_preferring(name), batch)


@EVERY
def test_randomness_is_a_function_of_key_step_and_micro_batch(name: str) -> None:
    step, state = _started(name, "pretrain")
    other = attrs.evolve(state, key=state.key + 1)
    later = attrs.evolve(state, step=state.step + 1)
    losses = [float(step(s, zoo.batch())[1]["loss"]) for s in (state, other, later)]
    draws = name == "normed"
    assert (losses[0] != losses[1]) is draws
    assert (losses[0] != losses[2]) is draws


def test_each_micro_batch_draws_its_own_randomness() -> None:
    """Dropout falls elsewhere in each of two micro-batches of the same examples.

    BatchNorm is in eval mode, or else the mean of two losses of equal draws would differ anyway.
    """

    class Dropped(zoo.Normed):
        def forward(self, *args: Any, **rest: Any) -> Any:
            self.norm.eval()
            return super().forward(*args, **rest)

    architecture, params, buffers = ft.split(Dropped())
    step = ft.pretrain_step(architecture, ft.optim.adamw(1e-2))
    state = step.init(params, buffers)
    once, twice = (step(state, [zoo.batch()] * n)[1]["loss"] for n in (1, 2))
    assert float(once) != float(twice)
    steady = attrs.evolve(state, params=params)
    architecture.dropout.p = 0.0
    once, twice = (step(steady, [zoo.batch()] * n)[1]["loss"] for n in (1, 2))
    assert float(once) == pytest.approx(float(twice), rel=1e-6)


def test_an_evaluation_that_draws_is_repeatable_and_disturbs_nobody() -> None:
    class Noisy(zoo.Tied):
        def forward(self, *args: Any, **rest: Any) -> Any:
            return {"logits": super().forward(*args, **rest)["logits"] * torch.rand(())}

    architecture, params, buffers = ft.split(Noisy())
    step = ft.pretrain_step(architecture, ft.optim.adamw(1e-2))
    state = step.init(params, buffers)
    before = torch.default_generator.get_state()
    first = ft.evaluate(step, state, [zoo.batch()]).to_dict()
    assert torch.equal(torch.default_generator.get_state(), before)
    torch.rand(3)
    assert ft.evaluate(step, state, [zoo.batch()]).to_dict() == first


def test_a_broken_law_is_noticed() -> None:
    """The laws can fail: a step that writes to its state, and one that moves a generator."""
    step, state = _started("tied", "pretrain")

    class Writes:
        architecture = step.architecture

        def __call__(self, state: Any, batch: Any, *, donate: bool = False) -> Any:
            del donate
            state.params["mix.bias"].add_(1)
            return step(state, batch)

    class Draws:
        architecture = step.architecture

        def __call__(self, state: Any, batch: Any, *, donate: bool = False) -> Any:
            del donate
            torch.rand(1)
            return step(state, batch)

    with pytest.raises(AssertionError, match="changed the state"):
        testing.assert_pure(Writes(), ft.clone(state), zoo.batch())  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="random generator"):
        testing.assert_pure(Draws(), state, zoo.batch())  # type: ignore[arg-type]
    normed, trained = _started("normed", "pretrain")
    with pytest.raises(AssertionError):
        testing.assert_accumulation_invariant(normed, trained, zoo.batch(), [1, 3])


@pytest.mark.parametrize("precision", ["bf16", "fp16", "bf16_params"])
def test_in_a_narrow_precision_the_laws_hold_to_its_rounding(precision: str) -> None:
    """And they still notice what breaks them: BatchNorm, in whatever precision."""
    batch = zoo.batch(examples=8)
    step, state = _started("tied", "pretrain", precision=precision)
    testing.assert_accumulation_invariant(step, state, batch, [3, 1, 4])
    testing.assert_padding_invariant(step, state, batch)
    testing.assert_evaluation_invariant(step, state, batch, [1, 7])
    normed, trained = _started("normed", "pretrain", precision=precision)
    with pytest.raises(AssertionError, match="the gradient of"):
        testing.assert_accumulation_invariant(normed, trained, batch, [3, 1, 4])


def test_a_law_is_not_held_by_nothing(tmp_path: Path) -> None:
    step, state = _started("tied", "pretrain")
    with pytest.raises(AssertionError, match="nothing was run: 2 is a total, and this is step 2"):
        testing.assert_resumable(step, state, zoo.Batches(), 2, tmp_path)
    with pytest.raises(ConfigError, match=r"parts: \[1, 2\], expected .* the batch's 4 examples"):
        testing.assert_accumulation_invariant(step, state, zoo.batch(), [1, 2])
    ids = torch.arange(4).expand(2, 4)
    packed = {"input_ids": ids, "labels": ids, "position_ids": ids % 2}
    with pytest.raises(AssertionError, match="a packed batch"):
        testing.assert_padding_invariant(step, state, packed)
    with pytest.raises(AssertionError, match=r"a batch of \['x'\]"):
        testing.assert_padding_invariant(step, state, {"x": ids})


def test_a_step_that_donates_is_resumed_too(tmp_path: Path) -> None:
    step, state = _started("tied", "pretrain", donate=True)
    testing.assert_resumable(step, state, zoo.Batches(), state.step + 2, tmp_path)
    assert state.step == 2  # not consumed


def test_the_laws_take_completions_without_a_pair() -> None:
    """Of a batch in which all are desirable no mean over the others is known, on either side."""
    architecture, params, buffers = zoo.split("tied", torch.float64)
    step = ft.kto_step(architecture, ft.optim.adamw(), reference=ft.trees.clone(params))
    state = step.init(params, buffers)
    batch = {
        "completion": zoo.batch(),
        "mismatched": zoo.batch(1, time=6),
        "desirable": torch.ones(4, dtype=torch.bool),
    }
    testing.assert_accumulation_invariant(step, state, batch, [1, 3])
    testing.assert_evaluation_invariant(step, state, batch, [1, 3])
    testing.assert_padding_invariant(step, state, batch)


def test_a_deep_copy_of_the_batch_is_the_same_batch() -> None:
    step, state = _started("normed", "dpo")
    batch = zoo.pairs()
    one, _ = step(state, batch)
    other, _ = step(state, copy.deepcopy(batch))
    testing.assert_same(one, other, "a copied batch")


def test_a_law_holds_where_python_leaves_asserts_out() -> None:
    """`python -O`: a law by an `assert` would pass whatever the model does."""
    tree = ast.parse(Path(testing.__file__).read_text())
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)]


@pytest.mark.parametrize("parts", [[3], [1, 4], [4, 0], []])
def test_parts_that_are_no_partition_are_named(parts: list[int]) -> None:
    """They would be another batch, and the law would blame the model."""
    step, state = _started("tied", "pretrain")
    for law in (testing.assert_accumulation_invariant, testing.assert_evaluation_invariant):
        with pytest.raises(ConfigError, match=r"add up to the batch's 4 examples"):
            law(step, state, zoo.batch(), parts)


def test_the_extra_of_the_strategies_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    for make in (testing.batches, testing.pairs, testing.partitions):
        with pytest.raises(ConfigError, match=r"functrain\[testing\]"):
            make(4)


class Basis(nn.Module):
    """Its buffer is a basis that a decomposition gives, column by column."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.embedding = nn.Embedding(zoo.VOCABULARY, width)
        self.head = nn.Linear(width, zoo.VOCABULARY)
        self.register_buffer("basis", torch.eye(width))

    def forward(self, input_ids: Any) -> Any:
        hidden = self.embedding(input_ids)
        scaled = hidden * (1 + (self.basis * self.basis.abs()).sum())
        if self.training:
            rows = hidden.detach().flatten(0, 1)
            self.basis = torch.linalg.qr(rows.mT @ rows)[0]
        return self.head(scaled)


def test_a_buffer_that_comes_by_columns_is_kept_in_order(tmp_path: Path) -> None:
    """As it is loaded: of the same numbers in another order a kernel gives other bits."""
    with keys.seeded(1):
        architecture, params, buffers = ft.split(Basis())
    step = ft.pretrain_step(architecture, ft.optim.adamw(1e-2))
    state = step.init(params, buffers)
    testing.assert_resumable(step, state, zoo.Batches(), 4, tmp_path)
