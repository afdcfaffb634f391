"""Every preference loss and modifier is its formula: values, slopes, metrics, and far outside."""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from collections.abc import Sequence
from typing import Any

import attrs
import pytest
import torch
import zoo
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from objectives import formulas
from objectives.formulas import Numbers, Pair
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import functrain as ft
from functrain.objectives.losses import LOSSES, Options, PairLogps, divergence_of
from functrain.objectives.preference import Observed, PreferenceOptimization
from functrain.objectives.unpaired import UnpairedOptimization

VALUED = [name for name, each in LOSSES.items() if each.value is not None]
SMOOTHED = {"sigmoid", "sigmoid_norm", "robust", "exo_pair", "aot", "aot_unpaired", "cpo", "simpo"}
DIVERGENCES = ["forward_kl", "jensen_shannon", "alpha"]
DIVERGENT = ["sigmoid", "sigmoid_norm", "hinge", "ipo", "ipo_sum", "robust", "exo_pair", "discopop"]
NORMALIZABLE = [
    *("sigmoid", "hinge", "robust", "exo_pair", "nca_pair", "sppo_hard", "aot_unpaired"),
    *("discopop", "apo_zero", "apo_down"),
]
SIDES = ("chosen", "rejected")
DTYPES = (torch.float64, torch.float32)
CLOSE = {torch.float64: 1e-11, torch.float32: 1e-3}
LARGEST = {torch.float64: 1e298, torch.float32: 1e30}

# Multiples of 1/64 and powers of two, so that differences of inputs are exact in both dtypes.
logps = st.integers(-60 * 64, -1).map(lambda n: n / 64)
lengths = st.sampled_from([1, 2, 4, 16, 7])
betas = st.sampled_from([0.01, 0.125, 0.5, 2.0])
some_pairs = st.lists(
    st.builds(Pair, logps, logps, logps, logps, lengths, lengths), min_size=1, max_size=3
)


@st.composite
def numbers(draw: st.DrawFn, name: str) -> Numbers:
    """Numbers that a loss takes."""
    low = 1e-3 if name == "exo_pair" else 0.0
    return Numbers(
        beta=draw(betas),
        epsilon=draw(st.floats(low, 0.45)) if name in SMOOTHED else 0.0,
        gamma=draw(st.floats(0, 2)),
        lam=draw(st.floats(0.01, 2)),
        tau=draw(st.floats(0.02, 0.9)),
    )


def _logps(
    pairs: Sequence[Pair], n: Numbers, dtype: torch.dtype, *, reference: bool = True
) -> PairLogps:
    """The pairs as the package's record of them, with history."""

    def column(field: str, kind: torch.dtype = dtype) -> Tensor:
        return torch.tensor([getattr(p, field) for p in pairs], dtype=kind)

    return PairLogps(
        chosen=column("chosen").requires_grad_(),
        rejected=column("rejected").requires_grad_(),
        chosen_length=column("chosen_length", torch.int64),
        rejected_length=column("rejected_length", torch.int64),
        reference_chosen=column("reference_chosen") if reference else None,
        reference_rejected=column("reference_rejected") if reference else None,
        divergence=divergence_of(n.divergence, n.alpha),
        normalized=n.normalized,
        offset=torch.tensor(float(n.delta), dtype=dtype),
    )


def _options(n: Numbers) -> Options:
    return Options(
        beta=n.beta,
        label_smoothing=n.epsilon,
        simpo_gamma=n.gamma,
        orpo_lambda=n.lam,
        discopop_tau=n.tau,
    )


def _ours(
    name: str, pairs: Sequence[Pair], n: Numbers, dtype: torch.dtype
) -> tuple[Tensor, list[tuple[float, float]]]:
    """Values, and the slopes of their sum."""
    given_ = _logps(pairs, n, dtype, reference=LOSSES[name].reference)
    value = LOSSES[name].value
    assert value is not None
    found = value(given_, _options(n))
    slopes = torch.autograd.grad(found.sum(), (given_.chosen, given_.rejected), allow_unused=True)
    zero = torch.zeros_like(given_.chosen)
    chosen, rejected = (zero if s is None else s for s in slopes)
    return found.detach(), list(zip(chosen.tolist(), rejected.tolist(), strict=True))


def _assert_close(found: Any, expected: Any, dtype: torch.dtype, scale: float, what: str) -> None:
    tolerance = CLOSE[dtype]
    for mine, theirs in zip(found, expected, strict=True):
        mine, theirs = float(mine), float(theirs)
        if abs(theirs) > LARGEST[dtype]:
            assert not math.isnan(mine), what
            continue
        apart = abs(mine - theirs)
        assert apart <= tolerance * (abs(theirs) + scale), f"{what}: {mine} and {theirs}, {dtype}"


