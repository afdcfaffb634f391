"""A module without its weights, and the context in which it has them again."""

from __future__ import annotations

import copy
import functools
import re
import sys
import types
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import functrain as ft
from functrain import architecture as binding
from functrain.descriptions import vocabulary_of
from functrain.errors import ArchitectureError, ConfigError, FunctrainWarning
from functrain.reachable import beside_slots
from functrain.trees import Tensors

EVERY = pytest.mark.parametrize("name", sorted(zoo.MODELS))


class Shared(nn.Module):
    """One submodule on two paths, as a weight-sharing transformer has."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.middle = nn.Sequential(nn.Linear(3, 3), self.first)
        self.last = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x)))


class Assigning(nn.Module):
    """Assigns its buffer anew at each forward, and updates another in place."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("seen", torch.zeros(2))
        self.register_buffer("absent", None)

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        self.seen += x.detach()
        return self.weight * x * self.calls


def _outputs(module: nn.Module, training: bool = False) -> Any:
    with torch.no_grad():
        outputs = module.train(training)(zoo.batch()["input_ids"])
    return outputs["logits"] if isinstance(outputs, dict) else outputs


@EVERY
def test_split_takes_the_tensors_themselves(name: str) -> None:
    """By their own names, sorted, not copied, without a history; nothing is left behind."""
    module = zoo.model(name)
    params, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    architecture, taken, left = ft.split(module)
    assert architecture is module
    assert list(taken) == sorted(params)
    assert list(left) == sorted(buffers)
    for items, own in ((taken, params), (left, buffers)):
        for key, tensor in items.items():
            assert tensor.data_ptr() == own[key].data_ptr()
            assert not tensor.requires_grad
    every = [*architecture.parameters(), *architecture.buffers()]
    assert {t.device.type for t in every} == {"meta"}
    assert [p.shape for p in architecture.parameters()] == [p.shape for p in params.values()]


def test_what_is_not_contiguous_is_copied_as_a_checkpoint_reads_it() -> None:
    module = nn.Linear(3, 2)
    module.weight = nn.Parameter(torch.arange(6.0).view(3, 2).t())
    module.register_buffer("rows", torch.ones(1).expand(4))
    module.register_buffer("frequencies", torch.tensor([1 + 2j]).conj())
    _, params, buffers = ft.split(module)
    assert params["weight"].tolist() == [[0, 2, 4], [1, 3, 5]]
    assert all(t.is_contiguous() and not t.is_conj() for t in (*params.values(), *buffers.values()))
    assert buffers["frequencies"].tolist() == [1 - 2j]


@EVERY
def test_bound_the_architecture_is_the_module(name: str) -> None:
    """The same outputs, bit for bit; afterwards it has no weights again."""
    expected = _outputs(zoo.model(name).eval())
    architecture, params, buffers = zoo.split(name)
    slots = [id(p) for p in architecture.parameters()]
    with ft.bound(architecture, params, buffers, "eval") as model, torch.no_grad():
        assert model is architecture
        outputs = model(zoo.batch()["input_ids"])
    outputs = outputs["logits"] if isinstance(outputs, dict) else outputs
    assert torch.equal(outputs, expected)
    assert [id(p) for p in architecture.parameters()] == slots


def test_a_tied_parameter_has_one_name_and_both_slots() -> None:
    architecture, params, _ = ft.split(zoo.Tied())
    assert "embedding.weight" in params
    assert "head.weight" not in params
    assert architecture.head.weight is architecture.embedding.weight, "still tied on meta"
    with ft.bound(architecture, params, {"scale": torch.ones(1)}):
        assert architecture.head.weight is params["embedding.weight"]
        assert architecture.embedding.weight is params["embedding.weight"]


def test_a_shared_submodule_has_one_name_and_one_set_of_values() -> None:
    module = Shared()
    expected = module(torch.ones(3))
    architecture, params, buffers = ft.split(module)
    assert list(params) == ["first.bias", "first.weight", "middle.0.bias", "middle.0.weight"]
    with ft.bound(architecture, params, buffers):
        assert torch.equal(architecture(torch.ones(3)), expected)
    other = {name: torch.zeros_like(p) for name, p in params.items()}
    with ft.bound(architecture, other, buffers):
        assert not architecture(torch.ones(3)).any()
    assert architecture.last is architecture.first
    assert architecture.first.weight.device.type == "meta"


