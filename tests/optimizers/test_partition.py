"""Several optimizers at once: each trains its own parameters as it would alone."""

from __future__ import annotations

import pickle
import re
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import torch
import zoo
from torch import nn

import functrain as ft
from functrain import optim
from functrain.errors import ConfigError, StateError
from functrain.optimizers import is_elementwise
from functrain.trees import Tensors, digest


def _grads(params: Tensors, step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(p.shape, generator=generator) for name, p in params.items()}


def _run(optimizer: Any, params: Tensors, grads_of: Tensors, **options: Any) -> Any:
    state = optimizer.init(params)
    for step in range(10):
        grads = {n: g for n, g in _grads(grads_of, step).items() if n in params}
        params, state = optimizer.update(grads, state, params, 1e-2 / (step + 1), **options)
    return params, state


@pytest.mark.parametrize("donate", [False, True])
def test_muon_is_torchs_for_hidden_matrices_and_adamw_for_the_rest(donate: bool) -> None:
    module = zoo.model("decoder")
    hidden = {n for n, p in module.named_parameters() if optim.is_hidden_matrix(n, p)}
    params = ft.split(zoo.model("decoder"))[1]
    assert hidden
    assert hidden != set(params)
    named = dict(module.named_parameters())
    theirs = [
        torch.optim.Muon(
            [p for n, p in named.items() if n in hidden],
            weight_decay=0.1,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(
            [p for n, p in named.items() if n not in hidden], weight_decay=0.1, fused=True
        ),
    ]
    for step in range(10):
        for name, grad in _grads(params, step).items():
            named[name].grad = grad
        for each in theirs:
            each.param_groups[0]["lr"] = 1e-2 / (step + 1)
            each.step()
    ours, state = _run(optim.muon(), ft.trees.clone(params), params, donate=donate)
    assert all(torch.equal(ours[name], leaf) for name, leaf in named.items())
    assert state.kind == optim.muon().kind == "muon=Muon,others=adamw"
    assert state.slots.keys() == {
        "muon.momentum_buffer",
        "others.exp_avg",
        "others.exp_avg_sq",
        "others.step",
    }
    assert int(state.count) == 10


def test_a_part_does_as_it_would_alone() -> None:
    params = zoo.split("tied")[1]
    parts = [("slow", lambda n, _: n == "mix.weight", optim.sgd(momentum=0.9))]
    both, _ = _run(optim.partition([*parts, ("rest", optim.is_any, optim.adam())]), params, params)
    alone, _ = _run(optim.sgd(momentum=0.9), Tensors({"mix.weight": params["mix.weight"]}), params)
    others = Tensors({n: p for n, p in params.items() if n != "mix.weight"})
    rest, _ = _run(optim.adam(), others, params)
    for name, tensor in both.items():
        assert torch.equal(tensor, alone[name] if name == "mix.weight" else rest[name]), name


def test_nothing_is_applied_where_nothing_is_to_be() -> None:
    params = zoo.split("tied")[1]
    optimizer = optim.muon()
    params, state = _run(optimizer, params, params)
    before = [digest(t) for own in (params, *state.slots.values()) for t in own.values()]
    new, after = optimizer.update(
        _grads(params, 3), state, params, 1e-2, applied=torch.tensor(False)
    )
    assert [digest(t) for own in (new, *after.slots.values()) for t in own.values()] == before
    assert int(after.count) == int(state.count)


def test_a_part_without_a_gradient_stands_still() -> None:
    """All matrices frozen, say: the others are trained."""
    params = zoo.split("tied")[1]
    optimizer = optim.muon()
    grads = {n: g for n, g in _grads(params, 0).items() if n.startswith("norm.")}
    new, _ = optimizer.update(grads, optimizer.init(params), params, 1e-2)
    moved = {name for name, tensor in new.items() if not torch.equal(tensor, params[name])}
    assert moved == {"norm.weight", "norm.bias"}


@pytest.mark.parametrize(
    ("name", "hidden"),
    [
        ("model.layers.0.mlp.up_proj.weight", True),
        ("mix.weight", True),
        ("lm_head.weight", False),
        ("head.weight", False),
        ("transformer.wte.weight", False),
        ("transformer.wpe.weight", False),
        ("model.embed_tokens.weight", False),
        ("embedding.weight", False),
        ("output.weight", False),
        ("emb.weight", False),
        ("tok_emb.weight", False),
        ("token_emb.weight", False),
        ("pos_emb.weight", False),
        ("pos_emb", False),
        ("transformer.embd.weight", False),
        ("tok_embeddings.weight", False),
        ("shared.weight", False),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", False),
        ("unembed.weight", False),
        ("unembedding.weight", False),
        ("to_logits.weight", False),
        ("decoder.weight", False),
        ("cls.predictions.decoder.weight", False),
        ("fc_out.weight", False),
        ("proj_out.weight", False),
        ("generator.proj.weight", False),
        ("transformer.output_layer.weight", False),
        ("decoder.output_projection.weight", False),
        # In the numbered blocks what is called so is hidden.
        ("transformer.h.0.mlp.fc_out.weight", True),
        ("layers.0.attn.output_proj.weight", True),
        ("encoder.layer.0.attention.output.dense.weight", True),
        ("decoder.layers.0.fc1.weight", True),
        ("blocks.0.member.weight", True),
    ],
)
def test_hidden_matrices_are_known_by_their_names(name: str, hidden: bool) -> None:
    assert optim.is_hidden_matrix(name, torch.zeros(2, 2)) is hidden
    assert not optim.is_hidden_matrix(name, torch.zeros(2))


class Model(nn.Module):
    """Two embeddings, a block, and an output projection under names that say nothing."""

    def __init__(self, vocabulary: int = 31, width: int = 8, tied: bool = False) -> None:
        super().__init__()
        self.a = nn.Embedding(vocabulary, width)
        self.b = nn.Embedding(16, width)
        self.c = nn.ModuleList([nn.Linear(width, 16), nn.Linear(16, width)])
        self.d = nn.LayerNorm(width)
        self.e = nn.MultiheadAttention(width, 2)
        self.f = nn.Linear(width, vocabulary)
        self.g = nn.Parameter(torch.zeros(4, width))
        if tied:
            self.f.weight = self.a.weight


def _hidden(module: nn.Module) -> set[str]:
    where = optim.hidden_matrices(module)
    return {name for name, tensor in module.named_parameters() if where(name, tensor)}


@attrs.frozen
class Told:
    """An optimizer that notes whether it was told to apply its update."""

    seen: list[bool | None] = attrs.field(factory=list)
    lr: float = 1e-2
    kind: str = "told"

    def init(self, params: Any) -> Any:
        return optim.sgd().init(params)

    def update(self, grads: Any, state: Any, params: Any, *_: Any, **options: Any) -> Any:
        applied = options["applied"]
        self.seen.append(None if applied is None else bool(applied))
        return params, state


def test_a_part_is_told_what_the_whole_is() -> None:
    """An accelerator's kernels decide by it, each for itself."""
    told = Told()
    optimizer = optim.partition([("told", optim.is_any, told)])
    params = zoo.split("tied")[1]
    for applied in (None, torch.tensor(True)):
        optimizer.update({}, optimizer.init(params), params, 1e-2, applied=applied)
    assert told.seen == [None, True]


def test_what_updates_element_by_element_is_known_in_every_part() -> None:
    """Of some rows alone another kind would make another update."""
    rest = ("rest", optim.is_any, optim.sgd())
    assert is_elementwise(
        optim.partition([("hidden", optim.is_hidden_matrix, optim.adamw()), rest])
    )
    assert not is_elementwise(optim.muon())
    assert not is_elementwise(optim.partition([("all", optim.is_any, optim.adafactor())]))


HIDDEN = {"c.0.weight", "c.1.weight", "e.in_proj_weight", "e.out_proj.weight"}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("after_split", [False, True])
def test_hidden_matrices_are_known_by_the_architecture(tied: bool, after_split: bool) -> None:
    """Whatever the names; 16 is a number of positions and a width, so that no head is of it."""
    module = Model(tied=tied)
    assert _hidden(ft.split(module)[0] if after_split else module) == HIDDEN


def test_a_tied_weight_is_no_hidden_matrix_though_the_vocabulary_is_a_width() -> None:
    assert _hidden(Model(vocabulary=8, tied=True)) == HIDDEN


def test_where_the_vocabulary_is_a_width_the_name_tells_the_output_projection() -> None:
    module = Model(vocabulary=8)
    assert _hidden(module) == {"e.in_proj_weight"}  # 16 and 8 outputs might both be a head's
    named = Model(vocabulary=8)
    named.lm_head, named.f = named.f, nn.Identity()
    assert _hidden(named) == HIDDEN


@pytest.mark.parametrize("name", sorted(zoo.MODELS))
def test_name_and_architecture_agree_on_the_models_here(name: str) -> None:
    module = zoo.model(name)
    named = {n for n, p in module.named_parameters() if optim.is_hidden_matrix(n, p)}
    assert _hidden(module) == named


def test_muon_trains_what_it_is_told_is_hidden() -> None:
    architecture, params, _ = ft.split(Model())
    optimizer = optim.muon(hidden=optim.hidden_matrices(architecture))
    _, state = _run(optimizer, params, params)
    assert set(state.slots["muon.momentum_buffer"]) == HIDDEN
    assert set(state.slots["others.step"]) == params.keys() - HIDDEN


def test_adapters_of_hidden_matrices_are_hidden_and_the_heads_are_not() -> None:
    module = Model()
    targets = ("c.*", "f")
    adapted, adapters = ft.lora.attach(*ft.split(module)[:2], ft.lora.LoRA(rank=2, targets=targets))
    expected = {f"c.{i}.lora_{part}" for i in (0, 1) for part in "AB"}
    optimizer = optim.muon(hidden=optim.hidden_matrices(adapted))
    _, state = _run(optimizer, adapters, adapters)
    assert set(state.slots["muon.momentum_buffer"]) == expected
    assert set(state.slots["others.step"]) == {"f.lora_A", "f.lora_B"}


def test_so_are_those_of_layers_with_a_transposed_weight() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=31, n_embd=8, n_layer=1, n_head=2, n_positions=16)
    parts = ft.split(transformers.GPT2LMHeadModel(config))
    adapted, adapters = ft.lora.attach(*parts[:2], ft.lora.LoRA(rank=2))
    where = optim.hidden_matrices(adapted)
    assert adapters
    assert all(where(name, tensor) for name, tensor in adapters.items())


