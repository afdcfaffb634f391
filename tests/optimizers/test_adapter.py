"""Any torch optimizer class as a pure pair: what it carries, and which classes are refused."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from zoo import Own

from functrain import optim
from functrain.errors import ConfigError, StateError
from functrain.trees import Tensors, clone, digest

PARAMS = Tensors(a=torch.ones(3, 2), b=torch.tensor(2.0, dtype=torch.float64))
GRADS = Tensors(a=torch.full((3, 2), 0.5), b=torch.tensor(0.25, dtype=torch.float64))


class Counting(Own):
    """Keeps numbers and a scalar tensor per parameter, and counts on them being what they were."""

    def _update(self, group: dict[str, Any], param: Tensor) -> None:
        state = self.state[param]
        if not state:
            state.update(calls=0, size=0.5, warm=False, mean=torch.zeros((), dtype=torch.float64))
        kinds = {slot: type(value) for slot, value in state.items()}
        assert kinds == {"calls": int, "size": float, "warm": bool, "mean": Tensor}
        state["calls"] += 1
        state["size"] *= 0.5
        state["warm"] = state["calls"] > 1
        state["mean"] += param.grad.double().mean()
        param.sub_(param.grad * group["lr"] * state["size"])


class InGroups(Own):
    def _update(self, group: dict[str, Any], param: Tensor) -> None:
        group["calls"] = group.get("calls", 0) + 1


class InCommon(Own):
    def _update(self, group: dict[str, Any], param: Tensor) -> None:
        self.state["calls"] = self.state.get("calls", 0) + 1


class OnItself(Own):
    """Counts its updates in an attribute, of which a pure update knows nothing."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.calls = 0

    def _update(self, group: dict[str, Any], param: Tensor) -> None:
        self.calls += 1


class OnItselfInATensor(Own):
    """As PSGD Kron's class: the tensor stays, and what is in it moves."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.calls = torch.zeros((), dtype=torch.int32)

    def _update(self, group: dict[str, Any], param: Tensor) -> None:
        self.calls += 1


class InATensorOfGroups(Own):
    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        torch.optim.Optimizer.__init__(self, params, {"lr": lr, "calls": torch.zeros(())})

    def _update(self, group: dict[str, Any], param: Tensor) -> None:
        group["calls"] += 1


class Constant(Own):
    """Writes what is there already: no state."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.rate, self.table = float("0.5"), torch.ones(2)

    def _update(self, group: dict[str, Any], param: Tensor) -> None:
        self.rate = float("0.5")
        param.sub_(param.grad * self.rate * self.table[0])


class Changing(Own):
    """An entry is a number before it is a tensor, one is None before, and one is taken out."""

    def _update(self, group: dict[str, Any], param: Tensor) -> None:
        state = self.state[param]
        if not state:
            state.update(calls=0, mean=0, last=None)
        state["calls"] += 1
        if state["last"] is not None:
            param.sub_(state["last"] * group["lr"])
        if state["calls"] > 1:
            state["mean"] = state["mean"] * 0.5 + param.grad
            state["last"] = param.grad * 0.25
        if "ahead" in state:
            param.sub_(state.pop("ahead") * group["lr"])
        else:
            state["ahead"] = param.grad * 0.75
        param.sub_((param.grad + state["mean"]) * group["lr"])


class WithText(Own):
    def _update(self, group: dict[str, Any], param: Tensor) -> None:
        self.state[param]["note"] = "warm"


class WithTextOfScalars(Own):
    def _update(self, group: dict[str, Any], param: Tensor) -> None:
        param.sub_(param.grad)
        if not param.ndim:
            self.state[param]["note"] = "warm"


class InOneGroup(Own):
    def __init__(self, params: Any, lr: float = 1e-3, counting: bool = False) -> None:
        torch.optim.Optimizer.__init__(self, params, {"lr": lr, "counting": counting})

    def _update(self, group: dict[str, Any], param: Tensor) -> None:
        param.sub_(param.grad)
        if group["counting"]:
            group["calls"] = group.get("calls", 0) + 1


class Reading(Own):
    """Does not take an update of nothing."""

    def _update(self, group: dict[str, Any], param: Tensor) -> None:
        param.sub_(group["lr"] * param.grad / (1 / float(param.grad.sum())))


class WritesGradients(Own):
    """As many a class of older days: decay is added into the gradient itself."""

    def _update(self, group: dict[str, Any], param: Tensor) -> None:
        param.grad.add_(param, alpha=0.1)
        param.sub_(param.grad * group["lr"])


class NeedsClosure(Own):
    def step(self, closure: Any) -> None:  # type: ignore[override]
        closure()


