"""Checkpointed by name: the same bits, less that is saved, and nothing left behind."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import attrs
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zoo
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import functrain as ft
from functrain import activations, compilation, keys, selective
from functrain.loop import conditions

# Of torch's own, when its code generator is imported.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
BLOCKS = "model.layers.*"


def _theirs(config: str) -> nn.Module:
    """Whose config asks for a cache of keys and values, as it does unless it is told not to."""
    transformers = pytest.importorskip("transformers")
    made = getattr(transformers, config)(
        vocab_size=zoo.VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        attention_dropout=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with keys.seeded(3):
        built: nn.Module = transformers.AutoModelForCausalLM.from_config(made)
    assert built.config.use_cache  # type: ignore[union-attr]
    return built


MODELS: dict[str, tuple[Any, str]] = {
    "decoder": (lambda: zoo.decoder(dropout=0.2), BLOCKS),
    "block": (lambda: zoo.decoder(dropout=0.2, layers=1), BLOCKS),
    "llama": (lambda: _theirs("LlamaConfig"), BLOCKS),
    "gpt2": (lambda: _theirs("GPT2Config"), "transformer.h.*"),
    "tied": (lambda: zoo.model("tied"), "mix"),
}


def _begun(name: str = "decoder", stage: str = "pretrain", **options: Any) -> tuple[Any, Any]:
    build, pattern = MODELS[name]
    architecture, params, buffers = ft.split(build())
    options = {"checkpoint": pattern, **options}
    optimizer = ft.optim.adamw(1e-2)
    if stage == "pretrain":
        step = ft.pretrain_step(architecture, optimizer, **options)
    else:
        options = {"loss": stage, "dropout": True, **options}
        step = ft.dpo_step(architecture, optimizer, reference=ft.trees.clone(params), **options)
    return step, step.init(params, buffers, seed=5)


def _batch(step: Any, seed: int, time: int = 8) -> Any:
    make = zoo.batch if step.objective.name == "pretrain" else zoo.pairs
    return make(seed, time=time)


def _trained(step: Any, state: Any, time: int = 8) -> Any:
    for seed in range(2):
        state, _ = step(state, _batch(step, seed, time))
    return state


ORDINARY = {
    ("decoder", "pretrain", "fp32", "full"),
    ("decoder", "pretrain", "bf16", "full"),
    ("llama", "pretrain", "fp32", "full"),
    ("gpt2", "pretrain", "bf16", "full"),
    ("tied", "pretrain", "fp32", "full"),
    ("decoder", "sigmoid", "fp32", "full"),
    ("llama", "bco_pair", "bf16", "full"),
    ("decoder", "pretrain", "bf16", "selective"),  # autocast has some casts in its cache
    ("llama", "pretrain", "fp32", "selective"),
    ("gpt2", "pretrain", "fp32", "selective"),
    ("decoder", "sigmoid", "bf16", "selective"),
}
STEPS = [
    pytest.param(*case, marks=() if case in ORDINARY else pytest.mark.long)
    for case in itertools.product(
        MODELS, ("pretrain", "sigmoid", "bco_pair"), ("fp32", "bf16"), activations.RECOMPUTES
    )
    if case[:2] not in {("tied", "sigmoid"), ("tied", "bco_pair")}  # it takes no pairs
]


@pytest.mark.parametrize(("name", "stage", "precision", "recompute"), STEPS)
def test_steps_have_the_bits_of_those_that_keep_everything(
    name: str, stage: str, precision: str, recompute: str
) -> None:
    """Gradients, and whole steps of two micro-batches, dropout among them."""
    options: Any = {"microbatches": 2, "precision": precision}
    ours, state = _begun(name, stage, recompute=recompute, **options)
    theirs, _ = _begun(name, stage, checkpoint=None, **options)
    batch = _batch(ours, 0)
    grads, expected = (
        step.gradient(state.params, state.buffers, batch, key=3).grads for step in (ours, theirs)
    )
    assert grads.keys() == expected.keys()
    assert all(torch.equal(grads[name], expected[name]) for name in expected)
    assert ft.fingerprint(_trained(ours, state)) == ft.fingerprint(_trained(theirs, state))


LONG = 24  # tokens, of which more is saved than of what is about them


def _saved(step: Any, state: Any) -> int:
    """Elements that autograd keeps from the forward pass to the backward."""
    counts: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        counts.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step(state, zoo.batch(time=LONG))
    return sum(counts)


@pytest.mark.parametrize("name", ["decoder", "llama", "gpt2"])
def test_less_is_saved(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Selectively, what is between the products, of which each is made once."""
    ours, state = _begun(name)
    theirs, _ = _begun(name, checkpoint=None)
    assert _saved(ours, state) < 0.35 * _saved(theirs, state)
    keeping, _ = _begun(name, recompute="selective")
    kept: list[selective.Result] = []
    of = selective.Result.of

    def watched(operator: Any, returned: Any) -> Any:
        kept.append(of(operator, returned))
        return kept[-1]

    monkeypatch.setattr(selective.Result, "of", watched)
    saved = _saved(keeping, state)
    assert saved == _saved(ours, state)
    saved += sum(tensor.numel() for each in kept for tensor, _ in each.watched[:1])
    assert saved < 0.75 * _saved(theirs, state)
    assert ft.flops_of(keeping, state, zoo.batch()) <= ft.flops_of(theirs, state, zoo.batch())


