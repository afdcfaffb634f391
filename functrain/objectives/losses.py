"""The preference losses: small pure functions of a pair's log-probs, registered by name.

Notation, as in the papers: w the chosen and l the rejected completion; Δ the policy's summed
log-prob less the reference's; m = Δ_w − Δ_l; |y| a completion's length in tokens; ℓ the policy's
summed log-prob and ℓ̄ its mean over tokens; ε label smoothing; σ the logistic function. All are in
nats and are minimised. Each takes `PairLogps` and `Options` and gives a value for each pair.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

Divergence = Callable[[Tensor], Tensor]


@attrs.frozen(kw_only=True, eq=False)
class PairLogps:
    """What a preference loss reads of each pair, float [pairs], in nats.

    `chosen`, `rejected`: the policy's log-probs, summed over completion tokens; `reference_…`: the
    reference's, None for a loss without one. `…_length`: completion tokens, int64 [pairs].
    `divergence`: the function of Δ that replaces it, if any. `normalized`: whether Δ is divided by
    the completion's length. `offset`: δ of `bco_pair`, 0-d.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_length: Tensor
    rejected_length: Tensor
    reference_chosen: Tensor | None = None
    reference_rejected: Tensor | None = None
    divergence: Divergence | None = None
    normalized: bool = False
    offset: Tensor | None = None

    @property
    def ratio_chosen(self) -> Tensor:
        """log π(y_w) − log ref(y_w); the reward is β times this."""
        return self.chosen if self.reference_chosen is None else self.chosen - self.reference_chosen

    @property
    def ratio_rejected(self) -> Tensor:
        """log π(y_l) − log ref(y_l)."""
        reference = self.reference_rejected
        return self.rejected if reference is None else self.rejected - reference

    @property
    def delta_chosen(self) -> Tensor:
        """Δ_w, or what the modifiers make of it."""
        return self._modified(self.ratio_chosen, self.chosen_length)

    @property
    def delta_rejected(self) -> Tensor:
        """Δ_l, or what the modifiers make of it."""
        return self._modified(self.ratio_rejected, self.rejected_length)

    @property
    def margin(self) -> Tensor:
        """m = Δ_w − Δ_l."""
        return self.delta_chosen - self.delta_rejected

    def _modified(self, ratio: Tensor, length: Tensor) -> Tensor:
        if self.normalized:
            ratio = ratio / length
        return ratio if self.divergence is None else self.divergence(ratio)