@pytest.mark.parametrize("make", [zoo.Tied, zoo.decoder], ids=["tied", "decoder"])
def test_buffers_that_are_not_persistent_are_kept(make: Callable[[], nn.Module]) -> None:
    """They are in no `state_dict`, and the forward needs them."""
    module = make()
    absent = {n for n, _ in module.named_buffers()} - set(module.state_dict())
    _, _, buffers = ft.split(module)
    assert absent
    assert absent <= set(buffers)


def test_a_module_without_weights_is_refused() -> None:
    """One that was split already, or was made on the meta device."""
    architecture, _, _ = zoo.split("tied")
    with pytest.raises(ArchitectureError, match=r"embedding.weight: on the meta device.*already"):
        ft.split(architecture)
    with torch.device("meta"):
        empty = nn.Linear(2, 2)
    with pytest.raises(ArchitectureError, match="on the meta device"):
        ft.split(empty)


@pytest.mark.parametrize("part", [slice(None), slice(1), slice(1, None)], ids=str)
@pytest.mark.parametrize("by", ["torch", "numpy"])
def test_parameters_over_one_memory_are_refused(part: slice, by: str) -> None:
    """Wherever they begin; numpy's parts are storages of their own over it."""
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
    weight = module[0].weight.detach()
    if by == "numpy":
        module[1].weight = nn.Parameter(torch.from_numpy(weight.numpy()[part]))
    else:
        module[1].weight = nn.Parameter(weight[part])
    with pytest.raises(
        ArchitectureError, match=r"(0|1).weight and (1|0).weight are different para"
    ):
        ft.split(module)


@given(
    rows=st.tuples(st.integers(0, 5), st.integers(1, 5), st.integers(1, 3)),
    columns=st.tuples(st.integers(0, 5), st.integers(1, 5), st.integers(1, 3)),
)
def test_only_parameters_with_an_element_in_common_are_refused(
    rows: tuple[int, int, int], columns: tuple[int, int, int]
) -> None:
    """Columns that lie between those of another have none."""
    whole = torch.randn(6, 6)
    part = whole[slice(*rows), slice(*columns)]
    counted = torch.arange(36).view(6, 6)
    beside = set(counted[:, 2:5:2].flatten().tolist())
    module = nn.Module()
    module.one = nn.Parameter(whole[:, 2:5:2])
    module.other = nn.Parameter(part)
    if beside & set(counted[slice(*rows), slice(*columns)].flatten().tolist()):
        with pytest.raises(ArchitectureError, match="are different parameters"):
            ft.split(module)
    else:
        assert list(ft.split(module)[1]) == ["one", "other"]


def test_a_refused_module_keeps_its_weights() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[1].weight = nn.Parameter(module[0].weight.detach())
    with pytest.raises(ArchitectureError):
        ft.split(module)
    assert {p.device.type for p in module.parameters()} == {"cpu"}


def test_a_module_with_a_tensor_that_cannot_be_emptied_keeps_its_weights() -> None:
    module = nn.Linear(2, 2)
    module.register_buffer("packed", torch.ones(3, 3).to_mkldnn())
    with pytest.raises(ArchitectureError, match=r"^packed: a tensor that has no form without val"):
        ft.split(module)
    assert module.weight.device.type == "cpu"
    del module.packed
    assert list(ft.split(module)[1]) == ["bias", "weight"]


def test_parts_of_one_flat_storage_are_not_refused() -> None:
    """Views that do not overlap, as a flat buffer's."""
    flat = torch.randn(12)
    module = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False))
    module[0].weight = nn.Parameter(flat[:6].view(3, 2))
    module[1].weight = nn.Parameter(flat[6:].view(2, 3))
    assert list(ft.split(module)[1]) == ["0.weight", "1.weight"]


