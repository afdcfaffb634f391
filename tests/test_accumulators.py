"""Gradients summed where they are made: the same to rounding, and no dense ones beside."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import attrs
import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import functrain as ft
from functrain import accumulators, compilation
from functrain.errors import ConfigError
from functrain.gradients import Gradients, accumulate, value_and_grad
from functrain.metrics import Metrics
from functrain.objectives import chunks
from functrain.objectives.language import LanguageModeling
from functrain.objectives.preference import PreferenceOptimization
from functrain.objectives.unpaired import UnpairedOptimization
from functrain.trees import Tensors

Split = tuple[nn.Module, Tensors, Tensors]
NEVER = 1 << 60
PADDING = 4
LENT = (accumulators._PLACE, accumulators._UNREAD)


@pytest.fixture(autouse=True)
def _always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every table is large, and heads are taken by chunks."""
    monkeypatch.setattr(chunks, "BUDGET", 0)
    monkeypatch.setattr(accumulators, "TABLE", 0)


class Model(nn.Module):
    """An embedding of one's choice, and a head that a step finds."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.embedding = embedding
        self.lm_head = nn.Linear(embedding.embedding_dim, zoo.VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(self.embedding(input_ids).cumsum(1))
        return logits

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head


class Deep(nn.Module):
    """The same below a module that can be compiled without its head."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.body = Model(embedding)
        self.lm_head, self.body.lm_head = self.body.lm_head, nn.Linear(8, 8, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(self.body(input_ids))
        return logits

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head


class Unshown(Model):
    """Its head is its embedding, and no step is told: the logits are made whole."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__(embedding)
        self.lm_head.weight = embedding.weight

    def get_output_embeddings(self) -> Any:
        return None


class Hooked(Deep):
    """Teaches its two last tokens alone, by a hook on the weight of its embedding."""

    def forward(self, input_ids: Tensor) -> Tensor:
        weight = self.body.embedding.weight
        if weight.requires_grad:
            rows = torch.zeros(len(weight), 1)
            rows[-2:] = 1
            weight.register_hook(lambda grad: grad * rows)
        return super().forward(input_ids)


class Scaled(nn.Embedding):
    """An embedding with a forward of its own, as Gemma has it."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return super().forward(input) * 2


class Final(nn.Embedding):
    """A class that refuses subclasses."""

    def __init_subclass__(cls) -> None:
        raise ValueError("final")


class Strict(Scaled):
    """A class whose objects let nobody set their class."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":
            raise AttributeError(name)
        super().__setattr__(name, value)


@attrs.frozen(kw_only=True)
class Doubled(LanguageModeling):
    """An objective whose loss is not the sum as it is, though it says so."""

    direct = True

    def __call__(self, model: nn.Module, batch: Any) -> tuple[Tensor, Metrics]:
        total, measured = super().__call__(model, batch)
        return 2 * total, measured


def _model(
    embedding: type[nn.Embedding] = nn.Embedding, *, kind: Any = Model, **options: Any
) -> nn.Module:
    with ft.keys.seeded(5):
        module: nn.Module = kind(embedding(zoo.VOCABULARY, 8, **options)).double()
        return module


def _found(
    objective: Any,
    module: nn.Module | Split,
    batches: list[Any],
    *,
    table: int,
    head: str = "auto",
    compile: bool = False,  # noqa: A002
) -> Gradients:
    """The gradients over micro-batches, with tables from so many bytes on summed directly.

    Of a module, which is taken apart, or of what `split` made of one.
    """
    if head != "auto":
        objective = attrs.evolve(objective, head=head)
    architecture, params, buffers = ft.split(module) if isinstance(module, nn.Module) else module
    classes = [type(each) for each in architecture.modules()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accumulators, "TABLE", table)
        patch.setattr(compilation, "BACKEND", "aot_eager")
        gradient = value_and_grad(objective, architecture, compile=compile)
        found = gradient(params, buffers, batches, key=3)
    assert accumulators.current() is None
    assert [type(each) for each in architecture.modules()] == classes
    assert not any(name in vars(m) for m in architecture.modules() for name in LENT)
    return found


def _grads(*given: Any, **options: Any) -> dict[str, Tensor]:
    return dict(_found(*given, **options).grads)


def _same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-11, atol=1e-13, msg=name)


def _case(stage: str, seed: int, params: Any) -> tuple[Any, list[Any]]:
    """An objective, and micro-batches of different lengths."""
    if stage == "pretrain":
        return LanguageModeling(), [zoo.batch(seed, 3, 9), zoo.batch(seed + 1, 2, 6)]
    reference = ft.trees.clone(params)
    if stage == "dpo":
        objective = PreferenceOptimization(reference=reference, loss={"sigmoid": 1, "sft": 0.3})
        return objective, [zoo.pairs(seed, 2, 9), zoo.pairs(seed + 2, 3, 7)]
    batches = []
    for index, examples in enumerate((4, 2)):
        sides = {
            "completion": zoo.batch(seed + index, examples),
            "mismatched": zoo.batch(seed + index + 5, examples),
        }
        batches.append({**sides, "desirable": torch.arange(examples) % 2 == 0})
    return UnpairedOptimization(reference=reference), batches


@functools.cache
def _decoder(tied: bool, biased: bool) -> Split:
    return ft.split(zoo.decoder(tied=tied, biased=biased).double())


@pytest.mark.parametrize("stage", ["pretrain", "dpo", "kto"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@settings(max_examples=settings().max_examples // 5)
@given(seed=st.integers(0, 1000))
def test_loss_and_gradients_are_those_of_dense_ones(
    stage: str, tied: bool, biased: bool, seed: int
) -> None:
    decoder = _decoder(tied, biased)
    objective, batches = _case(stage, seed, decoder[1])
    ours = _found(objective, decoder, batches, table=0)
    theirs = _found(objective, decoder, batches, table=NEVER, head="full")
    assert ("lm_head.bias" in ours.grads) is biased
    _same(dict(ours.grads), dict(theirs.grads))
    torch.testing.assert_close(ours.metrics["loss"], theirs.metrics["loss"], rtol=1e-11, atol=1e-13)


EMBEDDINGS: dict[str, Any] = {
    "plain": lambda kind: _model(kind=kind),
    "padded": lambda kind: _model(kind=kind, padding_idx=PADDING),
    "by frequency": lambda kind: _model(kind=kind, scale_grad_by_freq=True),
    "scaled": lambda kind: _model(Scaled, kind=kind),
    "final": lambda kind: _model(Final, kind=kind),
    "strict": lambda kind: _model(Strict, kind=kind),
    "hooked": lambda kind: _hooked(_model(kind=kind)),
    "frozen": lambda kind: _frozen(_model(kind=kind)),
    "tied to the unknown": lambda _: _model(kind=Unshown),
}


def _embedding(model: nn.Module) -> nn.Embedding:
    (found,) = (each for each in model.modules() if isinstance(each, nn.Embedding))
    return found


def _hooked(model: nn.Module) -> nn.Module:
    _embedding(model).register_forward_hook(lambda _m, _i, output: output * 3)
    return model


def _frozen(model: nn.Module) -> nn.Module:
    _embedding(model).weight.requires_grad_(False)
    return model


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows are added to tables, each time that some are."""
    counts: list[int] = []
    add = accumulators._add_rows

    def counted(into: Tensor, grad: Tensor, *rest: Any) -> None:
        counts.append(grad.flatten(0, -2).shape[0])
        add(into, grad, *rest)

    monkeypatch.setattr(accumulators, "_add_rows", counted)
    return counts


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("compile", [False, True])
def test_a_hook_on_a_tables_weight_is_told_of_its_gradient(
    tied: bool,
    compile: bool,  # noqa: A002
    added: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which is dense then. Compiled code would not call it, and a hook is refused there."""
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    architecture, params, buffers = ft.split(Hooked(nn.Embedding(zoo.VOCABULARY, 8)))
    if tied:
        architecture.lm_head.weight = architecture.body.embedding.weight
        params = Tensors({name: t for name, t in params.items() if name != "lm_head.weight"})
    gradient = value_and_grad(LanguageModeling(), architecture, compile=compile)
    batches = [zoo.batch(1), zoo.batch(2)]
    if compile:
        with pytest.raises(ConfigError, match=r"compile: an embedding's weight has a hook"):
            gradient(params, buffers, batches)
        return
    grads = gradient(params, buffers, batches).grads
    assert not added
    found = grads["body.embedding.weight"].any(1).nonzero().flatten().tolist()
    assert found == [zoo.VOCABULARY - 2, zoo.VOCABULARY - 1]


class Adapting(Deep):
    """Moves its hidden states by gradients of its own, of all that it has."""

    options: ClassVar[dict[str, bool]] = {"retain_graph": True}
    again = False

    def forward(self, input_ids: Tensor) -> Tensor:
        if self.again:
            found: Tensor = checkpoint(self._adapted, input_ids, use_reentrant=False)
            return found
        return self._adapted(input_ids)

    def _adapted(self, input_ids: Tensor) -> Tensor:
        hidden = self.body(input_ids)
        if torch.is_grad_enabled():
            # Nobody asks for the table's, and it is reached.
            torch.autograd.grad(hidden.sum(), [hidden], **self.options)
            params = list(self.parameters())
            inner = (hidden**2).sum()
            moved = torch.autograd.grad(inner, params, allow_unused=True, **self.options)
            table = dict(zip([n for n, _ in self.named_parameters()], moved, strict=True))
            hidden = hidden * (1 - 0.1 * table["body.embedding.weight"].sum(0).tanh())
        logits: Tensor = self.lm_head(hidden)
        return logits


class Grown(Adapting):
    """A model whose loss goes through its own gradients."""

    options: ClassVar[dict[str, bool]] = {"create_graph": True}


class Recomputed(Adapting):
    """Its forward runs again within the backward pass, and takes its gradients there again."""

    again = True


class Side(Adapting):
    """Takes the gradient of a table that its loss does not reach."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__(embedding)
        self.side = nn.Embedding(zoo.VOCABULARY, 8)

    def forward(self, input_ids: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            inner = (self.side(input_ids) ** 2).sum()
            assert torch.autograd.grad(inner, self.side.weight)[0].any()
        return super().forward(input_ids)


@pytest.mark.parametrize("kind", [Adapting, Grown, Recomputed, Side])
def test_gradients_that_a_forward_takes_itself_are_dense(kind: Any, added: list[int]) -> None:
    """And in no sum: the step's own backward pass alone adds rows."""
    batches = [zoo.batch(1, 3, 9), zoo.batch(2, 2, 6)]
    ours = _grads(LanguageModeling(), _model(kind=kind), batches, table=0)
    assert added == [27, 12]
    _same(ours, _grads(LanguageModeling(), _model(kind=kind), batches, table=NEVER, head="full"))


def test_compiled_code_refuses_gradients_that_a_forward_takes_itself() -> None:
    """What it is asked for has been compiled already, and has no dense one."""

    def found(**options: Any) -> dict[str, Tensor]:
        model = _model(kind=Adapting)
        return _grads(LanguageModeling(), model, [zoo.batch(1, 3, 9)], compile=True, **options)

    with pytest.raises(ConfigError, match=r"takes gradients of its own .* head='full'"):
        found(table=0)
    _same(
        found(table=NEVER, head="full"),
        _grads(LanguageModeling(), _model(kind=Adapting), [zoo.batch(1, 3, 9)], table=0),
    )


class Mapped(Deep):
    """Calls its body on one sequence after another."""

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(torch.vmap(self.body.embedding)(input_ids).cumsum(1))
        return logits


class MappedBody(Model):
    """The same in what is compiled."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return torch.vmap(self.embedding)(input_ids).cumsum(1)


class Within(Deep):
    """The same below a module that can be compiled without its head."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__(embedding)
        self.body = MappedBody(embedding)


# Torch's own, of tracing `torch.vmap` in any embedding (2.13).
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("kind", [Mapped, Within])
@pytest.mark.parametrize("compile", [False, True])
def test_an_embedding_in_a_transform_of_functions_is_left_alone(
    kind: Any,
    compile: bool,  # noqa: A002
) -> None:
    """Nothing of ours has a rule for `torch.vmap`."""
    batches = [zoo.batch(1, 3, 9), zoo.batch(2, 2, 6)]
    ours = _grads(LanguageModeling(), _model(kind=kind), batches, table=0, compile=compile)
    theirs = _grads(LanguageModeling(), _model(kind=kind), batches, table=NEVER, head="full")
    _same(ours, theirs)


DENSE = ("by frequency", "final", "frozen")


@pytest.mark.parametrize("name", sorted(EMBEDDINGS))
def test_every_kind_of_embedding(name: str, added: list[int]) -> None:
    """Below a class of its own too; one with options is left alone."""
    batches = [zoo.batch(1, 3, 9), zoo.batch(2, 2, 6)]
    batches[0]["input_ids"][:, 0] = PADDING
    ours = _grads(LanguageModeling(), EMBEDDINGS[name](Model), batches, table=0)
    assert added == ([] if name in DENSE else [27, 12])
    theirs = _grads(LanguageModeling(), EMBEDDINGS[name](Model), batches, table=NEVER, head="full")
    _same(ours, theirs)
    if name == "padded":
        assert not ours["embedding.weight"][PADDING].any()


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_every_kind_of_embedding_in_compiled_code(name: str, added: list[int]) -> None:
    """By the operator, in code that is compiled once for both micro-batches, or for each shape."""
    rows, time = (2, 6) if name in ("plain", "tied to the unknown") else (3, 9)
    batches = [zoo.batch(1, 3, 9), zoo.batch(2, rows, time)]
    batches[0]["input_ids"][:, 0] = PADDING
    ours = _grads(LanguageModeling(), EMBEDDINGS[name](Deep), batches, table=0, compile=True)
    assert added == ([] if name in DENSE else [27, rows * time])
    theirs = _grads(LanguageModeling(), EMBEDDINGS[name](Deep), batches, table=NEVER, head="full")
    _same(ours, theirs)
    if name == "padded":
        assert not ours["body.embedding.weight"][PADDING].any()


@pytest.mark.parametrize(("stage", "tied"), [("pretrain", True), ("dpo", False)])
def test_compiled_code_adds_the_rows_itself(stage: str, tied: bool, added: list[int]) -> None:
    """Also beside a reference, which is compiled without gradients."""

    def made() -> nn.Module:
        return zoo.decoder(tied=True, layers=1).double() if tied else _model(kind=Deep)

    module = made()
    params = {name: value.detach() for name, value in module.named_parameters()}
    objective, batches = _case(stage, 3, params)
    ours = _found(objective, module, batches, table=0, compile=True)
    assert len(added) == len(batches)
    theirs = _found(objective, made(), batches, table=NEVER, head="full")
    _same(dict(ours.grads), dict(theirs.grads))
    torch.testing.assert_close(ours.metrics["loss"], theirs.metrics["loss"], rtol=1e-11, atol=1e-13)


def test_an_embedding_that_trains_alone_in_compiled_code(added: list[int]) -> None:
    """Nothing else of what is compiled has a gradient that autograd asks for."""

    def found(**options: Any) -> dict[str, Tensor]:
        model = _model(kind=Deep)
        model.requires_grad_(False)
        _embedding(model).weight.requires_grad_()
        return _grads(
            LanguageModeling(), model, [zoo.batch(1, 3, 9), zoo.batch(2, 2, 6)], **options
        )

    ours = found(table=0, compile=True)
    assert added == [27, 12]
    assert list(ours) == ["body.embedding.weight"]
    _same(ours, found(table=NEVER, head="full"))


@attrs.frozen(kw_only=True)
class Elsewhere(LanguageModeling):
    """An objective that calls the model once more, on other values, with a gradient or without."""

    direct = True
    change: Any = None

    def __call__(self, model: nn.Module, batch: Any) -> tuple[Tensor, Metrics]:
        total, measured = super().__call__(model, batch)
        values = {name: self.change(value) for name, value in model.named_parameters()}
        logits = torch.func.functional_call(model, values, (batch["input_ids"],))
        return total + logits.sum(), measured


def test_compiled_code_adds_no_rows_of_another_weight(added: list[int]) -> None:
    batches = [zoo.batch(1, 3, 9)]

    def found(change: Any, **options: Any) -> dict[str, Tensor]:
        return _grads(Elsewhere(change=change), _model(kind=Deep), batches, **options)

    ours = found(Tensor.detach, table=0, compile=True)
    assert added == [27]
    _same(ours, found(Tensor.detach, table=NEVER, head="full"))
    with pytest.raises(ft.ConfigError, match=r"another weight than the state's .* direct = False"):
        found(lambda value: 2 * value, table=0, compile=True)


def test_a_compiled_backward_pass_has_dense_gradients(added: list[int]) -> None:
    """It would leave out an operator whose result nobody reads."""
    batches = [zoo.batch(1, 3, 9)]
    with torch._dynamo.config.patch(compiled_autograd=True):
        ours = _grads(LanguageModeling(), _model(kind=Deep), batches, table=0, compile=True)
    assert not added
    _same(ours, _grads(LanguageModeling(), _model(kind=Deep), batches, table=NEVER, head="full"))


def test_two_equal_calls_are_not_taken_for_one(added: list[int]) -> None:
    """Of a sum both have the same gradient, and a compiler would do alike things once."""

    class Again(Model):
        def forward(self, input_ids: Tensor) -> Tensor:
            found: Tensor = self.embedding(input_ids) + self.embedding(input_ids)
            return found

    class Twice(Deep):
        def __init__(self, embedding: nn.Embedding) -> None:
            super().__init__(embedding)
            self.body = Again(embedding)

    batches = [zoo.batch(1, 3, 9)]
    ours = _grads(LanguageModeling(), _model(kind=Twice), batches, table=0, compile=True)
    assert added == [27, 27]
    theirs = _grads(LanguageModeling(), _model(kind=Twice), batches, table=NEVER, head="full")
    _same(ours, theirs)


def test_two_tables_each_have_their_own_rows(added: list[int]) -> None:
    """In compiled code they are told apart by their places."""

    class Positions(Model):
        def __init__(self, embedding: nn.Embedding) -> None:
            super().__init__(embedding)
            self.positions = nn.Embedding(12, 8)

        def forward(self, input_ids: Tensor) -> Tensor:
            places = torch.arange(input_ids.shape[1]).expand_as(input_ids)
            found: Tensor = self.embedding(input_ids).cumsum(1) * self.positions(places)
            return found

    class Both(Deep):
        def __init__(self, embedding: nn.Embedding) -> None:
            super().__init__(embedding)
            self.body = Positions(embedding)

    batches = [zoo.batch(1, 3, 9), zoo.batch(2, 2, 6)]
    ours = _grads(LanguageModeling(), _model(kind=Both), batches, table=0, compile=True)
    assert sorted(added) == [12, 12, 27, 27]
    theirs = _grads(LanguageModeling(), _model(kind=Both), batches, table=NEVER, head="full")
    _same(ours, theirs)


@pytest.mark.parametrize("tied", [True, False])
def test_canonical_sums_are_a_tree_of_every_gradient(tied: bool) -> None:
    """Whatever its size: a table's own sum would have another order, and other bits."""
    architecture, params, buffers = ft.split(zoo.decoder(tied=tied))
    gradient = accumulate(value_and_grad(LanguageModeling(), architecture), 4, tree=True)
    prints = []
    for table in (0, NEVER):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(accumulators, "TABLE", table)
            grads = gradient(params, buffers, zoo.batch(1, 8)).grads
        prints.append({name: ft.trees.digest(grad) for name, grad in grads.items()})
    assert prints[0] == prints[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LanguageModeling, "direct", False)
        plain = accumulate(value_and_grad(LanguageModeling(), architecture), 4, tree=True)
        grads = plain(params, buffers, zoo.batch(1, 8)).grads
    assert {name: ft.trees.digest(grad) for name, grad in grads.items()} == prints[0]


def test_an_objective_that_changes_its_sum_is_told() -> None:
    batches = [zoo.batch(1)]
    with pytest.raises(ft.ConfigError, match=r"multiplied by .* give it direct = False"):
        _grads(Doubled(), _model(), batches, table=0)

    class Honest(Doubled):
        direct = False

    plain = _grads(LanguageModeling(), _model(), batches, table=0)
    ours = _grads(Honest(), _model(), batches, table=0)
    _same(ours, {name: 2 * grad for name, grad in plain.items()})


class Tables(TorchDispatchMode):
    """Counts the tensors of a shape that operations return in new memory."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.seen = shape, set[int]()
        self.kept: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        if isinstance(found, Tensor) and tuple(found.shape) == self.shape:
            at = found.untyped_storage().data_ptr()
            if at not in given and at not in self.seen:
                self.seen.add(at)
                self.kept.append(found)  # so that no other has its address
        return found


@pytest.mark.parametrize("stage", ["pretrain", "dpo"])
def test_one_dense_gradient_for_any_number_of_micro_batches(stage: str) -> None:
    """With an ordinary backward pass there are two for each: of the embedding, and of the head."""
    counts = {}
    for table in (0, NEVER):
        module = zoo.decoder(tied=True)
        params = {name: value.detach() for name, value in module.named_parameters()}
        objective, batches = _case(stage, 3, params)
        shape = tuple(params["model.embed_tokens.weight"].shape)
        with pytest.MonkeyPatch.context() as patch, Tables(shape) as tables:
            patch.setattr(type(objective), "direct", table == 0)
            _grads(objective, module, batches * 2, table=table)
        counts[table] = len(tables.seen)
    assert counts[NEVER] >= counts[0] + 7
    assert counts[0] <= 2  # the sum, and an architecture's empty slot


def test_nothing_is_left_behind_by_an_error() -> None:
    class Failing(Model):
        def forward(self, input_ids: Tensor) -> Tensor:
            if input_ids.shape[0] == 2:
                raise RuntimeError("on purpose")
            return super().forward(input_ids)

    module = Failing(nn.Embedding(zoo.VOCABULARY, 8))
    architecture, params, buffers = ft.split(module)
    gradient = value_and_grad(LanguageModeling(), architecture)
    classes = [type(each) for each in architecture.modules()]
    with pytest.raises(RuntimeError, match="on purpose"):
        gradient(params, buffers, [zoo.batch(1, 3), zoo.batch(2, 2)])
    assert accumulators.current() is None
    assert [type(each) for each in architecture.modules()] == classes
    assert not any(name in vars(m) for m in architecture.modules() for name in LENT)


@pytest.mark.parametrize("compile", [False, True])
def test_a_table_that_the_loss_does_not_reach_has_no_gradient(compile: bool) -> None:  # noqa: A002
    """What is looked up and then detached: a sum of zeros would decay it."""

    class Beside(Model):
        def __init__(self) -> None:
            super().__init__(nn.Embedding(zoo.VOCABULARY, 8))
            self.side = nn.Embedding(zoo.VOCABULARY, 8)

        def forward(self, input_ids: Tensor) -> Tensor:
            return super().forward(input_ids) + self.side(input_ids).sum().detach()

    class Whole(Beside):
        """Compiled with its head, which it does not show."""

        def get_output_embeddings(self) -> Any:
            return None

    model = Whole() if compile else Beside()
    batches = [zoo.batch(1, 2, 5)]
    grads = _grads(LanguageModeling(), model, batches, table=0, compile=compile)
    assert "embedding.weight" in grads
    assert "side.weight" not in grads
