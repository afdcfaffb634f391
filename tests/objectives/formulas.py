"""The preference losses once more, from their definitions: one pair at a time, in 50 digits.

Nothing here is shared with the package: plain recursion over numbers of mpmath, which neither
overflow nor cancel, so that what is exact at 1 is exact at ±10,000 too. Beside them are the cases
that every law of the family is applied to, and the batches for them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mpmath
import torch
import zoo
from torch import Tensor

import functrain as ft

EXACT = mpmath.mp.clone()
EXACT.dps = 50

Number = Any
"""A number of mpmath, or what it makes one of."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """Summed log-probs of a pair, and how many tokens they are of."""

    chosen: Number
    rejected: Number
    reference_chosen: Number = 0
    reference_rejected: Number = 0
    chosen_length: int = 1
    rejected_length: int = 1


@dataclasses.dataclass(frozen=True)
class Numbers:
    """The numbers of the formulas; `delta`: δ of `bco_pair`; `normalized`: Δ by token."""

    beta: float = 0.1
    epsilon: float = 0.0
    gamma: float = 0.5
    lam: float = 0.1
    tau: float = 0.05
    divergence: str = "reverse_kl"
    alpha: float = 0.5
    normalized: bool = False
    delta: Number = 0


def sigma(x: Number) -> Number:
    """σ(x)."""
    return 1 / (1 + EXACT.exp(-x))


def log_sigma(x: Number) -> Number:
    """log σ(x)."""
    return -EXACT.log1p(EXACT.exp(-x))


def moved(ratio: Number, length: int, n: Numbers) -> Number:
    """What stands for Δ: by token where normalised, and under the f-divergence."""
    x = EXACT.mpf(ratio) / length if n.normalized else EXACT.mpf(ratio)
    if n.divergence == "forward_kl":
        return 1 - EXACT.exp(-x)
    if n.divergence == "jensen_shannon":
        return EXACT.log(2) + log_sigma(x)
    if n.divergence == "alpha":
        return (EXACT.exp((EXACT.mpf(n.alpha) - 1) * x) - 1) / (EXACT.mpf(n.alpha) - 1)
    return x


def margin(p: Pair, n: Numbers) -> Number:
    """m, of what stands for Δ."""
    w = moved(EXACT.mpf(p.chosen) - p.reference_chosen, p.chosen_length, n)
    return w - moved(EXACT.mpf(p.rejected) - p.reference_rejected, p.rejected_length, n)


def odds(mean: Number) -> Number:
    """log p/(1 − p) of a mean log-prob."""
    return mean - EXACT.log(1 - EXACT.exp(mean))


def of_pair(name: str, p: Pair, n: Numbers) -> Number:
    """A loss of the table that is a sum over pairs, of one pair."""
    b, e = EXACT.mpf(n.beta), EXACT.mpf(n.epsilon)
    w = moved(EXACT.mpf(p.chosen) - p.reference_chosen, p.chosen_length, n)
    r = moved(EXACT.mpf(p.rejected) - p.reference_rejected, p.rejected_length, n)
    mean_w = EXACT.mpf(p.chosen) / p.chosen_length
    mean_r = EXACT.mpf(p.rejected) / p.rejected_length
    by_token = w / p.chosen_length - r / p.rejected_length

    def smoothed(x: Number) -> Number:
        return -(1 - e) * log_sigma(x) - e * log_sigma(-x)

    match name:
        case "sigmoid":
            return smoothed(b * (w - r))
        case "sigmoid_norm":
            return smoothed(b * by_token)
        case "hinge":
            return max(EXACT.mpf(0), 1 - b * (w - r))
        case "ipo":
            return (by_token - 1 / (2 * b)) ** 2
        case "ipo_sum":
            return (w - r - 1 / (2 * b)) ** 2
        case "robust":
            x = b * (w - r)
            return (-(1 - e) * log_sigma(x) + e * log_sigma(-x)) / (1 - 2 * e)
        case "exo_pair":
            x = b * (w - r)
            right = sigma(x) * (log_sigma(x) - EXACT.log(1 - e))
            return right + sigma(-x) * (log_sigma(-x) - EXACT.log(e))
        case "nca_pair":
            return -log_sigma(b * w) - log_sigma(-b * w) / 2 - log_sigma(-b * r) / 2
        case "bco_pair":
            return -log_sigma(b * w - n.delta) - log_sigma(-(b * r - n.delta))
        case "sppo_hard":
            return (w - 1 / (2 * b)) ** 2 + (r + 1 / (2 * b)) ** 2
        case "discopop":
            rho = b * (w - r)
            gate = sigma(rho / EXACT.mpf(n.tau))
            return (1 - gate) * -log_sigma(rho) + gate * EXACT.exp(-rho)
        case "apo_zero":
            return 1 - sigma(b * w) + sigma(b * r)
        case "apo_down":
            return sigma(b * w) + 1 - sigma(b * (w - r))
        case "cpo":
            return smoothed(b * (EXACT.mpf(p.chosen) - p.rejected))
        case "simpo":
            return smoothed(b * (mean_w - mean_r) - EXACT.mpf(n.gamma))
        case "orpo":
            return -EXACT.mpf(n.lam) * log_sigma(odds(mean_w) - odds(mean_r))
        case "sft":
            return EXACT.mpf(0)
    raise ValueError(name)


def sorted_margins(name: str, pairs: Sequence[Pair], n: Numbers) -> list[Number]:
    """d of the two AOT losses."""
    if name == "aot":
        above = sorted(EXACT.mpf(p.chosen) - p.rejected for p in pairs)
        below = sorted(EXACT.mpf(p.reference_chosen) - p.reference_rejected for p in pairs)
    else:
        above = sorted(
            moved(EXACT.mpf(p.chosen) - p.reference_chosen, p.chosen_length, n) for p in pairs
        )
        below = sorted(
            moved(EXACT.mpf(p.rejected) - p.reference_rejected, p.rejected_length, n) for p in pairs
        )
    return [a - b for a, b in zip(above, below, strict=True)]


def values(name: str, pairs: Sequence[Pair], n: Numbers) -> list[Number]:
    """The loss of each pair; of an AOT loss, of each rank."""
    if name not in ("aot", "aot_unpaired"):
        return [of_pair(name, p, n) for p in pairs]
    b, e = EXACT.mpf(n.beta), EXACT.mpf(n.epsilon)
    return [
        -(1 - e) * log_sigma(b * d) - e * log_sigma(-b * d) for d in sorted_margins(name, pairs, n)
    ]


def total(
    mix: Mapping[str, float],
    pairs: Sequence[Pair],
    n: Numbers,
    weights: Sequence[Number] | None = None,
) -> Number:
    """Σ over losses and pairs, each loss by its weight in the mix, each pair by its own."""
    weights = [1] * len(pairs) if weights is None else weights
    return sum(
        EXACT.mpf(factor) * weight * value
        for name, factor in mix.items()
        for weight, value in zip(weights, values(name, pairs, n), strict=True)
    )


def slopes(
    mix: Mapping[str, float],
    pairs: Sequence[Pair],
    n: Numbers,
    weights: Sequence[Number] | None = None,
) -> list[tuple[float, float]]:
    """d total / d (chosen, rejected) of each pair, by differences in twice the digits."""
    sorts = any(name in mix for name in ("aot", "aot_unpaired"))
    nearby = EXACT.mpf(10) ** -EXACT.dps

    def of(index: int, pair: Pair) -> Number:
        if not sorts:  # the other terms do not change
            return total(mix, [pair], n, None if weights is None else [weights[index]])
        return total(mix, [*pairs[:index], pair, *pairs[index + 1 :]], n, weights)

    def slope(index: int, side: str, here: Number) -> float:
        moved = EXACT.mpf(getattr(pairs[index], side)) + nearby
        there = of(index, dataclasses.replace(pairs[index], **{side: moved}))
        return float((there - here) / nearby)

    with EXACT.workdps(2 * EXACT.dps):
        here = [of(index, pair) for index, pair in enumerate(pairs)]
        return [(slope(i, "chosen", h), slope(i, "rejected", h)) for i, h in enumerate(here)]


def running_mean(pairs: Sequence[Pair], beta: float, seen: tuple[Number, int] = (0, 0)) -> Number:
    """δ: the mean of the rewards of both sides, of these pairs and of what was seen before."""
    rewards = [
        EXACT.mpf(beta) * (policy - reference)
        for p in pairs
        for policy, reference in (
            (EXACT.mpf(p.chosen), p.reference_chosen),
            (EXACT.mpf(p.rejected), p.reference_rejected),
        )
    ]
    return (sum(rewards) + seen[0]) / (len(rewards) + seen[1])


def kto_values(
    ratios: Sequence[Number],
    mismatched: Sequence[Number],
    desirable: Sequence[bool],
    beta: float,
    factors: tuple[float, float],
) -> list[Number]:
    """KTO's loss of each example; `mismatched`: Δ of those that z₀ is the mean of."""
    reference_point = max(EXACT.mpf(0), sum(map(EXACT.mpf, mismatched)) / len(mismatched))
    return [
        factors[0] * (1 - sigma(EXACT.mpf(beta) * (ratio - reference_point)))
        if good
        else factors[1] * (1 - sigma(EXACT.mpf(beta) * (reference_point - ratio)))
        for ratio, good in zip(ratios, desirable, strict=True)
    ]