def _operator(name: str) -> Any:
    return getattr(torch.ops.aten, name).default


@given(
    rows=st.integers(1, 64),
    summed=st.integers(1, 64),
    columns=st.integers(1, 600),
    add=st.booleans(),
)
def test_a_product_is_kept_unless_it_is_wide_for_what_it_sums(
    rows: int, summed: int, columns: int, add: bool
) -> None:
    """An adapter's update, and the scores of a long sequence, take memory for little arithmetic."""
    one = torch.empty(rows, summed, device="meta")
    for right in (
        torch.empty(summed, columns, device="meta"),
        torch.empty(columns, summed, device="meta").T,
    ):
        args = (torch.empty(columns, device="meta"), one, right) if add else (one, right)
        kept = selective.is_kept(_operator("addmm" if add else "mm"), args, {})
        assert kept == (columns <= 8 * summed)
        batched = [each.unsqueeze(0) for each in args]
        kept = selective.is_kept(_operator("baddbmm" if add else "bmm"), batched, {})
        assert kept == (columns <= 8 * summed)


ATTENTION = [
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_flash_attention_forward",
    "_efficient_attention_forward",
]


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_is_kept_unless_it_draws(name: str) -> None:
    """Kept, one that draws would leave the generator where it was for what draws after it."""
    operator = _operator(name)
    arguments = [each.name for each in operator._schema.arguments]
    for probability in (0.0, 0.1):
        given = [probability if each == "dropout_p" else None for each in arguments]
        assert selective.is_kept(operator, given, {}) == (probability == 0)
    assert selective.is_kept(operator, [None] * 3, {})
    assert not selective.is_kept(operator, [None] * 3, {"dropout_p": 0.1})
    assert not selective.is_kept(_operator("silu"), [None], {})


def test_a_part_of_the_blocks_and_several_patterns() -> None:
    ours, state = _begun(checkpoint=["model.layers.1.mlp", "model.layers.0"])
    assert list(ours.value_and_grad.checkpointed) == ["model.layers.1.mlp", "model.layers.0"]
    theirs, _ = _begun(checkpoint=None)
    assert ft.fingerprint(_trained(ours, state)) == ft.fingerprint(_trained(theirs, state))
    assert _saved(*_begun()) < _saved(ours, state) < _saved(theirs, state)