@pytest.mark.parametrize("part", [slice(None), slice(1, 2), slice(1, None)])
def test_a_buffer_over_a_parameters_memory_is_refused(part: slice) -> None:
    """Whole or in part: after a step it would have the old values."""
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[1].register_buffer("shown", module[0].weight.detach()[part].t())
    message = r"1.shown is a buffer over the memory of the parameter 0.weight, .*; use the param"
    with pytest.raises(ArchitectureError, match=message):
        ft.split(module)
    assert {p.device.type for p in module.parameters()} == {"cpu"}
    module[1].shown = module[1].shown.clone()
    assert list(ft.split(module)[2]) == ["1.shown"]


def test_a_buffer_beside_a_parameter_or_without_memory_is_not_refused() -> None:
    flat = torch.randn(10)
    module = nn.Linear(2, 3, bias=False)
    module.weight = nn.Parameter(flat[:6].view(3, 2))
    module.register_buffer("after", flat[6:])
    module.register_buffer("empty", flat[2:2])
    module.register_buffer("sparse", torch.eye(3).to_sparse())
    assert list(ft.split(module)[2]) == ["after", "empty", "sparse"]


@pytest.mark.parametrize("persistent", [True, False])
def test_buffers_over_one_memory_are_told(persistent: bool) -> None:
    """What is written to one would not be in the other; the same tensor twice is one buffer."""
    module, queue = nn.Linear(2, 2), torch.zeros(4, 2)
    module.register_buffer("queue", queue)
    module.register_buffer("again", queue)
    module.register_buffer("angles", torch.ones(4), persistent=False)
    module.register_buffer("few", module.angles[:2], persistent=False)
    ft.split(copy.deepcopy(module))
    module.register_buffer("last", queue[3], persistent=persistent)
    message = r"^(last and queue|queue and last) are buffers over the same memory"
    with pytest.warns(FunctrainWarning, match=message):
        assert set(ft.split(module)[2]) == {"queue", "angles", "few", "last"}


def _interrupted_restoring(at: int, call: Callable[[], object]) -> bool:
    """Ctrl-C at a line of what puts a binding's slots back, once; whether it came to that line."""
    seen = 0

    def trace(frame: types.FrameType, event: str, _: Any) -> Any:
        nonlocal seen
        own = frame.f_code.co_name == "restore" and frame.f_code.co_filename == binding.__file__
        if own and event == "line":
            seen += 1
            if seen == at:
                raise KeyboardInterrupt
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(previous)
    return False


def test_a_binding_that_is_interrupted_as_it_ends_leaves_nothing() -> None:
    """A step that is made afterwards would take what is left for what does not train."""
    architecture, params, buffers = zoo.split("decoder")
    trained = architecture.training

    def called() -> None:
        with ft.bound(architecture, params, buffers, "eval" if trained else "train"):
            pass

    at = 1
    while _interrupted_restoring(at, called):
        assert all(p.is_meta and p.requires_grad for p in architecture.parameters()), at
        assert all(b.is_meta for b in architecture.buffers()), at
        assert all(each.training is trained for each in architecture.modules()), at
        at += 1
    assert at > len(params)


class Counted(nn.Linear):
    """Keeps a number beside its tensors, in its state_dict alone."""

    def get_extra_state(self) -> int:
        """The number."""
        return 3


@pytest.mark.parametrize("count", [0, 1, 3])
def test_an_extra_state_is_told(count: int) -> None:
    layers = [Counted(2, 2) for _ in range(count)]
    module = nn.Sequential(nn.Linear(2, 2), *layers) if count else Counted(2, 2)
    where = ["Counted", "1", "", "1 and 2 more"][count]
    with pytest.warns(FunctrainWarning, match=f"^{where}: with a get_extra_state, .* nei") as told:
        ft.split(module)
    assert len(told) == 1