def test_numbers_and_scalar_tensors_come_back_as_what_they_were() -> None:
    """Int, float, bool and a 0-d float64 tensor, which a scalar parameter's moments are too."""
    optimizer = optim.from_torch(Counting, lr=0.1)
    params, state = PARAMS, optimizer.init(PARAMS)
    for _ in range(3):
        params, state = optimizer.update(GRADS, state, params, 0.1)
    assert {slot: float(own["a"]) for slot, own in state.slots.items()} == {
        "calls.number": 3.0,
        "mean": 1.5,
        "size.number": 0.0625,
        "warm.number": 1.0,
    }
    kinds = {slot: own["a"].dtype for slot, own in state.slots.items()}
    assert kinds["calls.number"] == torch.int64
    assert kinds["size.number"] == torch.float64
    assert kinds["warm.number"] == torch.bool


@pytest.mark.parametrize("donate", [False, True])
def test_an_entry_may_become_something_else_or_go(donate: bool) -> None:
    """To the bits of the class itself: nothing that an update has left behind comes back."""
    optimizer = optim.from_torch(Changing)
    params, state = clone(PARAMS), optimizer.init(PARAMS)
    leaves = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in PARAMS.items()}
    theirs = Changing(leaves.values())
    for count in range(1, 6):
        grads = {name: grad * count for name, grad in GRADS.items()}
        for name, leaf in leaves.items():
            leaf.grad = grads[name].clone()
        theirs.param_groups[0]["lr"] = 0.1
        theirs.step()
        params, state = optimizer.update(grads, state, params, 0.1, donate=donate)
        assert all(torch.equal(params[name], leaf) for name, leaf in leaves.items())
        moments = {"mean.number", "last.none"} if count == 1 else {"mean", "last"}
        ahead = {"ahead"} if count % 2 else set()
        assert state.slots.keys() == {"calls.number"} | moments | ahead


def test_what_an_update_leaves_as_it_was_is_no_state() -> None:
    optimizer = optim.from_torch(Constant)
    new, _ = optimizer.update(GRADS, optimizer.init(PARAMS), PARAMS, 0.1)
    assert torch.equal(new["a"], PARAMS["a"] - 0.25)


def test_the_state_begins_empty() -> None:
    """The class makes its own at the first update."""
    state = optim.sgd(momentum=0.9).init(PARAMS)
    assert state.slots == {}
    assert int(state.count) == 0
    assert state.kind == "SGD"


def test_a_class_that_writes_into_gradients_does_not_write_into_the_given_ones() -> None:
    optimizer = optim.from_torch(WritesGradients)
    given = clone(GRADS)
    new, _ = optimizer.update(given, optimizer.init(PARAMS), PARAMS, 0.1)
    assert all(torch.equal(given[name], GRADS[name]) for name in GRADS)
    assert torch.equal(new["a"], PARAMS["a"] - (0.5 + 0.1) * 0.1)


