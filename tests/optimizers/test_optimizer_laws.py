"""What every optimizer obeys: torch's own bits, purity, donation, and standing still."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor, nn

from functrain import optim
from functrain.errors import StateError
from functrain.trees import Tensors, clone, digest

STEPS = 20
SHAPES = {"a.weight": (4, 6), "b.bias": (6,), "c.scale": (), "d.weight": (5, 3), "e.weight": (3, 3)}


@attrs.frozen(kw_only=True)
class Case:
    """An optimizer of ours and the torch class that it equals."""

    ours: Callable[..., Any]
    theirs: Callable[..., torch.optim.Optimizer]
    options: Mapping[str, Any] = attrs.field(factory=dict)
    fused: Mapping[str, Any] = attrs.field(factory=dict)
    names: tuple[str, ...] = tuple(SHAPES)

    def optimizer(self, groups: Any = ()) -> Any:
        """Ours."""
        return self.ours(lr=1e-2, groups=groups, **self.options)

    def torchs(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """torch's, with the kernel that ours uses."""
        return self.theirs(groups, lr=1e-2, **{**self.options, **self.fused})


def _adapted(cls: Any, **options: Any) -> Case:
    def ours(**given: Any) -> Any:
        return optim.from_torch(cls, **given)

    return Case(ours=ours, theirs=cls, options=options)