@pytest.mark.parametrize(
    "kept",
    [
        lambda weight: weight.view(-1),
        lambda weight: functools.partial(nn.functional.linear, weight=weight),
        lambda weight: {"heads": [(weight.detach()[1:], None)]},
    ],
    ids=["a view", "a partial", "within a mapping"],
)
@pytest.mark.parametrize("at", ["kept", "0.kept"])
def test_a_parameter_in_an_attribute_is_told(kept: Callable[[Tensor], Any], at: str) -> None:
    """A forward that reads it there would read the old values."""
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    owner = module if at == "kept" else module[0]
    owner.kept = kept(module[1].weight)
    other = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    (other if at == "kept" else other[0]).kept = kept(module[1].weight.detach().clone())
    ft.split(other)
    message = rf"^{re.escape(at)} holds the parameter 1\.weight beside its slot: .* take the param"
    with pytest.warns(FunctrainWarning, match=message) as told:
        ft.split(module)
    assert told[0].filename == __file__


def test_a_frozen_parameter_in_an_attribute_is_not_told() -> None:
    """Nobody trains it, so it has no other values."""
    module = nn.Linear(2, 2).requires_grad_(False)
    module.kept = [module.weight, torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged)]
    assert list(ft.split(module)[1]) == ["bias", "weight"]


@attrs.define
class Projection:
    """A plain object, its weight in a slot; to ask for its size is to run code of its own."""

    weight: Tensor

    @property
    def size(self) -> int:
        raise AssertionError

    def __iter__(self) -> Any:
        raise AssertionError


def _tied(weight: Tensor) -> nn.Module:
    found = nn.Sequential(nn.Linear(2, 2, bias=False))
    found[0].weight = weight  # type: ignore[assignment]
    return found


@pytest.mark.parametrize(
    "kept",
    [
        lambda weight: lambda h: h @ weight.t(),
        lambda weight: weight.matmul,
        lambda weight: Projection(weight),
        lambda weight: Projection(weight).__iter__,
        lambda weight: types.SimpleNamespace(head={"weight": weight}),
        lambda weight: [_tied(weight)],
    ],
    ids=["a closure", "a method", "an object", "an object's method", "a namespace", "a module"],
)
def test_a_parameter_or_buffer_that_an_attribute_leads_to_is_told(
    kept: Callable[[Tensor], Any],
) -> None:
    """However it is hidden; what is over no tensor of the module's is not."""
    module = nn.BatchNorm1d(2)
    module.weight = nn.Parameter(torch.eye(2))
    module.register_buffer("seen", torch.eye(2))
    module.others = kept(nn.Parameter(torch.eye(2)))
    module.itself = module.forward
    assert list(beside_slots(module))
    ft.split(copy.deepcopy(module))
    for name in ("weight", "seen"):
        made = copy.deepcopy(module)
        held = getattr(made, name)
        made.others = kept(held if name == "weight" else nn.Parameter(held))
        with pytest.warns(FunctrainWarning, match=f"^others holds the .* {name} beside its slot"):
            ft.split(made)


def test_a_parameter_that_a_hook_closes_over_is_told() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    weight = module[0].weight
    module[1].register_forward_hook(lambda _module, args, _output: args[0] @ weight.t())
    message = r"^1\._forward_hooks holds the parameter 0\.weight beside its slot"
    with pytest.warns(FunctrainWarning, match=message):
        ft.split(module)


def test_what_of_attributes_is_no_reason() -> None:
    """A frozen parameter, a buffer that a module computes for itself, and what holds itself."""
    module = nn.Linear(2, 2)
    module.weight.requires_grad_(False)
    module.register_buffer("angles", torch.ones(2), persistent=False)
    module.kept = [module.weight, module.angles]
    module.kept.append(module.kept)
    ft.split(module)