@pytest.mark.parametrize(
    ("options", "spared"),
    [
        ({"nesterov": True, "foreach": True}, False),
        ({"nesterov": True, "foreach": True, "weight_decay": 0.1}, True),
        ({"nesterov": True, "foreach": True, "maximize": True}, True),
        ({"nesterov": True, "foreach": False}, True),
        ({"nesterov": True, "fused": True}, True),
        ({"nesterov": True}, True),  # on the CPU one parameter comes after another
        ({"foreach": True}, True),
    ],
)
def test_gradients_are_copied_where_torch_writes_into_them(
    options: dict[str, Any], spared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nowhere else: where they are spared, the class itself is shown to write nothing."""
    seen: list[bool] = []
    given = clone(GRADS)
    step = torch.optim.SGD.step

    def shown(self: torch.optim.Optimizer) -> None:
        of = {t.data_ptr() for t in given.values()}
        leaves = [p for group in self.param_groups for p in group["params"]]
        seen.extend(p.grad.data_ptr() in of for p in leaves if p.grad is not None)
        step(self)

    monkeypatch.setattr(torch.optim.SGD, "step", shown)
    optimizer = optim.sgd(momentum=0.9, **options)
    params, state = PARAMS, optimizer.init(PARAMS)
    for _ in range(3):
        params, state = optimizer.update(given, state, params, 0.1)
    assert seen == [spared] * 6
    assert all(torch.equal(given[name], GRADS[name]) for name in GRADS)


def test_the_learning_rate_of_a_call_counts_not_that_of_the_constructor() -> None:
    optimizer = optim.sgd(lr=123.0)
    new, _ = optimizer.update(GRADS, optimizer.init(PARAMS), PARAMS, 0.5)
    assert torch.equal(new["a"], PARAMS["a"] - 0.25)
    assert optimizer.lr == 123.0


@pytest.mark.parametrize("cls", [torch.optim.LBFGS, NeedsClosure])
def test_a_class_that_needs_a_closure_is_refused_when_it_is_named(cls: Any) -> None:
    with pytest.raises(ConfigError, match=f"{cls.__name__}: its step evaluates the loss again"):
        optim.from_torch(cls)


def test_an_optimizer_that_is_made_is_answered_with_its_class() -> None:
    made: Any = torch.optim.SGD([torch.zeros(1)])
    message = r"^from_torch: .*; give the class, from_torch\(torch\.optim\.SGD, …\)$"
    with pytest.raises(ConfigError, match=message):
        optim.from_torch(made)


def test_a_class_for_sparse_gradients_says_so_of_dense_ones() -> None:
    optimizer = optim.from_torch(torch.optim.SparseAdam)
    state = optimizer.init(PARAMS)
    for donate in (False, True):
        with pytest.raises(StateError, match=r"^grads/.: dense, .* take functrain\.optim\.adam$"):
            optimizer.update(GRADS, state, PARAMS, 0.1, donate=donate)
    with pytest.raises(StateError, match=r"^grads/.: dense"):
        optimizer.check(GRADS, state, PARAMS)


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (InGroups, "InGroups keeps 'calls' in its parameter groups"),
        (InCommon, "InCommon keeps 'calls' in a state that no parameter owns"),
        (OnItself, "OnItself counts in its attribute 'calls', which would begin anew"),
        (OnItselfInATensor, "OnItselfInATensor counts in its attribute 'calls', which"),
        (InATensorOfGroups, "InATensorOfGroups keeps 'calls' in its parameter groups"),
        (WithText, "optimizer state 'note' of a is a str; only tensors and numbers"),
    ],
)
def test_a_class_whose_state_cannot_be_carried_is_refused(cls: Any, message: str) -> None:
    optimizer = optim.from_torch(cls)
    with pytest.raises(ConfigError, match=message):
        optimizer.update(GRADS, optimizer.init(PARAMS), PARAMS, 0.1)


COUNTING = [optim.group(lambda name, _: name == "b", counting=True)]


@pytest.mark.parametrize(
    ("cls", "groups"),
    [
        *((cls, ()) for cls in (InGroups, InCommon, OnItself, WithText, WithTextOfScalars)),
        (InOneGroup, COUNTING),
    ],
)
@pytest.mark.parametrize("other", [False, True])
def test_it_is_refused_before_a_donated_update_writes(cls: Any, groups: Any, other: bool) -> None:
    """Alone, and as the last part of a partition; also after updates of other parameters."""
    optimizer: Any = optim.from_torch(cls, groups=groups)
    params = clone(PARAMS)
    if other and cls in (WithTextOfScalars, InOneGroup):
        alone = Tensors(a=clone(PARAMS)["a"])
        optimizer.update({"a": GRADS["a"]}, optimizer.init(alone), alone, 0.1, donate=True)
    elif other:
        parts = [
            ("first", lambda name, _: name == "a", optim.sgd()),
            ("last", optim.is_any, optimizer),
        ]
        optimizer = optim.partition([("nested", optim.is_any, optim.partition(parts))])
    before = [digest(tensor) for tensor in params.values()]
    for _ in range(2):
        with pytest.raises(ConfigError):
            optimizer.update(clone(GRADS), optimizer.init(params), params, 0.1, donate=True)
        assert [digest(tensor) for tensor in params.values()] == before


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("part", [False, True])
@pytest.mark.parametrize(
    ("cls", "options", "slot"),
    [
        (torch.optim.RMSprop, {"centered": True}, "grad_avg"),
        (torch.optim.Adam, {"amsgrad": True}, "max_exp_avg_sq"),
    ],
)
def test_a_state_of_other_options_is_refused_before_anything_is_written(
    cls: Any, options: Any, slot: str, part: bool, donate: bool
) -> None:
    plain: Any = optim.from_torch(cls)
    other: Any = optim.from_torch(cls, **options)
    if part:
        plain, other = (optim.partition([("all", optim.is_any, each)]) for each in (plain, other))
    params, state = plain.update(GRADS, plain.init(PARAMS), PARAMS, 0.1)
    # An update of a state that fits, after which the class is known.
    other.update(clone(GRADS), other.init(params), clone(params), 0.1, donate=True)
    leaves = [params, *state.slots.values()]
    before = [digest(tensor) for items in leaves for tensor in items.values()]
    with pytest.raises(StateError, match=f"{cls.__name__} .*'{slot}'.*init"):
        other.update(clone(GRADS), state, params, 0.1, donate=donate)
    assert [digest(tensor) for items in leaves for tensor in items.values()] == before


def test_a_class_that_does_not_take_an_update_of_nothing_is_not_refused() -> None:
    optimizer = optim.from_torch(Reading)
    params = clone(PARAMS)
    new, _ = optimizer.update(clone(GRADS), optimizer.init(params), params, 0.1, donate=True)
    assert torch.equal(new["b"], PARAMS["b"] - 0.1 * 0.25 * 0.25)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentun": 0.9}, "SGD: .*momentun"),
        ({"momentum": -1.0}, "SGD: Invalid momentum value: -1.0"),
        ({"lr": -1.0}, "SGD: Invalid learning rate: -1.0"),
        ({"groups": [optim.group(optim.is_any, momentum=-1.0)]}, "SGD: Invalid momentum"),
        ({"groups": [optim.group(optim.is_any, momentun=0.9)]}, "SGD: .*momentun"),
        ({"groups": [optim.group(optim.is_any, lr=0.9)]}, "SGD: .*lr_scale"),
    ],
)
def test_what_the_class_refuses_is_a_config_error(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        optim.from_torch(torch.optim.SGD, **options)


class Lion(Own):
    """As lucidrains' class: a learning rate of 0 fails an assertion of its constructor."""

    def __init__(self, params: Any, lr: float = 1e-4) -> None:
        assert lr > 0.0
        super().__init__(params, lr)

    def _update(self, group: dict[str, Any], param: Tensor) -> None:
        param.sub_(param.grad.sign() * group["lr"])


def test_a_class_that_refuses_a_learning_rate_of_0_takes_a_warmup_from_0() -> None:
    """The class is made with the optimizer's own rate; the call's is set as a scheduler sets it."""
    sparse = {"a": GRADS["a"].to_sparse()}
    for cls, grads in ((Lion, {"a": GRADS["a"]}), (torch.optim.SparseAdam, sparse)):
        leaf = torch.nn.Parameter(PARAMS["a"].clone())
        theirs = cls([leaf], lr=1e-3)
        optimizer = optim.from_torch(cls, lr=1e-3, groups=[optim.group(optim.is_any, lr_scale=0.5)])
        params = Tensors(a=PARAMS["a"])
        state = optimizer.init(params)
        for rate in (0.0, 0.5, 0.25):
            params, state = optimizer.update(grads, state, params, rate)
            theirs.param_groups[0]["lr"] = rate * 0.5
            leaf.grad = grads["a"]
            theirs.step()
        assert torch.equal(params["a"], leaf)


def test_a_library_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ConfigError, match=r"pip install 'functrain\[optimizers\]'"):
        optim.adamw_8bit(1e-3)