@pytest.mark.parametrize(
    "name",
    [
        "decoder",
        "tied",
        pytest.param("block", marks=pytest.mark.long),
        pytest.param("llama", marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("recompute", activations.RECOMPUTES)
def test_compiled(name: str, recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is compiled once, and saves less there too."""
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    from torch._dynamo.utils import counters

    ours, state = _begun(name, compile=True, recompute=recompute)
    plain, _ = _begun(name, checkpoint=None)
    before = counters["stats"]["unique_graphs"]
    trained = _trained(ours, state, LONG)
    assert counters["stats"]["unique_graphs"] == before + 1
    expected = _trained(plain, state, LONG)
    for parameter, value in trained.params.items():
        torch.testing.assert_close(value, expected.params[parameter], rtol=1e-3, atol=1e-5)
    if name != "tied":  # one matrix is little
        keeping, _ = _begun(name, compile=True, checkpoint=None)
        keeping(state, zoo.batch(time=LONG))
        # The compiler recomputes by itself what is cheap in a decoder.
        share = 0.8 if recompute == "full" else 1.0
        assert _saved(ours, state) < share * _saved(keeping, state)
    found = conditions(ours, 4)
    assert found["checkpoint"] == [MODELS[name][1]]
    assert found["recompute"] == (None if recompute == "full" else recompute)
    found = conditions(attrs.evolve(ours, compile=False), 4)
    assert (found["checkpoint"], found["recompute"]) == ([], None)


def test_nothing_is_left_behind() -> None:
    """After a step and after an error; evaluation is plain."""
    step, state = _begun("llama")
    before = ft.evaluate(step, state, [zoo.batch()]).to_dict()
    step(state, zoo.batch())
    block = type(step.architecture.model.layers[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block, "forward", lambda *_args, **_kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            step(state, zoo.batch())
    assert not any("forward" in vars(module) for module in step.architecture.modules())
    assert ft.evaluate(step, state, [zoo.batch()]).to_dict() == before


class Twice(zoo.Tied):
    """With blocks that are not for it."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.Sequential(nn.BatchNorm1d(4)), nn.Linear(4, 4)])
        self.norms[1].forward = self.mix.forward  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("model.layer.*", r"matches 'model.layer.\*'; did you mean 'model.layers.\*'"),
        ("layers.*", r"no module's name matches"),
        ("*layers*", r"no module's name matches"),  # a star is within one part
        ("model.layers", r"a container, which is never called; write 'model.layers.\*'"),
        (["model.layers.*", "model.layers.*.mlp"], r"layers.0.mlp is inside of model.layers.0"),
        ("lm_head", r"lm_head is the head"),
        ("model.embed_tokens", r"model.embed_tokens is an embedding"),
        ("model.embed*", r"model.embed_tokens is an embedding"),
        (["model.norm", "model.embed_tokens"], r"model.embed_tokens is an embedding"),
        (3, r"checkpoint: 3, expected a pattern of module names"),
        ([3], r"checkpoint: \[3\], expected a pattern of module names"),
    ],
)  # fmt: skip
def test_patterns_that_cannot_be_are_refused(pattern: Any, message: str) -> None:
    with pytest.raises(ft.ConfigError, match=message):
        _begun(checkpoint=pattern)


def test_what_to_recompute_is_one_of_two_and_of_modules() -> None:
    with pytest.raises(ft.ConfigError, match=r"recompute: 'selectiv', unknown; did you mean"):
        _begun(recompute="selectiv")
    for checkpoint in (None, ()):
        with pytest.raises(ft.ConfigError, match=r"'selective', and checkpoint names no modules"):
            _begun(recompute="selective", checkpoint=checkpoint)


def test_an_embedding_among_others_is_left_alone() -> None:
    """Its gradient is added where it is made, which it would not be: the bits would be others."""
    assert activations.matching(zoo.decoder(), ["model.[en]*"]).keys() == {"model.norm"}


def test_modules_that_cannot_be_are_refused() -> None:
    for pattern, message in (
        ("norms.0", "running statistics"),
        ("norms.1", "a forward of its own"),
    ):
        with pytest.raises(ft.ConfigError, match=message):
            activations.matching(Twice(), [pattern])
    theirs = _theirs("LlamaConfig")
    theirs.model.layers[0].gradient_checkpointing = True  # type: ignore[union-attr, index]
    with pytest.raises(ft.ConfigError, match=r"model.layers.0 has its own turned on"):
        activations.matching(theirs, [BLOCKS])
    with pytest.raises(ft.ConfigError, match=r"Decoder has its own turned on"):
        activations.matching(zoo.decoder(checkpointing=True), [BLOCKS])


class Drawing(nn.Module):
    """A block whose scale is drawn."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        return (self.linear(x) * (1 + self.draw())).sin()


class Blocks(zoo.Tied):
    """With blocks in the place of its mixing."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.mix = nn.Sequential(*[make() for _ in range(3)])  # type: ignore[assignment]


def _gradients(make: Callable[[], nn.Module], checkpoint: str | None, **options: Any) -> Any:
    with keys.seeded(3):
        architecture, params, buffers = ft.split(Blocks(make))
    step = ft.pretrain_step(
        architecture, ft.optim.adamw(), microbatches=2, checkpoint=checkpoint, **options
    )
    return step.gradient(params, buffers, zoo.batch(), key=3)


DRAWS: dict[str, Callable[[], float]] = {
    "random": random.random,
    "gauss": lambda: random.gauss(0, 1),
    "numpy": np.random.rand,
    "normal": np.random.randn,  # every second leaves the generator where it is
    "torch": lambda: float(torch.rand(())),
    "all": lambda: random.random() + np.random.rand() + np.random.randn() + float(torch.rand(())),
}


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize(("pattern", "recompute"), [("mix.*", "full"), ("mix.1", "selective")])
def test_what_is_recomputed_draws_the_same(name: str, pattern: str, recompute: str) -> None:
    """From whichever generator; the blocks that are not recomputed draw from it too."""
    ours = _gradients(lambda: Drawing(DRAWS[name]), pattern, recompute=recompute)
    theirs = _gradients(lambda: Drawing(DRAWS[name]), None)
    assert ours.metrics.to_dict() == theirs.metrics.to_dict()
    assert all(torch.equal(ours.grads[name], grad) for name, grad in theirs.grads.items())


class Counting(nn.Module):
    """A block that counts its calls in a buffer, and computes with the count."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.inner = nn.Module()
        for module in (self, self.inner):
            module.register_buffer("calls", torch.ones(()))
            module.register_buffer("none", None, persistent=False)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x) * (self.calls + self.inner.calls).clone()  # type: ignore[operator]
        if self.how == "in place":
            self.calls += 1
        elif self.how == "anew":
            self.calls = self.calls + 1
        elif self.how == "within":
            self.inner.calls += 1  # type: ignore[operator]
        elif self.how == "first":
            self.none = torch.ones(())
        return x.sin()


@pytest.mark.parametrize(
    ("how", "name"),
    [("in place", "calls"), ("anew", "calls"), ("within", "inner.calls"), ("first", "none")],
)
def test_a_buffer_that_a_second_forward_would_find_changed_is_refused(how: str, name: str) -> None:
    message = f"checkpoint: the buffer {name} of a Counting has been written to since its forward"
    with pytest.raises(ft.ArchitectureError, match=message):
        _gradients(lambda: Counting(how), "mix.1")
    assert _gradients(lambda: Counting(how), None).grads
    # The linear layers in them write nowhere.
    ours, theirs = (_gradients(lambda: Counting(how), each) for each in ("mix.*.linear", None))
    assert all(torch.equal(ours.grads[name], grad) for name, grad in theirs.grads.items())


class Added(torch.autograd.Function):
    """A product that writes into its own result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        return (x @ weight.t()).add_(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.flatten(0, 1).t() @ x.flatten(0, 1)


class Writing(nn.Module):
    """A block that writes into the result of a product, in one of many ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear, self.plain = nn.Linear(16, 16), nn.Linear(16, 16, bias=False)
        self.other, self.cell = nn.Linear(16, 16), nn.GRU(16, 16, batch_first=True)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x) if self.how in ("whole", "part") else self.plain(x)
        if self.how in ("whole", "no bias"):
            y += 1
        elif self.how == "part":
            y.view(-1)[1:].mul_(2)
        elif self.how == "no gradient":
            with torch.no_grad():
                y.mul_(2)
        elif self.how == "dropout":
            y = F.dropout(y, 0.5, inplace=True)
        elif self.how == "scores":
            heads = y.unflatten(-1, (2, 8)).transpose(1, 2)
            scores = heads @ heads.mT
            scores /= 3
            y = (scores.tril() @ heads).transpose(1, 2).flatten(2)
        elif self.how == "function":
            y = Added.apply(x, self.plain.weight)  # type: ignore[no-untyped-call]
        elif self.how == "cell":
            y, _ = self.cell(x)
        elif self.how == "outside":
            self.written = y
        # Its last product is kept too, though no gradient asks for it.
        return self.other(y.sin())


class Written(Blocks):
    """Writes into the first product of a block after the block's forward."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        returned = super().forward(*args, **kwargs)
        with torch.no_grad():
            self.mix[1].written.zero_()  # type: ignore[index, union-attr, operator]
        return returned


WAYS = ["whole", "part", "no bias", "no gradient", "dropout", "scores", "function", "cell"]


@pytest.mark.parametrize("how", WAYS)
def test_a_product_that_is_written_into_is_made_again(how: str) -> None:
    """Of a layer without bias autograd takes what is written into for no view of the product."""
    ours = _gradients(lambda: Writing(how), "mix.*", recompute="selective").grads
    theirs = _gradients(lambda: Writing(how), None).grads
    assert all(torch.equal(ours[name], grad) for name, grad in theirs.items())


def test_compiled_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    for how in ("whole", "no bias"):
        ours = _gradients(
            lambda how=how: Writing(how), "mix.*", recompute="selective", compile=True
        )
        theirs = _gradients(lambda how=how: Writing(how), None)
        for name, grad in theirs.grads.items():
            torch.testing.assert_close(ours.grads[name], grad, rtol=1e-4, atol=1e-6)


def test_a_product_that_others_write_into_is_made_again() -> None:
    """As the whole block is where everything is recomputed."""
    found = []
    for recompute in activations.RECOMPUTES:
        with keys.seeded(3):
            architecture, params, buffers = ft.split(Written(lambda: Writing("outside")))
        step = ft.pretrain_step(
            architecture, ft.optim.adamw(), checkpoint="mix.*", recompute=recompute
        )
        found.append(step.gradient(params, buffers, zoo.batch()).grads)
    full, some = found
    assert all(torch.equal(some[name], grad) for name, grad in full.items())


class Compiled(nn.Module):
    """A block that its user has compiled a part of."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.runs = 0

        def backend(graph: Any, _inputs: Any) -> Any:
            def run(*args: Any) -> Any:
                self.runs += 1
                return graph(*args)

            return run

        self.part = torch.compile(lambda x: x.sin() * 2, backend=backend)

    def forward(self, x: Tensor) -> Tensor:
        return self.part(self.linear(x)).cos()


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # which dynamo asks for
def test_what_is_compiled_in_a_block_stays_so() -> None:
    runs = []
    for recompute in activations.RECOMPUTES:
        blocks = Blocks(Compiled)
        modules = activations.matching(blocks, ["mix.*"])
        with activations.checkpointed(modules, recompute):
            out = blocks(input_ids=zoo.batch()["input_ids"])["logits"].square().mean()
            torch.autograd.grad(out, list(blocks.parameters()))
        runs.append([block.runs for block in blocks.mix])  # type: ignore[union-attr]
    assert runs[0] == runs[1]
    assert all(runs[0])


class Changing(nn.Module):
    """A block that has one more product in its first forward, or in its second."""

    def __init__(self, more: int) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.more, self.calls = more, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls % 2 == self.more:
            x = x @ self.linear.weight
        return self.linear(x).sin()


@pytest.mark.parametrize("more", [0, 1])
def test_a_second_forward_of_other_products_is_refused(more: int) -> None:
    message = r"recompute: the second forward of a Changing calls other products than its first"
    with pytest.raises(ft.ArchitectureError, match=message):
        _gradients(lambda: Changing(more), "mix.1", recompute="selective")


@pytest.mark.parametrize("recompute", activations.RECOMPUTES)
def test_a_gradient_may_be_taken_again(recompute: Any) -> None:
    """As by a loss that penalises its own gradient."""
    with keys.seeded(3):
        model = Blocks(lambda: Writing("nowhere"))
    weight = model.mix[1].plain.weight  # type: ignore[union-attr, index]
    grads = []
    for modules in (activations.matching(model, ["mix.*"]), {}):
        with activations.checkpointed(modules, recompute):
            out = model(input_ids=zoo.batch()["input_ids"])["logits"].square().mean()
            (once,) = torch.autograd.grad(out, weight, create_graph=True)
            (twice,) = torch.autograd.grad(once.square().sum() + out, weight)
            grads.append((once, twice))
    assert all(map(torch.equal, *grads))


class Outside(Blocks):
    """Counts the calls of its blocks itself, before them or behind."""

    def __init__(self, behind: bool) -> None:
        super().__init__(lambda: Counting("nowhere"))
        self.behind = behind

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.behind:
            self.mix[1].calls += 1  # type: ignore[index, operator]
        returned = super().forward(*args, **kwargs)
        if self.behind:
            self.mix[1].calls += 1  # type: ignore[index, operator]
        return returned


def test_what_the_model_writes_to_a_blocks_buffer_matters_where_the_block_comes_between() -> None:
    found = []
    for checkpoint in ("mix.*", None):
        with keys.seeded(3):
            architecture, params, buffers = ft.split(Outside(behind=False))
        step = ft.pretrain_step(
            architecture, ft.optim.adamw(), microbatches=2, checkpoint=checkpoint
        )
        found.append(step.gradient(params, buffers, zoo.batch()))
    ours, theirs = found
    assert float(ours.buffers["mix.1.calls"]) == 3
    assert all(torch.equal(ours.grads[name], grad) for name, grad in theirs.grads.items())
    architecture, params, buffers = ft.split(Outside(behind=True))
    step = ft.pretrain_step(architecture, ft.optim.adamw(), checkpoint="mix.*")
    with pytest.raises(ft.ArchitectureError, match="the buffer calls of a Counting"):
        step.gradient(params, buffers, zoo.batch())


@pytest.mark.filterwarnings("ignore:.*")  # what dynamo does not trace it says in many
def test_compiled_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """What draws or writes is not compiled with its checkpoint, but run as it is."""
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    ours = _gradients(lambda: Drawing(lambda: random.random()), "mix.*", compile=True)
    theirs = _gradients(lambda: Drawing(lambda: random.random()), None)
    for name, grad in theirs.grads.items():
        torch.testing.assert_close(ours.grads[name], grad, rtol=1e-4, atol=1e-6)
    with pytest.raises(ft.ArchitectureError, match="the buffer calls of a Counting"):
        _gradients(lambda: Counting("in place"), "mix.*", compile=True)


class Named(nn.Module):
    """Calls its block by names alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(zoo.VOCABULARY, 8)
        self.block = Mixing()
        self.head = nn.Linear(8, zoo.VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embedding(input_ids)
        logits: Tensor = self.head(self.block(hidden=hidden, scale=2.0))
        return logits


class Mixing(nn.Module):
    """A block with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.dropout = nn.Dropout(0.5)

    def forward(self, hidden: Tensor, scale: float) -> Tensor:
        return hidden + self.dropout(self.linear(hidden)) * scale


def test_a_block_that_is_called_by_names_is_looked_at_as_one_that_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Torch keeps the generators of the devices of what is given by place, and of nothing else."""
    placed: list[tuple[Any, ...]] = []
    checkpoint = activations.checkpoint

    def watched(function: Any, *args: Any, **kwargs: Any) -> Any:
        placed.append(args)
        assert set(kwargs) == {"use_reentrant"}
        return checkpoint(function, *args, **kwargs)

    monkeypatch.setattr(activations, "checkpoint", watched)
    architecture, params, buffers = ft.split(Named())
    ends = []
    for pattern in ("block", None):
        step = ft.pretrain_step(architecture, ft.optim.adamw(1e-2), checkpoint=pattern)
        state, _ = step(step.init(params, buffers), zoo.batch())
        ends.append(ft.fingerprint(state))
    assert ends[0] == ends[1]
    ((hidden, scale),) = placed
    assert isinstance(hidden, Tensor)
    assert scale == 2.0