@pytest.mark.filterwarnings("ignore:.*parametrizations.*:FutureWarning")
def test_what_is_made_anew_of_the_slots_is_no_reason() -> None:
    """A recurrent layer's own list, and what a spectral norm computes before each forward."""
    ft.split(torch.nn.utils.spectral_norm(nn.Linear(2, 3)))
    architecture, params, buffers = ft.split(nn.LSTM(2, 3))
    changed = {name: torch.zeros_like(tensor) for name, tensor in params.items()}
    with ft.bound(architecture, changed, buffers) as model:
        outputs, _ = model(torch.ones(4, 2))
    assert not outputs.any()


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_hook_on_a_parameters_gradient_is_refused(register: str) -> None:
    """No step would call it; without it the module is split as ever."""
    module = nn.Linear(2, 3)
    handle = getattr(module.weight, register)(lambda grad: None)
    with pytest.raises(ArchitectureError, match=r"^weight: it has a hook .* transform=lambda"):
        ft.split(module)
    assert module.weight.device.type == "cpu"
    handle.remove()
    assert list(ft.split(module)[1]) == ["bias", "weight"]


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("layer", [lambda: nn.LazyLinear(3), nn.LazyBatchNorm1d])
def test_a_module_whose_shapes_are_not_known_yet_is_refused(layer: Callable[[], Any]) -> None:
    module = nn.Sequential(layer())
    message = r"^0\.weight: it has no shape before the module's first call; call the module once"
    with pytest.raises(ArchitectureError, match=message):
        ft.split(module)
    module(torch.ones(4, 2))
    assert "0.weight" in ft.split(module)[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: {**p, "mix.wieght": p["mix.weight"]}, r"unexpected 'mix.wieght' \(did you mean"),
        (lambda p: {n: t for n, t in p.items() if n != "mix.bias"}, "params: missing 'mix.bias';"),
        (
            lambda p: {("head.weight" if "emb" in n else n): t for n, t in p.items()},
            r"missing 'embedding.weight'; unexpected 'head.weight'",
        ),
        (lambda p: {}, r"missing 'embedding.weight', 'mix.bias', 'mix.weight' and 2 more"),
    ],
)
def test_values_of_another_architecture_are_refused(change: Any, message: str) -> None:
    """Naming what is missing and what is too much, and the nearest name."""
    architecture, params, buffers = zoo.split("tied")
    with (
        pytest.raises(ArchitectureError, match=message),
        ft.bound(architecture, change(params), buffers),
    ):
        raise AssertionError("bound all the same")


def test_buffers_of_another_architecture_are_refused() -> None:
    architecture, params, _ = zoo.split("tied")
    with (
        pytest.raises(ArchitectureError, match="buffers: missing 'scale'"),
        ft.bound(architecture, params, {}),
    ):
        raise AssertionError("bound all the same")


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_mode_is_set_within_and_put_back_after(mode: Any) -> None:
    """For each module its own."""
    architecture, params, buffers = zoo.split("normed")
    architecture.train()
    architecture.norm.eval()
    with ft.bound(architecture, params, buffers, mode):
        assert {m.training for m in architecture.modules()} == {mode == "train"}
    assert architecture.training
    assert not architecture.norm.training


def test_bindings_nest() -> None:
    """The inner values within, the outer ones again after, and none at the end."""
    architecture, params, buffers = zoo.split("tied")
    other = {name: torch.zeros_like(p) for name, p in params.items()}
    with ft.bound(architecture, params, buffers, "train"):
        with ft.bound(architecture, other, buffers, "eval"):
            assert not architecture.mix.weight.any()
            assert not architecture.training
        assert architecture.mix.weight is params["mix.weight"]
        assert architecture.training
    assert architecture.mix.weight.device.type == "meta"


def test_buffers_are_found_whether_assigned_anew_or_updated_in_place() -> None:
    architecture, params, buffers = ft.split(Assigning())
    places = binding.slots(architecture)
    given = Tensors({name: buffer.clone() for name, buffer in buffers.items()})
    with ft.bound(architecture, params, given):
        architecture(torch.ones(2))
        architecture(torch.ones(2))
        after = binding.bound_buffers(places)
    assert after["calls"] is not given["calls"]
    assert (float(after["calls"]), after["seen"].tolist()) == (2.0, [2.0, 2.0])
    assert architecture.calls.device.type == "meta"
    assert "absent" not in buffers