def test_an_assertion_of_the_class_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="Lion: its constructor failed an assertion"):
        optim.from_torch(Lion, lr=0.0)


@pytest.mark.parametrize("option", ["differentiable", "capturable"])
def test_options_that_a_pure_update_has_no_use_for_are_refused(option: str) -> None:
    message = f"Adam: {option}=True .*; leave it out"
    with pytest.raises(ConfigError, match=message):
        optim.from_torch(torch.optim.Adam, **{option: True})
    groups = [optim.group(optim.is_any, **{option: True})]
    with pytest.raises(ConfigError, match=message):
        optim.from_torch(torch.optim.Adam, groups=groups)
    assert optim.from_torch(torch.optim.Adam, **{option: False}).kind == "Adam"


def test_params_that_the_class_does_not_take_are_refused_at_init() -> None:
    with pytest.raises(ConfigError, match="Muon: Muon only supports 2D parameters"):
        optim.from_torch(torch.optim.Muon).init(PARAMS)


UNFUSED = [
    *(torch.optim.Adadelta, torch.optim.Adafactor, torch.optim.Adamax, torch.optim.ASGD),
    *(torch.optim.NAdam, torch.optim.RAdam, torch.optim.RMSprop, torch.optim.Rprop),
]
FUSED = [torch.optim.Adagrad, torch.optim.Adam, torch.optim.SGD]


def _ended(cls: Any, options: Mapping[str, Any]) -> dict[str, str]:
    """The digests after a pure and a donated update by an optimizer made here."""
    optimizer = optim.from_torch(cls, **options)
    params, state = clone(PARAMS), optimizer.init(PARAMS)
    for donate in (False, True, False):
        params, state = optimizer.update(clone(GRADS), state, params, 0.1, donate=donate)
    every = {"params": params, **state.slots}
    return {
        f"{of}/{n}": digest(tensor) for of, items in every.items() for n, tensor in items.items()
    }


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        *((cls, {"foreach": several}) for cls in (*UNFUSED, *FUSED) for several in (False, True)),
        *((cls, {"fused": True}) for cls in FUSED),
    ],
)
def test_the_default_device_and_dtype_change_nothing(cls: Any, options: Any) -> None:
    """Neither the params' bits nor the slots, which the class makes by torch's defaults."""
    expected = _ended(cls, options)
    with torch.device("meta"):
        found = _ended(cls, options)
        assert torch.empty(0).device.type == "meta"
    assert found == expected
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            found = _ended(cls, options)
            assert torch.get_default_dtype() == dtype
        finally:
            torch.set_default_dtype(torch.float32)
        assert found == expected