# What the laws are applied to.

CASES: Mapping[str, Mapping[str, Any]] = {
    **{name: {"loss": name} for name in ft.objectives.LOSSES},
    "exo_pair": {"loss": "exo_pair", "label_smoothing": 1e-3},
    "cpo": {"loss": "cpo", "cpo_alpha": 0.5},
    "conservative": {"loss": "sigmoid", "label_smoothing": 0.1},
    "robust": {"loss": "robust", "label_smoothing": 0.2},
    "forward_kl": {"loss": "sigmoid", "divergence": "forward_kl"},
    "jensen_shannon": {"loss": "hinge", "divergence": "jensen_shannon"},
    "alpha": {"loss": "sigmoid_norm", "divergence": "alpha", "divergence_alpha": 0.3},
    "normalized": {"loss": "apo_zero", "length_normalized": True},
    "ld": {"loss": "sigmoid", "ld_alpha": 0.3},
    "wpo": {"loss": "sigmoid", "wpo": True},
    "wpo_bco": {"loss": "bco_pair", "wpo": True},
    "rpo": {"loss": {"sigmoid": 1.0, "sft": 0.2}},
    "mpo": {"loss": {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}},
    "everything": {"loss": {"aot": 0.5, "orpo": 0.3, "cpo": 0.2, "ipo": 0.01}},
    "kto": {"desirable_weight": 1.5, "undesirable_weight": 0.7},
}
"""Every loss by its name, with what it needs; and every modifier and some mixes."""