class Making(nn.Module):
    """Makes a buffer, and counts its calls in an attribute."""

    def __init__(self, persistent: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(zoo.VOCABULARY, zoo.VOCABULARY)
        self.register_buffer("mask", None, persistent=persistent)
        self.calls = 0

    def forward(self, input_ids: Tensor) -> Tensor:
        self.calls += 1
        if self.mask is None:
            self.mask = torch.ones(input_ids.shape[1], 1)
        return self.embed(input_ids) * self.mask


def test_a_mask_that_the_first_call_makes_is_made_anew_and_a_trial_leaves_no_trace() -> None:
    """A state has no such buffer; and of the calls, those of the trials are not seen."""
    architecture, params, buffers = ft.split(Making(persistent=False))
    step = ft.pretrain_step(architecture, ft.optim.sgd(0.1))
    state, _ = step(step.init(params, buffers), zoo.batch())
    assert architecture.calls == 1
    assert architecture.mask is None
    ft.evaluate(attrs.evolve(step, max_grad_norm=0.5), state, [zoo.batch()])
    assert architecture.calls == 2


def test_a_persistent_buffer_that_the_forward_makes_is_refused() -> None:
    architecture, params, buffers = ft.split(Making(persistent=True))
    step = ft.pretrain_step(architecture, ft.optim.sgd(0.1))
    with pytest.raises(ArchitectureError, match=r"made 'mask', registered as None.* full size"):
        step(step.init(params, buffers), zoo.batch())
    assert architecture.mask is None


class Counter(Assigning):
    """A language model around it."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Embedding(zoo.VOCABULARY, zoo.VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        super().forward(torch.ones(2))
        return self.head(input_ids)


def test_a_step_returns_the_buffers_that_the_forward_left() -> None:
    """Assigned anew and updated in place, over all micro-batches; the given ones are untouched."""
    architecture, params, buffers = ft.split(Counter())
    step = ft.pretrain_step(architecture, ft.optim.adamw(), microbatches=2)
    first = step.init(params, buffers)
    second, _ = step(first, zoo.batch(0))
    third, _ = step(second, zoo.batch(1))
    for state, calls in ((first, 0.0), (second, 2.0), (third, 4.0)):
        assert float(state.buffers["calls"]) == calls
        assert state.buffers["seen"].tolist() == [calls, calls]


def test_batchnorms_statistics_move_in_training_and_stand_in_evaluation() -> None:
    """Its kernel writes them without a trace in the tensors' versions."""
    architecture, params, buffers = zoo.split("normed")
    step = ft.pretrain_step(architecture, ft.optim.adamw(), microbatches=2)
    first = step.init(params, buffers)
    after, _ = step(first, zoo.batch())
    assert not torch.equal(after.buffers["norm.running_mean"], buffers["norm.running_mean"])
    assert not torch.equal(after.buffers["norm.running_var"], buffers["norm.running_var"])
    assert int(after.buffers["norm.num_batches_tracked"]) == 2
    assert not first.buffers["norm.running_mean"].any()
    before = ft.fingerprint(after)
    ft.evaluate(step, after, [zoo.batch(1)])
    assert ft.fingerprint(after) == before


def test_which_parameters_are_trained_and_which_go_with_statistics() -> None:
    module = zoo.Normed()
    module.head.bias.requires_grad_(False)
    places = binding.slots(module)
    assert "head.bias" not in places.trainable
    assert "head.weight" in places.trainable
    assert places.statistical == {"norm.weight", "norm.bias"}
    assert binding.slots(ft.split(module)[0]).trainable == places.trainable


class Named(nn.Module):
    """Several embeddings, of which the model says which is the input's, or its head shows it."""

    def __init__(self, says: bool = False, head: bool = False, other: str = "experts") -> None:
        super().__init__()
        self.add_module(other, nn.Embedding(7, 2))
        self.tokens = nn.Embedding(19, 2)
        if says:
            self.get_input_embeddings = lambda: self.tokens
        if head:
            self.head = nn.Linear(2, 19)


def test_the_vocabulary_is_known_where_it_can_be_told() -> None:
    assert vocabulary_of(zoo.Tied()) == zoo.VOCABULARY
    assert vocabulary_of(zoo.decoder()) == zoo.VOCABULARY
    assert vocabulary_of(Named(says=True)) == 19
    assert vocabulary_of(Named()) is None
    assert vocabulary_of(Named(head=True)) == 19
    for other in ("wpe", "position_embedding", "pos_emb", "segments", "token_type_emb"):
        assert vocabulary_of(Named(other=other)) == 19
    assert vocabulary_of(nn.Linear(2, 2)) is None
    assert vocabulary_of(nn.Embedding(19, 2)) == 19


class OwnTable(nn.Module):
    """Tokens by a parameter of its own; the only embedding is of something else."""

    def __init__(self, name: str, other: nn.Module) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(zoo.VOCABULARY, 8))
        self.add_module(name, other)

    def forward(self, input_ids: Tensor, **_: object) -> Tensor:
        hidden = nn.functional.embedding(input_ids, self.table)
        return hidden @ self.table.T