def test_a_name_that_the_architecture_has_not_is_refused() -> None:
    """It would be taken for no hidden matrix, and Muon would train nothing."""
    architecture, params, _ = ft.split(Model())
    _, adapters = ft.lora.attach(architecture, params, ft.lora.LoRA(rank=2, targets=("c.*",)))
    optimizer = optim.muon(hidden=optim.hidden_matrices(architecture))
    with pytest.raises(ConfigError, match=r"c.0.lora_A is no parameter of the Model"):
        optimizer.init(adapters)


def test_muon_refuses_names_that_tell_it_nothing() -> None:
    """Else it would train embedding and head as hidden matrices."""
    params = ft.split(Model())[1]
    message = (
        r"muon: none of the \d matrices is known by its name for an embedding or a head \(a.weight,"
        r" .*\); pass hidden=optim.hidden_matrices\(architecture\)"
    )
    with pytest.raises(ConfigError, match=message):
        optim.muon().init(params)
    told = optim.muon(hidden=optim.is_hidden_matrix).init(params)
    assert "a.weight" not in told.slots["others.step"]
    one = Tensors({name: params[name] for name in ("c.0.weight", "d.weight")})
    assert "others.step" in optim.muon().init(one).slots


def test_a_module_is_no_predicate_of_muon() -> None:
    with pytest.raises(ConfigError, match=r"expected hidden=optim.hidden_matrices\(module\)"):
        optim.muon(hidden=Model())
    with pytest.raises(ConfigError, match="'mlp', expected a predicate"):
        optim.muon(hidden="mlp")  # type: ignore[arg-type]