def _is_smooth(name: str, pairs: Sequence[Pair], n: Numbers) -> bool:
    """Away from the kink of a hinge and from the ties of a sort."""
    if name == "hinge":
        return all(abs(1 - n.beta * float(formulas.margin(p, n))) > 1e-5 for p in pairs)
    if name == "aot":
        return len({p.chosen - p.rejected for p in pairs}) == len(pairs)
    if name == "aot_unpaired":
        chosen = {(p.chosen - p.reference_chosen) / p.chosen_length for p in pairs}
        rejected = {(p.rejected - p.reference_rejected) / p.rejected_length for p in pairs}
        totals = {p.chosen - p.reference_chosen for p in pairs}
        others = {p.rejected - p.reference_rejected for p in pairs}
        return all(len(each) == len(pairs) for each in (chosen, rejected, totals, others))
    return True


def _compare(name: str, pairs: Sequence[Pair], n: Numbers) -> None:
    """Both dtypes against the formula; a slope is measured by the steepest of its batch."""
    expected = formulas.values(name, pairs, n)
    steep = formulas.slopes({name: 1.0}, pairs, n)
    scale = max(n.beta, *(abs(slope) for both in steep for slope in both))
    for dtype in DTYPES:
        found, mine = _ours(name, pairs, n, dtype)
        what = f"{name} of {pairs} at {n}"
        _assert_close(found, expected, dtype, 1.0, what)
        flat, flat_expected = itertools.chain(*mine), itertools.chain(*steep)
        _assert_close(flat, flat_expected, dtype, scale, f"slopes of {what}")


@pytest.mark.parametrize("name", VALUED)
@given(data=st.data())
def test_each_loss_is_its_formula_in_value_and_slope(name: str, data: st.DataObject) -> None:
    pairs, n = data.draw(some_pairs), data.draw(numbers(name))
    if name == "bco_pair":
        seen = data.draw(st.floats(-5, 5)), data.draw(st.integers(0, 10))
        n = dataclasses.replace(n, delta=float(formulas.running_mean(pairs, n.beta, seen)))
    assume(_is_smooth(name, pairs, n))
    _compare(name, pairs, n)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@given(data=st.data())
def test_each_divergence_is_its_formula(divergence: str, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(DIVERGENT))
    n = dataclasses.replace(
        data.draw(numbers(name)),
        divergence=divergence,
        alpha=data.draw(st.sampled_from([0.001, 0.3, 0.5, 0.9, 0.999999])),
        normalized=name in NORMALIZABLE and data.draw(st.booleans()),
    )
    pairs = data.draw(some_pairs)
    assume(_is_smooth(name, pairs, n))
    _compare(name, pairs, n)


FAR = (-1e4, -90.0, -1.0, 0.0, 1.0, 90.0, 1e4)
SURE = (-1e4, -90.0, -1.0, -(2.0**-10))


@pytest.mark.parametrize("name", VALUED)
@settings(max_examples=settings().max_examples // 2)
@given(data=st.data())
def test_far_out_on_either_side_each_loss_is_its_formula(name: str, data: st.DataObject) -> None:
    """Policy and reference each up to ±10,000 nats, beside pairs that are not; by token too."""
    policy = st.one_of(logps, st.sampled_from(SURE if name == "orpo" else FAR))
    reference = st.one_of(logps, st.sampled_from(FAR))
    sizes = st.sampled_from([1, 2, 4, 16])  # so that a mean of large numbers is exact
    far = st.builds(Pair, policy, policy, reference, reference, sizes, sizes)
    pairs = data.draw(st.lists(far, min_size=1, max_size=3))
    n = dataclasses.replace(
        data.draw(numbers(name)), normalized=name in NORMALIZABLE and data.draw(st.booleans())
    )
    if name == "bco_pair":
        n = dataclasses.replace(n, delta=float(formulas.running_mean(pairs, n.beta)))
    assume(_is_smooth(name, pairs, n))
    _compare(name, pairs, n)


def _grid(values: Sequence[float], every: bool, other: bool) -> list[tuple[float, float]]:
    """Each value beside each; unless it is `every` such pair, the corners and every other one, or
    the others."""
    places = itertools.product(range(len(values)), repeat=2)
    return [(values[i], values[j]) for i, j in places if every or (i + j) % 2 == other]


WHOLE = pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.long)])


@WHOLE
@pytest.mark.parametrize("name", VALUED)
@pytest.mark.parametrize("beta", [0.125, 2.0])
def test_far_out_nothing_is_nan_and_what_is_finite_is_right(
    name: str, beta: float, whole: bool
) -> None:
    """At ±10,000 nats, in float64 and float32; log-odds are of probabilities, so below 0."""
    epsilon = 2**-10 if name in SMOOTHED else 0.0
    for w, r in _grid(SURE if name == "orpo" else FAR, whole, other=beta < 1):
        n = Numbers(beta=beta, epsilon=epsilon)
        pairs = [Pair(w, r, chosen_length=2)]
        if _is_smooth(name, pairs, n):
            _compare(name, pairs, n)