PAIRED = [case for case in CASES if case != "kto"]


def referred(case: str) -> bool:
    """Whether a case's loss reads a reference."""
    if case == "kto":
        return True
    loss = CASES[case]["loss"]
    names = [loss] if isinstance(loss, str) else list(loss)
    return any(name not in ("sft", "cpo", "simpo", "orpo") for name in names)


def coupled(case: str) -> bool:
    """Whether a case's loss of one pair depends on the others."""
    return case in ("aot", "aot_unpaired", "bco_pair", "wpo_bco", "mpo", "everything", "kto")


def step_of(case: str, architecture: Any, reference: Any, **options: Any) -> ft.Step:
    """The step of a case; `reference` is left out where the loss reads none."""
    make: Callable[..., ft.Step] = ft.kto_step if case == "kto" else ft.dpo_step
    if referred(case):
        options["reference"] = reference
    optimizer = options.pop("optimizer", ft.optim.adamw(1e-2))
    return make(architecture, optimizer, **{**CASES[case], **options})


def elsewhere(params: Mapping[str, Tensor], seed: int = 5, size: float = 0.05) -> ft.trees.Tensors:
    """Other params of the same architecture, near these."""
    generator = torch.Generator().manual_seed(seed)
    return ft.trees.map_leaves(
        lambda t: t + size * torch.randn(t.shape, generator=generator, dtype=t.dtype), params
    )


def side(seed: int, examples: int, time: int) -> dict[str, Tensor]:
    """Prompts and completions of many lengths, padded at the end and masked."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, zoo.VOCABULARY, (examples, time), generator=generator)
    ends = torch.randint(4, time + 1, (examples, 1), generator=generator)
    begins = torch.randint(1, 3, (examples, 1), generator=generator)
    places = torch.arange(time).expand_as(ids)
    mask = (places < ends).long()
    labels = ids.masked_fill((places < begins) | (places >= ends), -100)
    return {"input_ids": ids * mask, "labels": labels, "attention_mask": mask}


def batch_of(case: str, seed: int = 0, examples: int = 4, time: int = 8) -> dict[str, Any]:
    """A batch for a case, of sides of different time."""
    one, other = side(2 * seed, examples, time), side(2 * seed + 1, examples, time + 2)
    if case != "kto":
        return {"chosen": one, "rejected": other}
    desirable = torch.arange(examples) % 3 != 1
    return {"completion": one, "mismatched": other, "desirable": desirable}