LOOP = {"foreach": False}
CASES: dict[str, Case] = {
    "adamw": Case(ours=optim.adamw, theirs=torch.optim.AdamW, fused={"fused": True}),
    "adamw-loop": Case(
        ours=optim.adamw, theirs=torch.optim.AdamW, options={"fused": False}, fused=LOOP
    ),
    "adamw-options": Case(
        ours=optim.adamw,
        theirs=torch.optim.AdamW,
        options={"betas": (0.8, 0.95), "eps": 1e-5, "weight_decay": 0.3},
        fused={"fused": True},
    ),
    "adamw-amsgrad": Case(
        ours=optim.adamw,
        theirs=torch.optim.AdamW,
        options={"amsgrad": True},
        fused={"fused": True},
    ),
    "adamw-maximize": Case(
        ours=optim.adamw,
        theirs=torch.optim.AdamW,
        options={"maximize": True},
        fused={"fused": True},
    ),
    "adam": Case(ours=optim.adam, theirs=torch.optim.Adam, fused={"fused": True}),
    "adam-loop": Case(
        ours=optim.adam,
        theirs=torch.optim.Adam,
        options={"fused": False, "amsgrad": True, "weight_decay": 0.1},
        fused=LOOP,
    ),
    "adam-decay": Case(
        ours=optim.adam,
        theirs=torch.optim.Adam,
        options={"weight_decay": 0.1, "amsgrad": True, "maximize": True},
        fused={"fused": True},
    ),
    "sgd": Case(ours=optim.sgd, theirs=torch.optim.SGD),
    "sgd-nesterov": Case(
        ours=optim.sgd,
        theirs=torch.optim.SGD,
        options={"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    ),
    "sgd-dampened": _adapted(torch.optim.SGD, momentum=0.9, dampening=0.1, maximize=True),
    "adafactor": Case(ours=optim.adafactor, theirs=torch.optim.Adafactor),
    "Adadelta": _adapted(torch.optim.Adadelta),
    "Adafactor": _adapted(torch.optim.Adafactor, weight_decay=0.1, d=2.0),
    "Adagrad": _adapted(torch.optim.Adagrad, lr_decay=0.1, initial_accumulator_value=0.1),
    "Adam": _adapted(torch.optim.Adam, amsgrad=True),
    "Adamax": _adapted(torch.optim.Adamax, weight_decay=0.1),
    "AdamW": _adapted(torch.optim.AdamW, maximize=True),
    "AdamW-fused": _adapted(torch.optim.AdamW, fused=True),
    "ASGD": _adapted(torch.optim.ASGD, t0=5.0, lambd=0.1),
    "NAdam": _adapted(torch.optim.NAdam, decoupled_weight_decay=True, weight_decay=0.1),
    "RAdam": _adapted(torch.optim.RAdam, weight_decay=0.1),
    "RMSprop": _adapted(torch.optim.RMSprop, momentum=0.9, centered=True),
    "Rprop": _adapted(torch.optim.Rprop),
    "SGD-foreach": _adapted(torch.optim.SGD, momentum=0.9, foreach=True),
    "SGD-nesterov-foreach": _adapted(torch.optim.SGD, momentum=0.9, nesterov=True, foreach=True),
    "Muon": attrs.evolve(
        _adapted(torch.optim.Muon), names=tuple(n for n, s in SHAPES.items() if len(s) == 2)
    ),
}
EVERY = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
NOT_APPLICABLE = {"LBFGS", "SparseAdam", "Optimizer"}
"""A closure; gradients that are sparse; the base class."""


def test_every_class_of_torch_is_here() -> None:
    here = {getattr(case.theirs, "__name__", "") for case in CASES.values()}
    classes = {n for n, value in vars(torch.optim).items() if isinstance(value, type)}
    assert here | NOT_APPLICABLE == classes


def _params(case: Case, dtype: torch.dtype = torch.float32) -> Tensors:
    generator = torch.Generator().manual_seed(1)
    return Tensors(
        {n: torch.randn(SHAPES[n], generator=generator, dtype=dtype) for n in case.names}
    )


def _grads(params: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
    """One parameter never has a gradient, one from step 3 on, one at every other step."""
    generator = torch.Generator().manual_seed(100 + step)
    grads = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in params.items()}
    absent = {"e.weight": True, "a.weight": step < 3, "d.weight": step > 0 and step % 2 == 0}
    return {n: g for n, g in grads.items() if not absent.get(n, False)}


def _rate(step: int) -> float:
    return 1e-2 * (step + 1) / STEPS


def _digests(*records: Mapping[str, Tensor]) -> list[str]:
    return [digest(tensor) for record in records for tensor in record.values()]


def _after(optimizer: Any, params: Tensors, steps: int, **options: Any) -> tuple[Tensors, Any]:
    state = optimizer.init(params)
    for step in range(steps):
        params, state = optimizer.update(
            _grads(params, step), state, params, torch.tensor(_rate(step)).double(), **options
        )
    return params, state


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_twenty_updates_have_the_bits_of_torchs_class(case: Case, dtype: torch.dtype) -> None:
    """Params and state, under learning rates that change, with gradients that come and go."""
    start = _params(case, dtype)
    leaves = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    theirs = case.torchs([{"params": list(leaves.values())}])
    for step in range(STEPS):
        grads = _grads(start, step)
        for name, leaf in leaves.items():
            leaf.grad = grads.get(name)
        theirs.param_groups[0]["lr"] = float(torch.tensor(_rate(step)).double())
        theirs.step()
    params, state = _after(case.optimizer(), start, STEPS)
    assert int(state.count) == STEPS
    for name, leaf in leaves.items():
        assert torch.equal(params[name], leaf), name
        for slot, value in theirs.state[leaf].items():
            if isinstance(value, Tensor) and name != "e.weight":
                assert torch.equal(state.slots[slot][name], value), (slot, name)


def _is_b_or_c(name: str, _tensor: Tensor) -> bool:
    return name.startswith(("b.", "c."))


def _is_a(name: str, _tensor: Tensor) -> bool:
    return name.startswith("a.")


@EVERY
def test_groups_have_the_bits_of_torchs_parameter_groups(case: Case) -> None:
    """Groups with a decay and a share of the learning rate of their own."""
    decay = case.theirs is not torch.optim.Rprop  # which knows none
    first = {"weight_decay": 0.2} if decay else {}
    second = {"weight_decay": 0.0} if decay else {}
    groups = [
        optim.group(_is_b_or_c, lr_scale=0.1, **first),
        optim.group(_is_a, lr_scale=3.0, **second),
        optim.group(_is_b_or_c, lr_scale=1e9),  # the first match counts
    ]
    start = _params(case)
    leaves = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    members = [
        ([p for n, p in leaves.items() if _is_b_or_c(n, p)], 0.1, first),
        ([p for n, p in leaves.items() if _is_a(n, p)], 3.0, second),
        ([p for n, p in leaves.items() if n.startswith(("d.", "e."))], 1.0, {}),
    ]
    members = [each for each in members if each[0]]
    theirs = case.torchs([{"params": own, **options} for own, _, options in members])
    for step in range(STEPS):
        grads = _grads(start, step)
        for name, leaf in leaves.items():
            leaf.grad = grads.get(name)
        for group, (_, scale, _) in zip(theirs.param_groups, members, strict=True):
            rate = float(torch.tensor(_rate(step)).double())
            group["lr"] = rate if scale == 1.0 else rate * scale
        theirs.step()
    params, _ = _after(case.optimizer(groups), start, STEPS)
    for name, leaf in leaves.items():
        assert torch.equal(params[name], leaf), name


@EVERY
def test_an_update_changes_nothing_that_it_was_given(case: Case) -> None:
    params, state = _after(case.optimizer(), _params(case), 4)
    grads = _grads(params, 5)
    before = _digests(grads, params, *state.slots.values())
    new, after = case.optimizer().update(grads, state, params, 1e-2)
    assert _digests(grads, params, *state.slots.values()) == before
    assert int(state.count) + 1 == int(after.count)
    again, twice = case.optimizer().update(grads, state, params, 1e-2)
    assert _digests(new, *after.slots.values()) == _digests(again, *twice.slots.values())


@EVERY
def test_the_new_values_share_no_memory_with_the_old_or_the_gradients(case: Case) -> None:
    """But for what had no gradient, which is the same tensor."""
    params, state = _after(case.optimizer(), _params(case), 4)
    grads = _grads(params, 5)
    old = {t.data_ptr() for own in (grads, params, *state.slots.values()) for t in own.values()}
    new, after = case.optimizer().update(grads, state, params, 1e-2)
    for record in (new, *after.slots.values()):
        for name, tensor in record.items():
            assert (tensor.data_ptr() in old) is (name not in grads), name


@EVERY
def test_a_donated_update_has_the_bits_of_a_pure_one(case: Case) -> None:
    """In the memory of what was given."""
    pure, state = _after(case.optimizer(), _params(case), STEPS)
    given = clone(_params(case))
    places = {name: tensor.data_ptr() for name, tensor in given.items()}
    donated, same = _after(case.optimizer(), given, STEPS, donate=True)
    assert _digests(donated, *same.slots.values()) == _digests(pure, *state.slots.values())
    assert {name: tensor.data_ptr() for name, tensor in donated.items()} == places


class Elsewhere(Tensor):
    """What says that it is on an accelerator, where looking at it is not free."""

    device = torch.device("cuda")


@EVERY
@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("where", [Tensor, Elsewhere])
def test_an_update_that_is_not_applied_changes_nothing(
    case: Case, donate: bool, where: type[Tensor]
) -> None:
    """Neither params nor moments nor any count, even with gradients that are not finite."""
    params, state = _after(case.optimizer(), _params(case), 4)
    before = _digests(params, *state.slots.values())
    grads = {name: torch.full_like(p, torch.nan) for name, p in params.items()}
    applied = torch.tensor(False).as_subclass(where)
    new, after = case.optimizer().update(grads, state, params, 1e-2, applied=applied, donate=donate)
    assert _digests(new, *after.slots.values()) == before
    assert int(after.count) == int(state.count)


@EVERY
def test_an_update_that_is_applied_is_an_update(case: Case) -> None:
    params, state = _after(case.optimizer(), _params(case), 4)
    plain, _ = case.optimizer().update(_grads(params, 5), state, params, 1e-2)
    told, after = case.optimizer().update(
        _grads(params, 5), state, params, 1e-2, applied=torch.tensor(True)
    )
    assert _digests(plain) == _digests(told)
    assert int(after.count) == int(state.count) + 1


@EVERY
def test_without_any_gradient_nothing_moves(case: Case) -> None:
    params, state = _after(case.optimizer(), _params(case), 4)
    new, after = case.optimizer().update({}, state, params, 1e-2)
    assert _digests(new, *after.slots.values()) == _digests(params, *state.slots.values())
    assert int(after.count) == int(state.count) + 1


WRONG_GRADIENTS: dict[str, tuple[dict[str, Any], str]] = {
    "a part": (
        {"d.weight": torch.ones(1, 3)},
        r"grads/d.weight: float32\[1, 3\] on cpu, expected float32\[5, 3\] on cpu as the param",
    ),
    "a transpose": ({"d.weight": torch.ones(3, 5)}, r"grads/d.weight: float32\[3, 5\] on cpu"),
    "flat": ({"d.weight": torch.ones(15)}, r"grads/d.weight: float32\[15\] on cpu"),
    "another dtype": ({"d.weight": torch.ones(5, 3).double()}, r"grads/d.weight: float64\[5, 3\]"),
    "integers": ({"d.weight": torch.ones(5, 3).long()}, r"grads/d.weight: int64\[5, 3\]"),
    "another device": ({"d.weight": torch.ones(5, 3, device="meta")}, "on meta, expected .* cpu"),
    "an unknown name": (
        {"d.wieght": torch.ones(5, 3)},
        "grads/d.wieght: no parameter has this name; did you mean 'd.weight'",
    ),
    "none": ({"d.weight": None}, "grads/d.weight: expected a tensor, got NoneType; leave out"),
}


@EVERY
@pytest.mark.parametrize("wrong", sorted(WRONG_GRADIENTS))
def test_a_gradient_that_does_not_fit_is_refused_before_anything_is_written(
    case: Case, wrong: str
) -> None:
    """A fused kernel would read past the end of a smaller one."""
    grads, message = WRONG_GRADIENTS[wrong]
    params, state = _after(case.optimizer(), _params(case), 4)
    before = _digests(params, *state.slots.values())
    given = {**_grads(params, 5), **grads}
    for donate in (False, True):
        with pytest.raises(StateError, match=message):
            case.optimizer().update(given, state, params, 1e-2, donate=donate)
    assert _digests(params, *state.slots.values()) == before


@EVERY
def test_a_state_of_another_optimizer_is_refused(case: Case) -> None:
    params = _params(case)
    optimizer = case.optimizer()
    other = optim.adam() if optimizer.kind != "adam" else optim.adamw()
    message = rf"state: made by {other.kind} and given to {re.escape(optimizer.kind)}; update it"
    with pytest.raises(StateError, match=message):
        optimizer.update(_grads(params, 5), other.init(params), params, 1e-2)
    with pytest.raises(StateError, match=r"expected an OptimizerState from .*, got dict"):
        optimizer.update(_grads(params, 5), {}, params, 1e-2)


FUSED = ["adamw", "adam-decay", "adamw-amsgrad", "AdamW-fused"]


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("donate", [False, True])
def test_the_memory_layout_of_a_gradient_makes_no_difference(name: str, donate: bool) -> None:
    """A gradient in columns, and one number for all, as `sum` gives it."""
    case = CASES[name]
    params = _params(case)
    columns = torch.randn(3, 5).t()
    for grad in (columns, torch.ones(()).expand(5, 3), torch.ones(5, 1).expand(5, 3)):
        results = [
            case.optimizer().update(
                {"d.weight": g}, case.optimizer().init(params), clone(params), 1e-2, donate=donate
            )
            for g in (grad, grad.contiguous())
        ]
        laid, plain = (_digests(new, *state.slots.values()) for new, state in results)
        assert laid == plain


@pytest.mark.parametrize("name", ["adamw", "adamw-loop"])
def test_a_sparse_gradient_is_refused_where_the_kernel_is_dense(name: str) -> None:
    params = _params(CASES[name])
    grads = {"d.weight": torch.ones(5, 3).to_sparse()}
    optimizer = CASES[name].optimizer()
    with pytest.raises(
        StateError, match=r"grads/d.weight: sparse, expected .*; give .to_dense\(\)"
    ):
        optimizer.update(grads, optimizer.init(params), params, 1e-2)