@WHOLE
@pytest.mark.parametrize("name", DIVERGENT)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_far_out_a_divergence_is_no_nan_either(name: str, divergence: str, whole: bool) -> None:
    n = Numbers(beta=0.125, epsilon=2**-10 * (name in SMOOTHED), divergence=divergence)
    other = (DIVERGENT.index(name) + DIVERGENCES.index(divergence)) % 2 == 1
    for w, r in _grid((-1e4, -400.0, -60.0, 0.0, 60.0, 1e4), whole, other):
        pairs = [Pair(w, r)]
        exponent = max(-w, -r) * {"forward_kl": 1, "alpha": 0.5}.get(divergence, 0)
        for dtype in DTYPES:
            values, slopes = _ours(name, pairs, n, dtype)
            assert not values.isnan().any(), (w, r, dtype)
            if bool(values.isfinite().all()):
                assert all(math.isfinite(slope) for slope in slopes[0]), (w, r, dtype)
        if exponent < 70 and _is_smooth(name, pairs, n):
            _compare(name, pairs, n)


@pytest.mark.parametrize("divergence", ["forward_kl", "alpha"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_beyond_the_largest_number_a_divergence_keeps_the_order(
    divergence: str, dtype: torch.dtype
) -> None:
    """Completions that both became far less likely than under the reference still have a better
    one: the loss knows which, and its slope pushes them apart."""
    n = Numbers(beta=0.125, divergence=divergence)
    for w, r in ((-900.0, -1000.0), (-9000.0, -1e4), (-200.0, -250.0)):
        (good,), _ = _ours("sigmoid", [Pair(w, r)], n, dtype)
        (bad,), slopes = _ours("sigmoid", [Pair(r, w)], n, dtype)
        assert float(good) < 1e-6
        assert float(bad) > 1
        assert slopes[0][0] < 0 < slopes[0][1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_odds_of_what_is_certain_are_no_nan(dtype: torch.dtype) -> None:
    """A log-prob of exactly 0, as rounding makes it: the odds are infinite, the step is not."""
    for pair in (Pair(0.0, -1.0), Pair(-1.0, 0.0), Pair(0.0, 0.0)):
        values, slopes = _ours("orpo", [pair], Numbers(), dtype)
        assert values.isfinite().all()
        assert all(math.isfinite(slope) for slope in slopes[0])


MIXES: list[dict[str, float]] = [
    {"sigmoid": 1.0, "sft": 0.5},
    {"sigmoid": 0.8, "bco_pair": 0.2},
    {"ipo": 0.01, "cpo": 1.0, "aot": 0.5},
    {"simpo": 2.0, "orpo": 0.3, "hinge": 0.1},
    {"aot_unpaired": 1.0, "exo_pair": 0.5},
]


@pytest.mark.parametrize("mix", MIXES, ids="+".join)
@given(data=st.data())
def test_a_mix_is_its_weighted_sum_whatever_the_micro_batches(
    mix: dict[str, float], data: st.DataObject
) -> None:
    """Value and slopes of the whole as each micro-batch is told them; WPO's weights too."""
    smoothed = all(name in SMOOTHED for name in mix if LOSSES[name].value is not None)
    n = data.draw(numbers("exo_pair" if smoothed else "hinge"))
    pairs = data.draw(some_pairs)
    seen = data.draw(st.floats(-5, 5)), data.draw(st.integers(0, 10))
    n = dataclasses.replace(n, delta=formulas.running_mean(pairs, n.beta, seen))
    assume(all(_is_smooth(name, pairs, n) for name in mix))
    weighed = not mix.keys() & {"aot", "aot_unpaired"} and data.draw(st.booleans())
    weights = [data.draw(st.floats(0.01, 1)) for _ in pairs] if weighed else None
    own = {LOSSES[name].number for name in mix} - {None}
    objective = PreferenceOptimization(
        loss=mix,
        wpo=weighed,
        label_smoothing=n.epsilon,
        beta=n.beta,
        **{option: getattr(_options(n), option) for option in own},
    ).carrying(
        None,
        ft.trees.Tensors(
            reward_sum=torch.tensor(seen[0], dtype=torch.float64),
            reward_count=torch.tensor(float(seen[1]), dtype=torch.float64),
        ),
    )
    parts = data.draw(ft.testing.partitions(len(pairs)))
    cuts = [0, *itertools.accumulate(parts)]
    observed = [
        Observed(
            logps=attrs.evolve(_logps(pairs[a:b], n, torch.float64), offset=None),
            weights=None if weights is None else torch.tensor(weights[a:b], dtype=torch.float64),
        )
        for a, b in itertools.pairwise(cuts)
    ]
    couplings = objective.couple(observed)
    expected = formulas.total(mix, pairs, n, weights)
    steep = formulas.slopes(mix, pairs, n, weights)
    found = sum(float(each.value) for each in couplings)
    assert found == pytest.approx(float(expected), rel=1e-10, abs=1e-10)
    chosen = torch.cat([each.chosen for each in couplings]).tolist()
    rejected = torch.cat([each.rejected for each in couplings]).tolist()
    size = 1e-10 * max(1.0, *(abs(slope) for both in steep for slope in both))
    assert chosen == pytest.approx([w for w, _ in steep], rel=1e-9, abs=size)
    assert rejected == pytest.approx([r for _, r in steep], rel=1e-9, abs=size)
    assert [float(each.value) for each in couplings] == pytest.approx(
        [float(expected) * part / len(pairs) for part in parts], rel=1e-9, abs=1e-9
    ), "each micro-batch's share is by its pairs"


# The same through an objective, whatever is combined, of tokens as unlikely as they can be.


class Table(torch.nn.Module):
    """A model over two tokens: the row of logits that the first token of a sequence names."""

    def __init__(self, rows: Sequence[Sequence[float]]) -> None:
        super().__init__()
        first = torch.full((len(rows), WIDE, 2), math.log(0.5), dtype=torch.float64)
        for row, tokens in zip(first, rows, strict=True):
            for place, logp in enumerate(tokens):
                logits = [logp, math.log(-math.expm1(logp))]
                row[place] = torch.tensor(logits, dtype=torch.float64)
        self.logits = torch.nn.Parameter(first)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.logits[input_ids[:, 0]]


WIDE = 5
tokens = st.lists(
    st.one_of(logps, st.sampled_from(SURE)), min_size=1, max_size=WIDE - 1
)  # the log-probs of a completion
beside = st.lists(st.one_of(logps, st.sampled_from(FAR)), min_size=WIDE - 1, max_size=WIDE - 1)


def _table_batch(rows: Sequence[Sequence[float]], first: int) -> dict[str, Tensor]:
    """Sequences whose completions are all of token 0, from `first` on in the table."""
    labels = torch.full((len(rows), WIDE), -100)
    for row, each in zip(labels, rows, strict=True):
        row[1 : len(each) + 1] = 0
    ids = torch.zeros_like(labels)
    ids[:, 0] = torch.arange(first, first + len(rows))
    return {"input_ids": ids, "labels": labels}


@st.composite
def combined(draw: st.DrawFn) -> dict[str, Any]:
    """A mix of losses, and the modifiers that all of them read."""
    names = draw(st.lists(st.sampled_from(VALUED), min_size=1, max_size=3, unique=True))
    smoothed = all(name in SMOOTHED for name in names)
    names = [name for name in names if smoothed or name != "exo_pair"] or ["hinge"]
    found: dict[str, Any] = {"beta": draw(betas)}
    if smoothed:
        low = 1e-3 if "exo_pair" in names else 0.0
        found["label_smoothing"] = draw(st.floats(low, 0.45))
    if not any(LOSSES[name].by_length for name in names):
        found["ld_alpha"] = draw(st.sampled_from([None, 0.0, 0.25, 1.0]))
    if all(name in NORMALIZABLE for name in names) and found["ld_alpha"] is None:
        found["length_normalized"] = draw(st.booleans())
    if not {"aot", "aot_unpaired"} & set(names):
        found["wpo"] = draw(st.booleans())
    found["loss"] = {name: draw(st.sampled_from([0.2, 1.0, 3.0])) for name in names}
    if draw(st.booleans()):
        found["loss"]["sft"] = 0.5
    return found


def _likely(rows: Sequence[float]) -> Any:
    """exp of the mean of log p − log Σ p² over tokens: WPO's of one side."""
    exact = formulas.EXACT
    found = []
    for logp in rows:
        p = exact.exp(logp)
        found.append(exact.mpf(logp) - exact.log(p**2 + (1 - p) ** 2))
    return exact.exp(sum(found) / len(found))


@given(data=st.data(), options=combined())
@settings(max_examples=3 * settings().max_examples)
def test_whatever_is_combined_is_its_formula_far_out_too(
    data: st.DataObject, options: dict[str, Any]
) -> None:
    """Value and slope by token, of LD-DPO's weighed sums, means over tokens and WPO's weights."""
    drawn = data.draw(st.lists(st.tuples(tokens, tokens, beside, beside), min_size=1, max_size=3))
    policy = [[each[side] for each in drawn] for side in (0, 1)]
    alpha = options.get("ld_alpha")
    alpha = 1.0 if alpha is None else alpha

    def summed(row: Sequence[float], shorter: int) -> Any:
        parts = [formulas.EXACT.mpf(x) * (1 if t < shorter else alpha) for t, x in enumerate(row)]
        return sum(parts)

    pairs = []
    for w, r, below_w, below_r in drawn:
        least = min(len(w), len(r))
        below = below_w[: len(w)], below_r[: len(r)]
        sums = [summed(row, least) for row in (w, r, *below)]
        pairs.append(Pair(*sums, len(w), len(r)))
    n = Numbers(
        beta=options["beta"],
        epsilon=options.get("label_smoothing", 0.0),
        normalized=options.get("length_normalized", False),
        delta=formulas.running_mean(pairs, options["beta"]),
    )
    mix = options["loss"]
    # Losses without a reference read the policy alone.
    bare = [dataclasses.replace(p, reference_chosen=0, reference_rejected=0) for p in pairs]
    assume(all(_is_smooth(name, pairs, n) for name in mix))
    weights = [_likely(w) * _likely(r) for w, r, *_ in drawn] if options.get("wpo") else None
    plain = dataclasses.replace(n, normalized=False)
    parts = [
        ({name: x}, *((pairs, n) if LOSSES[name].reference else (bare, plain)))
        for name, x in mix.items()
    ]
    expected = [formulas.total(*part, weights) for part in parts]
    steep = [formulas.slopes(*part, weights) for part in parts]

    model = Table([*policy[0], *policy[1]])
    batch = {
        side: _table_batch(rows, at * len(drawn))
        for at, (side, rows) in enumerate(zip(SIDES, policy, strict=True))
    }
    batch["reference_logps"] = {
        side: torch.tensor([each[2 + at] for each in drawn], dtype=torch.float64)
        for at, side in enumerate(SIDES)
    }
    objective = PreferenceOptimization(**options)
    total, _ = objective(model, batch)
    value = total[0] if total.ndim else total
    scale = 1.0 + sum(abs(float(each)) for each in expected)
    assert float(value.detach()) == pytest.approx(float(sum(expected)), rel=0, abs=1e-10 * scale)
    (found,) = torch.autograd.grad(value, model.logits)
    assert not found.isnan().any()
    steepest = 1.0 + sum(abs(slope) for each in steep for both in each for slope in both)
    for at, (w, r, *_) in enumerate(drawn):
        least = min(len(w), len(r))
        for side, row in enumerate((w, r)):
            slope = sum(each[at][side] for each in steep)
            for t, logp in enumerate(row):
                wanted = slope * (1 if t < least else alpha) * -math.expm1(logp)
                mine = float(found[side * len(drawn) + at, t, 0])
                assert mine == pytest.approx(wanted, rel=0, abs=1e-9 * steepest)


@given(data=st.data(), beta=betas)
def test_kto_is_its_formula_far_out_too(data: st.DataObject, beta: float) -> None:
    """z₀ and the examples of both kinds, from ±10,000 nats on."""
    drawn = data.draw(
        st.lists(st.tuples(tokens, tokens, beside, beside, st.booleans()), min_size=1, max_size=3)
    )
    sides = {
        side: _table_batch([each[at] for each in drawn], at * len(drawn))
        for at, side in enumerate(("completion", "mismatched"))
    }
    model = Table([each[at] for at in (0, 1) for each in drawn])
    below = {
        side: torch.tensor([each[2 + at] for each in drawn], dtype=torch.float64)
        for at, side in enumerate(sides)
    }
    desirable = [each[4] for each in drawn]
    batch = {**sides, "reference_logps": below, "desirable": torch.tensor(desirable)}
    ratios, mismatched = (
        [
            sum(map(formulas.EXACT.mpf, each[at])) - sum(each[2 + at][: len(each[at])])
            for each in drawn
        ]
        for at in (0, 1)
    )
    factors = (1.5, 0.7)
    objective = UnpairedOptimization(
        beta=beta, desirable_weight=factors[0], undesirable_weight=factors[1]
    )
    total, _ = objective(model, batch)
    expected = sum(formulas.kto_values(ratios, mismatched, desirable, beta, factors))
    assert float(total.detach()) == pytest.approx(float(expected), rel=1e-10, abs=1e-10)
    (found,) = torch.autograd.grad(total, model.logits)
    assert not found.isnan().any()
    reference_point = max(0.0, float(sum(mismatched) / len(mismatched)))
    for at, (own, *_, good) in enumerate(drawn):
        gain = beta * (float(ratios[at]) - reference_point)
        gate = formulas.sigma(formulas.EXACT.mpf(gain))
        slope = (-factors[0] if good else factors[1]) * beta * float(gate * (1 - gate))
        for t, logp in enumerate(own):
            wanted = slope * -math.expm1(logp)
            assert float(found[at, t, 0]) == pytest.approx(wanted, rel=1e-9, abs=1e-10)


# The same through a step: log-probs by hand, one example at a time and without its padding.

SEEN = (3.0, 10.0)
"""The sum and number of rewards that a state of `bco_pair` has seen."""


@dataclasses.dataclass(frozen=True)
class Scored:
    """Of one sequence: log-probs of its completion, log Σ p² beside, and of the whole of it."""

    completion: Tensor
    collision: Tensor
    sequence: Tensor


def _by_hand(model: Any, side: dict[str, Tensor]) -> list[Scored]:
    found = []
    for row in range(len(side["labels"])):
        end = int(side["attention_mask"][row].sum())
        ids, labels = side["input_ids"][row, :end], side["labels"][row, :end]
        logps = model(ids.unsqueeze(0))[0, :-1].log_softmax(-1)
        own = logps.gather(1, ids[1:].unsqueeze(1)).squeeze(1)
        mask = labels[1:] != -100
        found.append(Scored(own[mask], logps[mask].exp().square().sum(-1).log(), own))
    return found


def _decoder() -> Any:
    return zoo.decoder(layers=1).double()


def _models(case: str, **options: Any) -> tuple[Any, ft.TrainState, Any, Any]:
    """A step and its state, with the policy and the reference as modules of their own."""
    architecture, params, buffers = ft.split(_decoder())
    chosen, other = (formulas.elsewhere(params, seed, 0.3) for seed in (1, 2))
    step = formulas.step_of(case, architecture, other, **options)
    state = step.init(chosen, buffers)
    if state.running is not None:
        seen = dict(zip(("reward_sum", "reward_count"), map(torch.tensor, SEEN), strict=True))
        running = ft.trees.map_leaves(lambda tensor: tensor.double(), seen)
        state = attrs.evolve(state, running=running)
    modules = []
    for values in (chosen, other):
        module = _decoder().eval()
        module.load_state_dict(dict(values), strict=False)
        modules.append(module)
    return step, state, *modules


BETA = 0.4


class ByHand:
    """The pairs of a case as the formulas take them, each of its sums with its history."""

    def __init__(self, case: str, batch: Any, policy: Any, reference: Any) -> None:
        self.options = formulas.CASES[case]
        loss = self.options["loss"]
        self.mix = {loss: 1.0} if isinstance(loss, str) else dict(loss)
        self.chosen, self.rejected = (_by_hand(policy, batch[side]) for side in SIDES)
        with torch.no_grad():
            others = [_by_hand(reference, batch[side]) for side in SIDES]
        self.sums: list[tuple[Tensor, Tensor]] = []
        self.pairs: list[Pair] = []
        for w, r, *below in zip(self.chosen, self.rejected, *others, strict=True):
            counts = len(w.completion), len(r.completion)
            both = self._summed(w, min(counts)), self._summed(r, min(counts))
            refs = [float(self._summed(each, min(counts))) for each in below]
            refs = refs if formulas.referred(case) else [0.0, 0.0]
            self.sums.append(both)
            self.pairs.append(Pair(*(float(each.detach()) for each in both), *refs, *counts))
        self.numbers = Numbers(
            beta=BETA,
            epsilon=self.options.get("label_smoothing", 0.0),
            divergence=self.options.get("divergence", "reverse_kl"),
            alpha=self.options.get("divergence_alpha", 0.5),
            normalized=self.options.get("length_normalized", False),
            delta=formulas.running_mean(self.pairs, BETA, SEEN),
        )

    def _summed(self, scored: Scored, shorter: int) -> Tensor:
        """LD-DPO: what is beyond the shorter completion's length counts α of it."""
        alpha, tokens = self.options.get("ld_alpha", 1.0), scored.completion
        return tokens[:shorter].sum() + alpha * tokens[shorter:].sum()

    @property
    def weights(self) -> list[float] | None:
        """WPO's: how likely the policy finds both sides."""
        if not self.options.get("wpo"):
            return None
        found = []
        for both in zip(self.chosen, self.rejected, strict=True):
            means = [float((e.completion - e.collision).detach().mean()) for e in both]
            found.append(math.exp(sum(means)))
        assert min(found) < 0.9
        assert max(found) > 1.1
        return found

    @property
    def negative_likelihoods(self) -> list[tuple[float, Tensor]]:
        """The factor and the mean over tokens of each −log-likelihood of the mix."""
        return [(factor, each) for factor, each, _ in self._likelihoods()]

    def _likelihoods(self) -> list[tuple[float, Tensor, str]]:
        found = []
        for name, weight in self.mix.items():
            if name in ("sft", "cpo", "orpo"):
                part = "sequence" if name == "orpo" else "completion"
                tokens = torch.cat([getattr(each, part) for each in self.chosen])
                factor = self.options.get("cpo_alpha", 1.0) if name == "cpo" else 1.0
                found.append((weight * factor, -tokens.mean(), part))
        return found

    @property
    def loss(self) -> float:
        """The whole loss."""
        value = float(formulas.total(self.mix, self.pairs, self.numbers, self.weights))
        likelihood = sum(
            factor * float(each.detach()) for factor, each in self.negative_likelihoods
        )
        return value / len(self.pairs) + likelihood

    @property
    def surrogate(self) -> Tensor:
        """What has the loss's gradient: each sum times its slope by the formula."""
        slopes = formulas.slopes(self.mix, self.pairs, self.numbers, self.weights)
        total = sum(factor * each for factor, each in self.negative_likelihoods)
        for both, sums in zip(slopes, self.sums, strict=True):
            total = total + sum(s * x for s, x in zip(both, sums, strict=True)) / len(self.pairs)
        assert isinstance(total, Tensor)
        return total

    def metrics(self) -> dict[str, float]:
        """What a dashboard shows of them."""
        pairs, count = self.pairs, len(self.pairs)
        rewards = [
            (BETA * (p.chosen - p.reference_chosen), BETA * (p.rejected - p.reference_rejected))
            for p in pairs
        ]
        tokens, others = (
            torch.cat([each.completion.detach() for each in side])
            for side in (self.chosen, self.rejected)
        )
        found = {
            "loss": self.loss,
            "rewards/chosen": sum(w for w, _ in rewards) / count,
            "rewards/rejected": sum(r for _, r in rewards) / count,
            "rewards/margins": sum(w - r for w, r in rewards) / count,
            "rewards/accuracies": sum(w > r for w, r in rewards) / count,
            "logps/chosen": float(tokens.sum()) / count,
            "logps/rejected": float(others.sum()) / count,
            "perplexity": math.exp(-float(tokens.mean())),
            "num_tokens": len(tokens) + len(others),
        }
        likelihoods = {part: float(each.detach()) for _, each, part in self._likelihoods()}
        for part, value in likelihoods.items():
            found["nll_loss" if len(likelihoods) == 1 else f"nll_loss/{part}"] = value
        if "orpo" in self.mix:
            ratios = [
                formulas.odds(formulas.EXACT.mpf(p.chosen) / p.chosen_length)
                - formulas.odds(formulas.EXACT.mpf(p.rejected) / p.rejected_length)
                for p in pairs
            ]
            found["log_odds_chosen"] = float(sum(ratios)) / count
            found["log_odds_ratio"] = float(sum(map(formulas.log_sigma, ratios))) / count
        return found


def _with_a_likely_pair(batch: Any, policy: Any) -> Any:
    """The first pair's completions as the policy itself would go on: WPO's weight is above 1."""
    batch = {side: {key: t.clone() for key, t in batch[side].items()} for side in SIDES}
    for side in batch.values():
        for at in range(1, int(side["attention_mask"][0].sum())):
            with torch.no_grad():
                token = policy(side["input_ids"][:1, :at])[0, -1].argmax()
            side["input_ids"][0, at] = token
            side["labels"][0, at] = token if side["labels"][0, at] != -100 else -100
    return batch


def _gradient(step: ft.Step, state: ft.TrainState, batch: Any) -> Any:
    return step.value_and_grad(
        state.params, state.buffers, batch, objective=step.objective_of(state)
    )


def _assert_grads(found: Any, surrogate: Tensor, module: Any) -> None:
    names, leaves = zip(*module.named_parameters(), strict=True)
    expected = torch.autograd.grad(surrogate, leaves)
    size = max(float(each.abs().max()) for each in expected)
    assert size > 1e-6
    for name, grad in zip(names, expected, strict=True):
        torch.testing.assert_close(found[name], grad, rtol=1e-9, atol=1e-11 * size, msg=name)


@pytest.mark.parametrize("case", formulas.PAIRED)
def test_a_step_minimises_the_formula_and_reports_what_it_says(case: str) -> None:
    """Loss, gradient and metrics of a whole step, completions of many lengths."""
    step, state, policy, reference = _models(case, beta=BETA)
    batch = _with_a_likely_pair(formulas.batch_of(case, seed=3, examples=5), policy)
    expected = ByHand(case, batch, policy, reference)
    found, wanted = _gradient(step, state, batch), expected.metrics()
    for name, value in wanted.items():
        assert float(found.metrics[name]) == pytest.approx(value, rel=1e-10, abs=1e-12), name
    shown = {name for name in found.metrics if "nll_loss" in name}
    assert shown == {name for name in wanted if "nll_loss" in name}
    _assert_grads(found.grads, expected.surrogate, policy)


class _Copies(TorchFunctionMode):
    """Counts the tensors that are made of a value of the host for a device, and `tolist`."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # By its name alone "cpu" is the host; that of another tensor may be any device.
        device = (kwargs or {}).get("device", "cpu")
        made = func in (torch.tensor, torch.as_tensor) and device != "cpu"
        self.count += made or func in (Tensor.new_tensor, Tensor.tolist, Tensor.numpy)
        return func(*args, **(kwargs or {}))


WAITING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal")


class _Waits(TorchDispatchMode):
    """Where in the package a number is taken to the host by `item`, `bool` or `float`, or a shape
    depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.places: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masked = func.name() == "aten::index.Tensor" and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if masked or func.name() in WAITING:
            frame: Any = sys._getframe(1)
            while not frame.f_globals.get("__name__", "").startswith("functrain."):
                frame = frame.f_back
            self.places.add(frame.f_code.co_qualname.split(".<locals>")[0].split(".")[-1])
        return func(*args, **(kwargs or {}))


# What looks at numbers where they are on the CPU anyway, and nowhere else.
ON_THE_CPU = {
    *("_check_range", "_check_labels", "check_completions", "_check_different"),
    *("held_back", "rate_of", "_where", "learning_rate", "_first"),
}


@pytest.mark.parametrize("case", formulas.CASES)
def test_a_step_copies_no_number_from_the_host_and_takes_none_there(case: str) -> None:
    """On an accelerator each may be a wait; a fill is none. What the CPU shows of it: a copy of a
    tensor from device to device is not seen."""
    step, state, *_ = _models(case, microbatches=2)
    step(state, formulas.batch_of(case))  # what is found once is found
    with _Copies() as copies, _Waits() as waits:
        step(state, formulas.batch_of(case))
    assert copies.count == 0
    assert waits.places <= ON_THE_CPU
    assert {"_check_range", "_where"} <= waits.places, "and what is there is seen"


@pytest.mark.parametrize(
    "wait",
    [
        lambda t: t.sum().item(),
        lambda t: bool((t > 0).any()),
        lambda t: float(t.mean()),
        lambda t: t.tolist(),
        lambda t: t.new_tensor(1.0),
        lambda t: torch.tensor(1.0, device=t.device),
        lambda t: t[t > 0],
        torch.nonzero,
    ],
)
def test_a_wait_in_a_loss_would_be_seen(wait: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    step, state, *_ = _models("sigmoid")
    original = PreferenceOptimization._pair_loss

    def waiting(self: Any, observed: Any, coupling: Any) -> Any:
        wait(observed.logps.chosen.detach())
        return original(self, observed, coupling)

    monkeypatch.setattr(PreferenceOptimization, "_pair_loss", waiting)
    with _Copies() as copies, _Waits() as waits:
        step(state, formulas.batch_of("sigmoid"))
    assert copies.count or not waits.places <= ON_THE_CPU


@pytest.mark.parametrize("nearer", [False, True])
def test_a_step_of_kto_minimises_the_formula_and_reports_what_it_says(nearer: bool) -> None:
    """z₀ is the mean Δ of the mismatched where that is above 0, and else 0."""
    step, state, policy, other = _models("kto", beta=BETA)
    batch = formulas.batch_of("kto", examples=5)
    if nearer:  # policy and reference in each other's place
        reference = state.params
        state = attrs.evolve(state, params=step.objective.reference)
        step = attrs.evolve(step, objective=attrs.evolve(step.objective, reference=reference))
        policy, other = other, policy
    own = [each.completion.sum() for each in _by_hand(policy, batch["completion"])]
    with torch.no_grad():
        theirs = [float(each.completion.sum()) for each in _by_hand(other, batch["completion"])]
        mismatched = [
            float(a.completion.sum() - b.completion.sum())
            for a, b in zip(
                _by_hand(policy, batch["mismatched"]),
                _by_hand(other, batch["mismatched"]),
                strict=True,
            )
        ]
    desirable = batch["desirable"].tolist()
    ratios = [float(a.detach()) - b for a, b in zip(own, theirs, strict=True)]
    factors = (1.5, 0.7)

    def value(at: int, ratio: Any) -> Any:
        shifted = [*ratios[:at], ratio, *ratios[at + 1 :]]
        return sum(formulas.kto_values(shifted, mismatched, desirable, 0.4, factors))

    surrogate = sum(
        float(formulas.EXACT.diff(lambda x, at=at: value(at, x), ratio)) / 5 * own[at]
        for at, ratio in enumerate(ratios)
    )
    rewards = {
        side: [0.4 * x for x, good in zip(ratios, desirable, strict=True) if good is wanted]
        for side, wanted in (("chosen", True), ("rejected", False))
    }
    logps = {
        side: [float(x.detach()) for x, good in zip(own, desirable, strict=True) if good is wanted]
        for side, wanted in (("chosen", True), ("rejected", False))
    }
    expected = {
        "loss": float(value(0, ratios[0])) / 5,
        "kl": max(0.0, sum(mismatched) / 5),
        **{f"rewards/{side}": sum(each) / len(each) for side, each in rewards.items()},
        **{f"logps/{side}": sum(each) / len(each) for side, each in logps.items()},
    }
    found = _gradient(step, state, batch)
    for name, wanted in expected.items():
        assert float(found.metrics[name]) == pytest.approx(wanted, rel=1e-10, abs=1e-12), name
    _assert_grads(found.grads, surrogate, policy)
    assert (expected["kl"] > 0) is nearer
