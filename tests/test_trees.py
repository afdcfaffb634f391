"""Mappings of tensors: sorted once, immutable, and measured by their bytes."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from functrain import norms, trees
from functrain.errors import ConsumedStateError, StateError
from functrain.trees import Tensors

NAMES = st.lists(st.text("abc.01", min_size=1, max_size=6), unique=True, max_size=8)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]


def _tensors(names: list[str]) -> dict[str, Tensor]:
    return {name: torch.tensor([float(i), 1.0]) for i, name in enumerate(names)}


@given(names=NAMES, data=st.data())
def test_the_order_is_that_of_the_names(names: list[str], data: Any) -> None:
    """Whatever order they came in, and however they came."""
    items = _tensors(names)
    shuffled = {name: items[name] for name in data.draw(st.permutations(names))}
    for made in (Tensors(shuffled), Tensors(shuffled.items()), trees.tensors(shuffled)):
        assert list(made) == list(made.keys()) == sorted(names)
        assert [name for name, _ in made.items()] == sorted(names)
        assert list(made.values()) == [items[name] for name in sorted(names)]
        assert len(made) == len(names)
    assert list(Tensors(shuffled, zz=torch.ones(1)))[-1] == "zz"


@given(names=NAMES.filter(bool), data=st.data())
def test_the_order_does_not_reach_the_bits_of_the_norm(names: list[str], data: Any) -> None:
    items = {
        n: torch.rand(5, generator=torch.Generator().manual_seed(i)) for i, n in enumerate(names)
    }
    shuffled = {name: items[name] for name in data.draw(st.permutations(names))}
    found = [trees.global_norm(Tensors(each)) for each in (items, shuffled)]
    assert torch.equal(*found)


LEAVES = st.tuples(
    st.sampled_from([(), (0,), (1,), (7,), (0, 3), (3, 0), (1, 5), (6, 5), (2, 5), (2, 3, 4)]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.complex64]),
    st.booleans(),
)


@pytest.mark.parametrize("small", [1 << 14, 8])
@given(kinds=st.lists(LEAVES, max_size=9), seed=st.integers(0, 1000))
def test_the_norms_of_rows_do_not_depend_on_what_is_beside(
    small: int, kinds: list[Any], seed: int
) -> None:
    """Together they have the bits that each has alone, in their order, turned ones too."""
    generator = torch.Generator().manual_seed(seed)
    leaves = []
    for shape, dtype, turned in kinds:
        leaf = torch.randn(shape, generator=generator).to(dtype)
        leaves.append(leaf.transpose(0, -1) if turned and leaf.ndim else leaf)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norms, "_SMALL", small)
        found = norms.row_norms(leaves)
        assert len(found) == len(leaves)
        for leaf, each in zip(leaves, found, strict=True):
            (alone,) = norms.row_norms([leaf])
            assert each.equal(alone)
            wide = leaf.flatten(1) if leaf.ndim > 1 else leaf.reshape(-1, 1)
            wide = torch.view_as_real(wide).flatten(1) if leaf.is_complex() else wide
            if leaf.ndim or not leaf.is_complex():
                expected = torch.linalg.vector_norm(wide.double(), dim=1)
                torch.testing.assert_close(each, expected, rtol=1e-14, atol=0.0)


def test_tensors_that_are_sorted_already_are_not_copied() -> None:
    made = Tensors(b=torch.ones(1), a=torch.ones(1))
    assert trees.tensors(made) is made


WRITES: list[Callable[[Any], Any]] = [
    lambda t: t.__setitem__("a", torch.ones(1)),
    lambda t: t.__delitem__("a"),
    lambda t: t.clear(),
    lambda t: t.pop("a"),
    lambda t: t.popitem(),
    lambda t: t.setdefault("b", torch.ones(1)),
    lambda t: t.update(b=torch.ones(1)),
    lambda t: t.__ior__({"b": torch.ones(1)}),
]


@pytest.mark.parametrize("write", WRITES)
def test_a_mapping_cannot_be_written(write: Callable[[Any], Any]) -> None:
    given_ = Tensors(a=torch.zeros(1))
    with pytest.raises(TypeError, match="Tensors is immutable; make a new one"):
        write(given_)
    assert list(given_) == ["a"]
    assert not given_["a"].any()


def test_a_mapping_serves_where_torch_wants_a_dict() -> None:
    """`load_state_dict` takes it as it is, and `functional_call` a copy; unions are plain."""
    module = nn.Linear(2, 2)
    values = Tensors({name: torch.ones_like(p) for name, p in module.named_parameters()})
    module.load_state_dict(values)
    assert all(bool(p.eq(1).all()) for p in module.parameters())
    outputs = torch.func.functional_call(module, dict(values), torch.ones(2))
    assert outputs.tolist() == [3.0, 3.0]
    for union in ({**values, "c": torch.ones(1)}, values | {"c": torch.ones(1)}):
        assert type(union) is dict
        assert union.keys() == {"weight", "bias", "c"}


def _pickled(items: Tensors) -> Any:
    return pickle.loads(pickle.dumps(items))  # noqa: S301


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, Tensors.copy, _pickled])
def test_copies_are_mappings_of_the_same_kind(copied: Callable[[Tensors], Tensors]) -> None:
    made = Tensors(b=torch.ones(2), a=torch.zeros(1))
    other = copied(made)
    assert type(other) is Tensors
    assert list(other) == ["a", "b"]
    assert all(torch.equal(other[name], made[name]) for name in made)


READS: list[Callable[[Any], Any]] = [
    lambda t: t["a"],
    lambda t: t.get("a"),
    lambda t: "a" in t,
    lambda t: len(t),
    lambda t: list(t),
    lambda t: iter(t),
    lambda t: t.keys(),
    lambda t: t.values(),
    lambda t: t.items(),
    lambda t: dict(t),
    lambda t: {**t},
    lambda t: sorted(t),
    lambda t: bool(t),
    lambda t: t | {},
    lambda t: {} | t,
    lambda t: t.copy(),
    lambda t: t == {},
    lambda t: list(reversed(t)),
    lambda t: copy.deepcopy(t),
    lambda t: pickle.dumps(t),
    lambda t: trees.clone(t),
    lambda t: trees.global_norm(t),
]


@pytest.mark.parametrize("read", READS)
def test_a_consumed_mapping_refuses_every_access(read: Callable[[Any], Any]) -> None:
    """By name of who consumed it; only its text can still be seen, for error messages."""
    given_ = Tensors(a=torch.ones(1))
    given_.consume("the step that made step 3")
    with pytest.raises(ConsumedStateError, match="donated to the step that made step 3"):
        read(given_)
    assert repr(given_) == "Tensors(consumed by the step that made step 3)"


def test_a_view_taken_before_refuses_too_or_is_empty() -> None:
    given_ = Tensors(a=torch.ones(1))
    view = given_.values()
    given_.consume("a step")
    assert list(view) == []


def test_an_unknown_name_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="b"):
        Tensors(a=torch.ones(1))["b"]
    assert Tensors(a=torch.ones(1)).get("b", 3) == 3


def test_the_text_says_what_is_there() -> None:
    made = Tensors(b=torch.ones(2, 3), a=torch.tensor(1))
    assert repr(made) == "Tensors(a: int64[], b: float32[2, 3])"


def test_a_clone_has_memory_of_its_own_and_no_history() -> None:
    source = torch.ones(3, requires_grad=True)
    cloned = trees.clone({"b": source * 2, "a": source})
    assert list(cloned) == ["a", "b"]
    assert not any(t.requires_grad for t in cloned.values())
    cloned["a"].zero_()
    assert source.tolist() == [1.0, 1.0, 1.0]


def test_leaves_are_mapped_under_their_names() -> None:
    doubled = trees.map_leaves(lambda t: t * 2, {"b": torch.ones(1), "a": torch.zeros(1)})
    assert {name: float(t) for name, t in doubled.items()} == {"a": 0.0, "b": 2.0}


LORA = Tensors(
    {
        "layers.0.lora_A": torch.ones(2),
        "layers.0.lora_B": torch.ones(2),
        "layers.1.lora_B": torch.ones(2),
        "layers.1.weight": torch.ones(2),
    }
)


def test_tensors_are_selected_by_patterns() -> None:
    assert list(trees.select(LORA, "*.lora_B")) == ["layers.0.lora_B", "layers.1.lora_B"]
    assert list(trees.select(LORA, "*.weight", "layers.0.*")) == [
        "layers.0.lora_A",
        "layers.0.lora_B",
        "layers.1.weight",
    ]
    assert trees.select(LORA, "*_B")["layers.0.lora_B"] is LORA["layers.0.lora_B"]


def test_tensors_are_zeroed_by_patterns() -> None:
    zeroed = trees.zero(LORA, "*.lora_B")
    assert {name: bool(t.any()) for name, t in zeroed.items()} == {
        name: "lora_B" not in name for name in LORA
    }
    assert LORA["layers.0.lora_B"].all()


@pytest.mark.parametrize("function", [trees.select, trees.zero])
def test_a_pattern_without_a_match_is_refused(function: Any) -> None:
    """Or a misspelt one would silently train, or keep, everything."""
    with pytest.raises(StateError, match=r"no tensor matches 'layers.1.wieght'; did you mean"):
        function(LORA, "*.lora_B", "layers.1.wieght")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_digest_is_of_dtype_shape_and_bytes(dtype: torch.dtype) -> None:
    tensor = torch.tensor([[1, 0, 1], [1, 1, 0]]).to(dtype)
    digest = trees.digest(tensor)
    assert digest == trees.digest(tensor.clone())
    assert digest == trees.digest(tensor.t().contiguous().t()), "strides are no part of the value"
    others = [tensor.reshape(3, 2), tensor.reshape(6), tensor[:1], tensor.t()]
    others += [tensor.to(other) for other in DTYPES if other != dtype]
    changed = tensor.clone()
    changed[1, 2] = 1
    digests = {trees.digest(other) for other in [*others, changed]}
    assert len(digests) == len(others) + 1
    assert digest not in digests


def test_a_digest_tells_what_equality_does_not() -> None:
    """0.0 from −0.0, the same bytes in another dtype, and one NaN is itself."""
    dtypes = (torch.float16, torch.bfloat16, torch.int16)
    assert len({trees.digest(torch.zeros(2, dtype=dtype)) for dtype in dtypes}) == 3
    assert trees.digest(torch.tensor(0.0)) != trees.digest(torch.tensor(-0.0))
    assert trees.digest(torch.tensor(math.nan)) == trees.digest(torch.tensor(math.nan))
    assert trees.digest(torch.zeros(0)) != trees.digest(torch.zeros(0, 2))
    whirled = torch.tensor([1 + 2j, 3 - 4j])
    assert trees.digest(whirled.conj()) == trees.digest(torch.tensor([1 - 2j, 3 + 4j]))
    assert trees.digest(whirled.conj().imag) == trees.digest(torch.tensor([-2.0, 4.0]))
    assert trees.digest(whirled[:1].conj().imag) == trees.digest(torch.tensor([-2.0]))


def test_what_is_in_order_is_left_and_what_is_not_is_copied() -> None:
    matrix = torch.arange(6.0).view(2, 3)
    for already in (matrix, matrix[:1], torch.zeros(()), torch.zeros(0, 3)):
        assert trees.in_order(already) is already
    conjugate = torch.tensor([1 + 2j, 3 - 1j]).conj()
    for other in (matrix.t(), matrix[:, ::2], torch.ones(1).expand(4), conjugate, conjugate.imag):
        found = trees.in_order(other)
        assert found.is_contiguous()
        assert not found.is_conj()
        assert not found.is_neg()
        assert torch.equal(found, other)
        assert trees.digest(found)
    sparse = matrix.to_sparse()
    assert trees.in_order(sparse) is sparse


def test_storages_are_shared_by_views_and_not_by_clones() -> None:
    base = torch.ones(4)
    shared = trees.storages({"whole": base, "view": base[2:]})
    assert len(shared) == 1
    assert not trees.storages({"a": base}).keys() & trees.storages({"b": base.clone()}).keys()