class Tabled(nn.Module):
    """Tables of several sizes, whose names say nothing, and one shared with the projection."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Embedding(16, 8), nn.Embedding(19, 8)
        self.inner, self.out = nn.Linear(8, 16), nn.Linear(8, 19, bias=False)
        if tied:
            self.out.weight = self.second.weight
        else:
            self.get_output_embeddings = lambda: self.out

    def get_input_embeddings(self) -> nn.Module:
        raise NotImplementedError  # as models of transformers without an input embedding


@pytest.mark.parametrize("tied", [False, True])
def test_the_output_projection_tells_the_vocabulary_before_any_name(tied: bool) -> None:
    assert vocabulary_of(Tabled(tied)) == 19
    assert vocabulary_of(ft.split(Tabled(tied))[0]) == 19


class Rebuilt(nn.Linear):
    """A projection without a weight of its own: it is computed from another, as quantised ones."""

    def __init__(self) -> None:
        super().__init__(8, 19)
        self.packed = self.weight
        del self.weight


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_a_weight_that_is_computed_is_no_tie() -> None:
    """Each look at it makes a tensor, which may lie where the last one lay."""
    for _ in range(50):
        model = nn.ModuleDict({"tokens": nn.Embedding(19, 8), "positions": nn.Embedding(16, 8)})
        model.update({"inner": nn.Linear(8, 8), "out": nn.Linear(8, 19)})
        for name in ("positions", "inner", "out"):
            nn.utils.parametrize.register_parametrization(model[name], "weight", Doubled())
        assert vocabulary_of(model) == 19
    model["out"] = Rebuilt()
    assert vocabulary_of(model) == 19


@pytest.mark.parametrize(
    "name", ["segments.tokens", "segment.word_embeddings", "types.wte", "positions.embed_tokens"]
)
def test_an_embedding_that_is_called_tokens_is_the_vocabulary_wherever_it_is(name: str) -> None:
    within, last = name.split(".")
    assert vocabulary_of(nn.ModuleDict({within: nn.ModuleDict({last: nn.Embedding(19, 2)})})) == 19


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        *("positions", "pos_emb", "pe", "relative_bias", "rel_bias"),
        *("segment", "seg_embed", "segment_embeddings", "token_type_embeddings", "tokentype_emb"),
        *("type_embeddings", "types", "embed_type"),
    ],
)
def test_an_embedding_of_positions_or_types_is_not_the_vocabulary(name: str, within: bool) -> None:
    """Nor is one within a module of theirs: a batch's token ids would be out of its range."""
    table = nn.Embedding(5, 8)
    module = OwnTable(name, nn.Sequential(table) if within else table)
    assert vocabulary_of(module) is None
    architecture, params, buffers = ft.split(module)
    step = ft.pretrain_step(architecture, ft.optim.adamw())
    assert step(step.init(params, buffers), zoo.batch())[0].step == 1


def test_another_mode_is_refused() -> None:
    """It would be eval: no dropout, and BatchNorm by its statistics."""
    architecture, params, buffers = zoo.split("tied")
    with (
        pytest.raises(ConfigError, match="mode: 'training', expected 'train' or 'eval'"),
        ft.bound(architecture, params, buffers, "training"),  # type: ignore[arg-type]
    ):
        pass