@attrs.frozen(kw_only=True)
class Options:
    """The losses' hyperparameters; each loss reads those in its formula."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5
    cpo_alpha: float = 1.0
    orpo_lambda: float = 0.1
    discopop_tau: float = 0.05


Value = Callable[[PairLogps, Options], Tensor]


def sigmoid(p: PairLogps, o: Options) -> Tensor:
    """−(1−ε)·logσ(βm) − ε·logσ(−βm): DPO (2305.18290), with ε > 0 conservative DPO."""
    return _smoothed(o.beta * p.margin, o.label_smoothing)


def sigmoid_norm(p: PairLogps, o: Options) -> Tensor:
    """`sigmoid` of β(Δ_w/|y_w| − Δ_l/|y_l|): DPO by token (Tülu 3, 2411.15124)."""
    margin = p.delta_chosen / p.chosen_length - p.delta_rejected / p.rejected_length
    return _smoothed(o.beta * margin, o.label_smoothing)


def hinge(p: PairLogps, o: Options) -> Tensor:
    """max(0, 1 − βm): SLiC (2305.10425) and RSO (2309.06657)."""
    return F.relu(1 - o.beta * p.margin)


def ipo(p: PairLogps, o: Options) -> Tensor:
    """(Δ_w/|y_w| − Δ_l/|y_l| − 1/(2β))²: IPO (2310.12036), on token means as in TRL."""
    chosen = p.delta_chosen / p.chosen_length
    rejected = p.delta_rejected / p.rejected_length
    return (chosen - rejected - 1 / (2 * o.beta)) ** 2


def ipo_sum(p: PairLogps, o: Options) -> Tensor:
    """(m − 1/(2β))²: IPO (2310.12036), on sums as in the paper."""
    return (p.margin - 1 / (2 * o.beta)) ** 2


def robust(p: PairLogps, o: Options) -> Tensor:
    """[−(1−ε)·logσ(βm) + ε·logσ(−βm)] / (1−2ε): robust DPO (2403.00409), ε < ½."""
    scaled, smoothing = o.beta * p.margin, o.label_smoothing
    signed = -(1 - smoothing) * F.logsigmoid(scaled) + smoothing * F.logsigmoid(-scaled)
    return signed / (1 - 2 * smoothing)


def exo_pair(p: PairLogps, o: Options) -> Tensor:
    """σ(βm)[logσ(βm) − log(1−ε)] + σ(−βm)[logσ(−βm) − log ε]: EXO (2402.00856), ε > 0."""
    scaled = o.beta * p.margin
    smoothing = torch.full((), o.label_smoothing, dtype=scaled.dtype, device=scaled.device)
    right = scaled.sigmoid() * (F.logsigmoid(scaled) - torch.log1p(-smoothing))
    wrong = (-scaled).sigmoid() * (F.logsigmoid(-scaled) - torch.log(smoothing))
    return right + wrong


def nca_pair(p: PairLogps, o: Options) -> Tensor:
    """−logσ(βΔ_w) − ½logσ(−βΔ_w) − ½logσ(−βΔ_l): NCA (2402.05369)."""
    chosen, rejected = o.beta * p.delta_chosen, o.beta * p.delta_rejected
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def bco_pair(p: PairLogps, o: Options) -> Tensor:
    """−logσ(βΔ_w − δ) − logσ(−(βΔ_l − δ)): BCO (2404.04656), δ the running mean reward."""
    assert p.offset is not None  # the objective gives it
    chosen, rejected = o.beta * p.delta_chosen, o.beta * p.delta_rejected
    return -F.logsigmoid(chosen - p.offset) - F.logsigmoid(-(rejected - p.offset))


def sppo_hard(p: PairLogps, o: Options) -> Tensor:
    """(Δ_w − 1/(2β))² + (Δ_l + 1/(2β))²: SPPO with hard labels (2405.00675)."""
    half = 1 / (2 * o.beta)
    return (p.delta_chosen - half) ** 2 + (p.delta_rejected + half) ** 2


def aot(p: PairLogps, o: Options) -> Tensor:
    """`sigmoid` of βd, d = sort(ℓ_w − ℓ_l) − sort(the reference's): AOT, paired (2406.05882).

    The sorts go over the batch: batch-coupled.
    """
    assert p.reference_chosen is not None
    assert p.reference_rejected is not None
    policy = torch.sort(p.chosen - p.rejected).values
    reference = torch.sort(p.reference_chosen - p.reference_rejected).values
    return _smoothed(o.beta * (policy - reference), o.label_smoothing)


def aot_unpaired(p: PairLogps, o: Options) -> Tensor:
    """`sigmoid` of βd, d = sort(Δ_w) − sort(Δ_l): AOT, unpaired (2406.05882). Batch-coupled."""
    d = torch.sort(p.delta_chosen).values - torch.sort(p.delta_rejected).values
    return _smoothed(o.beta * d, o.label_smoothing)


def discopop(p: PairLogps, o: Options) -> Tensor:
    """(1−g)(−logσ(ρ)) + g·e^{−ρ}, ρ = βm, g = σ(ρ/τ): DiscoPOP (2406.08414).

    The second term as e^{logσ(ρ/τ) − ρ}, which is finite where e^{−ρ} alone is not.
    """
    rho = o.beta * p.margin
    gate = rho / o.discopop_tau
    return (-gate).sigmoid() * -F.logsigmoid(rho) + torch.exp(F.logsigmoid(gate) - rho)


def apo_zero(p: PairLogps, o: Options) -> Tensor:
    """1 − σ(βΔ_w) + σ(βΔ_l): APO (2408.06266), chosen up and rejected down."""
    return (-o.beta * p.delta_chosen).sigmoid() + (o.beta * p.delta_rejected).sigmoid()


def apo_down(p: PairLogps, o: Options) -> Tensor:
    """σ(βΔ_w) + 1 − σ(βm): APO (2408.06266), both down, the rejected further."""
    return (o.beta * p.delta_chosen).sigmoid() + (-o.beta * p.margin).sigmoid()


def cpo(p: PairLogps, o: Options) -> Tensor:
    """−logσ(β(ℓ_w − ℓ_l)), beside α·NLL(y_w): CPO (2401.08417), without a reference."""
    return _smoothed(o.beta * p.margin, o.label_smoothing)


def simpo(p: PairLogps, o: Options) -> Tensor:
    """−logσ(β(ℓ̄_w − ℓ̄_l) − γ): SimPO (2405.14734), without a reference."""
    margin = p.chosen / p.chosen_length - p.rejected / p.rejected_length
    return _smoothed(o.beta * margin - o.simpo_gamma, o.label_smoothing)


def log_odds(p: PairLogps) -> tuple[Tensor, Tensor]:
    """o = ℓ̄ − log(1 − e^{ℓ̄}) of chosen and rejected: ORPO's log odds of a token.

    A mean that rounding made 0, a certainty, gets the largest finite odds.
    """

    def odds(total: Tensor, length: Tensor) -> Tensor:
        mean = (total / length).clamp(max=-torch.finfo(total.dtype).tiny)
        return mean - torch.log(-torch.expm1(mean))

    return odds(p.chosen, p.chosen_length), odds(p.rejected, p.rejected_length)


def orpo(p: PairLogps, o: Options) -> Tensor:
    """−λ·logσ(o_w − o_l), beside NLL(prompt + chosen): ORPO (2403.07691), without a reference."""
    chosen, rejected = log_odds(p)
    return -o.orpo_lambda * F.logsigmoid(chosen - rejected)


def _smoothed(scaled: Tensor, smoothing: float) -> Tensor:
    if not smoothing:
        return -F.logsigmoid(scaled)
    return -(1 - smoothing) * F.logsigmoid(scaled) - smoothing * F.logsigmoid(-scaled)


Likelihood = Literal["completion", "sequence"]


@attrs.frozen(kw_only=True)
class PairLoss:
    """A loss of the registry, and what it can be combined with.

    `value`: the loss of each pair, or None for a likelihood alone. `reference`: whether it reads a
    reference. `smoothing`: whether it uses ε; `needs_smoothing`: whether ε must be above 0.
    `coupled`: whether a pair's value depends on the others of its batch. `on_delta`: whether it is
    a function of Δ alone, so that length normalisation may divide Δ by the length; `divergence`:
    whether an f-divergence may replace Δ. `by_length`: whether it divides by completion lengths
    itself. `likelihood`: the −log-likelihood per token that is added, of chosen completions or of
    whole chosen sequences. `number`: the option that this loss alone reads.
    """

    value: Value | None
    reference: bool = True
    smoothing: bool = False
    needs_smoothing: bool = False
    coupled: bool = False
    on_delta: bool = True
    divergence: bool = True
    by_length: bool = False
    likelihood: Likelihood | None = None
    number: str | None = None


LOSSES: Mapping[str, PairLoss] = {
    "sigmoid": PairLoss(value=sigmoid, smoothing=True),
    "sigmoid_norm": PairLoss(value=sigmoid_norm, smoothing=True, on_delta=False, by_length=True),
    "hinge": PairLoss(value=hinge),
    "ipo": PairLoss(value=ipo, on_delta=False, by_length=True),
    "ipo_sum": PairLoss(value=ipo_sum, on_delta=False),
    "robust": PairLoss(value=robust, smoothing=True),
    "exo_pair": PairLoss(value=exo_pair, smoothing=True, needs_smoothing=True),
    "nca_pair": PairLoss(value=nca_pair, divergence=False),
    "bco_pair": PairLoss(value=bco_pair, coupled=True, on_delta=False, divergence=False),
    "sppo_hard": PairLoss(value=sppo_hard, divergence=False),
    "aot": PairLoss(value=aot, smoothing=True, coupled=True, on_delta=False, divergence=False),
    "aot_unpaired": PairLoss(value=aot_unpaired, smoothing=True, coupled=True, divergence=False),
    "discopop": PairLoss(value=discopop, number="discopop_tau"),
    "apo_zero": PairLoss(value=apo_zero, divergence=False),
    "apo_down": PairLoss(value=apo_down, divergence=False),
    "sft": PairLoss(
        value=None, reference=False, on_delta=False, divergence=False, likelihood="completion"
    ),
    "cpo": PairLoss(
        value=cpo,
        reference=False,
        smoothing=True,
        on_delta=False,
        divergence=False,
        likelihood="completion",
        number="cpo_alpha",
    ),
    "simpo": PairLoss(
        value=simpo,
        reference=False,
        smoothing=True,
        on_delta=False,
        divergence=False,
        by_length=True,
        number="simpo_gamma",
    ),
    "orpo": PairLoss(
        value=orpo,
        reference=False,
        on_delta=False,
        divergence=False,
        likelihood="sequence",
        by_length=True,
        number="orpo_lambda",
    ),
}
"""Every loss by its name; weighted mixes of them are `loss={"sigmoid": 1.0, "sft": 0.2}`."""


def _expm1(exponent: Tensor) -> Tensor:
    """e^x − 1; near the largest number it goes on as its tangent, which keeps order and slope.

    Clamped there, both sides of a pair could be the same number: no margin, and no gradient.
    """
    most = math.log(torch.finfo(exponent.dtype).max) - 12
    return torch.expm1(exponent.clamp(max=most)) + math.exp(most) * F.relu(exponent - most)


def forward_kl(delta: Tensor) -> Tensor:
    """1 − e^{−Δ}."""
    return -_expm1(-delta)


def jensen_shannon(delta: Tensor) -> Tensor:
    """log 2 + logσ(Δ)."""
    return F.logsigmoid(delta) + torch.log(torch.tensor(2.0, dtype=delta.dtype, device="cpu"))


def alpha_divergence(alpha: float) -> Divergence:
    """(e^{(α−1)Δ} − 1) / (α − 1), α in (0, 1): reverse KL as α → 1, forward KL as α → 0.

    As in TRL; the α of 2309.16240 is 1 minus this one.
    """

    def divergence(delta: Tensor) -> Tensor:
        return _expm1((alpha - 1) * delta) / (alpha - 1)

    return divergence


DIVERGENCES = ("reverse_kl", "forward_kl", "jensen_shannon", "alpha")
"""f-divergences (2309.16240) that may replace Δ; `reverse_kl` is Δ itself."""


def divergence_of(name: str, alpha: float) -> Divergence | None:
    """The function of Δ with this name; None for Δ itself."""
    functions: Mapping[str, Divergence | None] = {
        "reverse_kl": None,
        "forward_kl": forward_kl,
        "jensen_shannon": jensen_shannon,
        "alpha": alpha_divergence(alpha),
    }
    return functions[name]