PARTS: list[tuple[Any, str]] = [
    (3, "partition: 3, expected (label, predicate, optimizer) for each part"),
    ([("a",)], "partition[0]: ('a',), expected (label, predicate, optimizer)"),
    ([(1, optim.is_any, optim.adamw())], "partition[0]: (1, "),
    ([optim.adamw()], "partition[0]: Adam("),
    ([("a", "bias", optim.adamw())], "partition[0]: 'bias', expected a predicate: lambda name, t"),
    ([("a", optim.is_any, optim.adamw)], "partition[0]: <function adamw"),
    ([("a", optim.is_any, SimpleNamespace(init=1, kind="a"))], "partition[0]: namespace(init=1"),
    ([("a", optim.is_any, None)], "partition[0]: None, expected an optimizer such as optim.adamw"),
]


@pytest.mark.parametrize(("parts", "message"), PARTS, ids=[message for _, message in PARTS])
def test_what_is_no_part_is_refused(parts: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        optim.partition(parts)


def test_a_partition_that_leaves_a_parameter_out_is_refused() -> None:
    part = optim.partition([("matrices", optim.is_hidden_matrix, optim.adamw())])
    with pytest.raises(ConfigError, match=r"0.bias: no part of the partition takes it"):
        part.init(ft.split(nn.Sequential(nn.Linear(2, 2)))[1])


def test_what_no_part_could_take_is_refused_before_any_part_is_updated() -> None:
    """The parts see their own gradients only, so the whole is looked at first."""
    params = ft.trees.clone(zoo.split("tied")[1])
    optimizer = optim.muon()
    state = optimizer.init(params)
    before = [digest(t) for t in params.values()]
    for name, shape in (("norm.weight", (1,)), ("mix.weight", (1, 16)), ("mix.wieght", (16, 16))):
        grads = {**_grads(params, 0), name: torch.ones(shape)}
        with pytest.raises(StateError, match=f"grads/{name}"):
            optimizer.update(grads, state, params, 1e-2, donate=True)
    assert [digest(t) for t in params.values()] == before
    with pytest.raises(StateError, match="made by adamw and given to muon=Muon,others=adamw"):
        optimizer.update({}, optim.adamw().init(params), params, 1e-2)


def test_what_the_last_part_refuses_is_said_before_the_first_is_written() -> None:
    """A moment of another shape, in a state that the partition itself has made."""
    params = ft.trees.clone(zoo.split("tied")[1])
    inner = [("hidden", optim.is_hidden_matrix, optim.sgd()), ("rest", optim.is_any, optim.adam())]
    parts = [
        ("norms", lambda n, _: n.startswith("norm."), optim.adamw()),
        ("others", optim.is_any, optim.partition(inner)),
    ]
    optimizer = optim.partition(parts)
    params, state = _run(optimizer, params, params, donate=True)
    moment = state.slots["others.rest.exp_avg"]
    short = Tensors({name: tensor[:1] for name, tensor in moment.items()})
    wrong = attrs.evolve(state, slots={**state.slots, "others.rest.exp_avg": short})
    before = [digest(t) for own in (params, *state.slots.values()) for t in own.values()]
    with pytest.raises(StateError, match=r"state/exp_avg/embedding.weight: shape"):
        optimizer.update(_grads(params, 3), wrong, params, 1e-2, donate=True)
    after = [digest(t) for own in (params, *state.slots.values()) for t in own.values()]
    assert after == before


@pytest.mark.parametrize("labels", [[], ["a", "a"], ["a.b"], ["a/b"]])
def test_labels_are_distinct_and_without_dots_or_slashes(labels: list[str]) -> None:
    parts = [(label, optim.is_any, optim.adamw()) for label in labels]
    with pytest.raises(ConfigError, match="labels must be distinct and without dots"):
        optim.partition(parts)


def test_a_label_may_begin_like_another() -> None:
    given_params = {"a": torch.randn(3, 2), "b": torch.randn(3)}
    parts = [
        ("m", lambda n, _: n == "a", optim.adam(1e-2)),
        ("mu", optim.is_any, optim.adam(1e-2)),
    ]
    optimizer = optim.partition(parts)
    state = first = optimizer.init(given_params)
    params: Any = given_params
    for _ in range(2):
        grads = {name: torch.full_like(p, 0.3) for name, p in given_params.items()}
        params, state = optimizer.update(grads, state, params, 1e-2)
    assert state.slots.keys() == first.slots.keys()
    assert {slot: set(t) for slot, t in state.slots.items()} == {
        slot: set(t) for slot, t in first.slots.items()
    }


def test_a_step_with_groups_can_be_pickled() -> None:
    architecture, params, buffers = zoo.split("tied")
    optimizer = optim.adamw(groups=[optim.no_decay(architecture)])
    step = ft.pretrain_step(architecture, optimizer)
    state = step.init(params, buffers)
    expected, _ = step(state, zoo.batch())
    again = pickle.loads(pickle.dumps(step))  # noqa: S301
    found, _ = again(state, zoo.batch())
    assert ft.fingerprint(found) == ft.fingerprint(expected)
