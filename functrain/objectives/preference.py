"""Preference optimisation: pairs of completions, a loss, and a reference that is a value."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from functrain import accumulators
from functrain import metrics as m
from functrain.architecture import Mode
from functrain.checks import boolean, positive
from functrain.errors import BatchError
from functrain.metrics import Metrics
from functrain.objectives.batches import IGNORE_INDEX, Batch, count_padding, examples_in
from functrain.objectives.layouts import (
    Layout,
    LayoutName,
    check_layout,
    laid_out,
    layout_name,
)
from functrain.objectives.logprobs import (
    HeadMode,
    PairSlopes,
    TokenScores,
    head_mode,
    sides_of,
    token_metrics,
    token_scores,
)
from functrain.objectives.losses import (
    LOSSES,
    Likelihood,
    Options,
    PairLogps,
    PairLoss,
    divergence_of,
    log_odds,
)
from functrain.objectives.options import (
    check_combination,
    mixed,
    own_tensors,
    within,
)
from functrain.objectives.pairs import (
    SIDES,
    check_pairs,
    concatenated,
    reference_tokens,
    sequence_labels,
)
from functrain.objectives.reference import reference_scores
from functrain.trees import Tensors


@attrs.frozen(kw_only=True, eq=False)
class Coupling:
    """What a micro-batch needs to know of the whole batch: its share of the loss, and the slope.

    `chosen`, `rejected`: d loss / d log-prob, float [pairs]; `value`: 0-d.
    """

    value: Tensor
    chosen: Tensor
    rejected: Tensor

    def applied(self, logps: PairLogps) -> Tensor:
        """A tensor with the loss's own value and gradient: the log-probs enter linearly."""
        linear = (self.chosen * logps.chosen).sum() + (self.rejected * logps.rejected).sum()
        return self.value + (linear - linear.detach())

    def of(self, pairs: slice) -> Coupling:
        """The slopes of some pairs; the value stays the micro-batch's."""
        return attrs.evolve(self, chosen=self.chosen[pairs], rejected=self.rejected[pairs])


@attrs.frozen(kw_only=True, eq=False)
class Observed:
    """Pairs without history, and the weight of each: what coupled losses are computed from."""

    logps: PairLogps
    weights: Tensor | None


@attrs.frozen(kw_only=True, eq=False)
class _Known:
    """What a loss reads of pairs besides the policy's log-probs, chosen above rejected.

    `mask` [2 · pairs, time − 1]: where completions have a target. `reference`: its log-probs in
    nats, by token like the mask or summed [2 · pairs]; None where there is none.
    """

    mask: Tensor
    reference: Tensor | None
    coupling: Coupling | None

    def of(self, pairs: slice) -> _Known:
        """The same for some of the pairs."""
        return _Known(
            mask=sides_of(self.mask, pairs),
            reference=None if self.reference is None else sides_of(self.reference, pairs),
            coupling=None if self.coupling is None else self.coupling.of(pairs),
        )


@attrs.frozen(kw_only=True, eq=False)
class _Taken:
    """The summed loss of pairs, in the shape of `weight`, and what it was computed from.

    For some pairs of a micro-batch under a coupling, only the gradient of `total` is theirs.
    """

    total: Tensor
    scores: TokenScores
    logps: PairLogps
    negative: dict[Likelihood, Tensor]


@attrs.frozen(kw_only=True, eq=False)
class PreferenceOptimization:
    """The sum over pairs of a preference loss; the weight is the number of pairs.

    `loss`: a name in `functrain.objectives.LOSSES`, or a mix of several as weights by name. One
    with a likelihood term (`sft`, `cpo`, `orpo`) has a second sum, over tokens, and a second
    weight, their number: each sum is divided by its own weight, over the whole logical batch.

    `reference`: params of the same architecture, fixed; None where every batch carries
    `reference_logps`, or no loss reads one. With `dropout=False` (the default, as in TRL) the
    policy trains in eval mode, so that it equals the reference at step 0: margin 0, `sigmoid`
    log 2. A reference in another floating dtype is cast to the params'; where that rounds, as to
    half precision, the margin is only nearly 0.

    Modifiers: `divergence` replaces Δ by an f-divergence (2309.16240), and `divergence_alpha` is
    its α; `length_normalized` divides Δ by the completion's length; `ld_alpha` (LD-DPO, 2409.06411)
    weighs the tokens of a completion beyond the shorter one's length; `wpo` (2406.11827) weighs a
    pair by how likely the policy finds it; `reference_mixup` α and `reference_sync` k (TR-DPO,
    2404.09656) move the reference, then `state.reference`, to α·π + (1−α)·ref every k steps.

    Every loss over pairs in a mix must read each modifier that is chosen, and `label_smoothing`;
    otherwise it is refused by name. The likelihood terms, `sft` and those of `cpo` and `orpo`, read
    none of them: they are plain −log-likelihoods beside what is modified. `ld_alpha` is refused for
    losses that divide by lengths (`sigmoid_norm`, `ipo`, `simpo`, `orpo`).

    Batch-coupled losses (`aot`, `aot_unpaired`, `bco_pair`) take two passes where there are several
    micro-batches: all log-probs first, then each micro-batch's gradient through the known
    d loss / d log-prob. `bco_pair`'s δ is the mean of all rewards so far, this batch's included.

    `layout`: `padded`; `padding_free`, all sequences of a micro-batch in one row, for models whose
    attention tells them apart by `position_ids`; or `shared_prompt`, the common prefix of a pair
    once for both sides, for models that take a mask [batch, 1, time, time]. Each sequence is scored
    as if it stood alone, with positions from 0 unless it has its own: the same as `padded` to
    rounding (with dropout other random bits). A model that does not support the layout is refused.

    Raises `ConfigError` for a loss, number, boolean or combination that makes no sense.
    """

    reference: Tensors | None = attrs.field(
        default=None, converter=attrs.converters.optional(own_tensors)
    )
    loss: Mapping[str, float] = attrs.field(default="sigmoid", converter=mixed)
    beta: float = attrs.field(default=0.1, validator=positive)
    label_smoothing: float = attrs.field(default=0.0, validator=within(0.5, "a number in [0, 0.5)"))
    simpo_gamma: float = attrs.field(
        default=0.5, validator=within(math.inf, "a finite number of at least 0")
    )
    cpo_alpha: float = attrs.field(
        default=1.0, validator=within(math.inf, "a finite number of at least 0")
    )
    orpo_lambda: float = attrs.field(default=0.1, validator=positive)
    discopop_tau: float = attrs.field(default=0.05, validator=positive)
    divergence: str = "reverse_kl"
    divergence_alpha: float = attrs.field(
        default=0.5, validator=within(1, "a number between 0 and 1", above=True)
    )
    length_normalized: bool = attrs.field(default=False, validator=boolean)
    ld_alpha: float | None = attrs.field(
        default=None,
        validator=attrs.validators.optional(within(1 + 1e-9, "a number in [0, 1], or None")),
    )
    wpo: bool = attrs.field(default=False, validator=boolean)
    reference_mixup: float | None = attrs.field(
        default=None,
        validator=attrs.validators.optional(
            within(1 + 1e-9, "a number in (0, 1], or None", above=True)
        ),
    )
    reference_sync: int = 512
    dropout: bool = attrs.field(default=False, validator=boolean)
    head: HeadMode = attrs.field(default="auto", validator=head_mode)
    layout: LayoutName = attrs.field(default="padded", validator=layout_name)
    name: str = "dpo"
    # What a state carries for it, not an option: `carrying` puts it here.
    _running: Tensors | None = attrs.field(default=None, alias="_running", repr=False)

    def __attrs_post_init__(self) -> None:
        check_combination(self)

    @property
    def direct(self) -> bool:
        """False with `head="full"`, which gives the bits of an ordinary loop."""
        return self.head == "auto"

    @property
    def batch_coupled(self) -> bool:
        """Whether a loss of the mix couples the pairs of a batch."""
        return any(each.coupled for _, each in self._losses())

    @property
    def referred(self) -> bool:
        """Whether a loss of the mix reads a reference."""
        return any(each.reference for _, each in self._losses())

    @property
    def mode(self) -> Mode:
        """Eval unless dropout is asked for."""
        return "train" if self.dropout else "eval"

    def _losses(self) -> Iterator[tuple[float, PairLoss]]:
        return ((weight, LOSSES[name]) for name, weight in self.loss.items())

    def likelihoods(self) -> dict[Likelihood, float]:
        """The −log-likelihood terms of the mix, and the weight of each."""
        found: dict[Likelihood, float] = {}
        for name, weight in self.loss.items():
            kind = LOSSES[name].likelihood
            if kind is not None:
                factor = self.cpo_alpha if name == "cpo" else 1.0
                found[kind] = found.get(kind, 0.0) + weight * factor
        return dict(sorted(found.items()))

    def check(self, batch: Batch, vocabulary: int | None) -> None:
        """Raise `BatchError` unless the batch has well-formed, non-empty pairs and a reference."""
        check_pairs(batch, vocabulary)
        check_layout(self.layout, batch)
        if not self.referred:
            return
        if self.reference is None and "reference_logps" not in batch:
            raise BatchError(
                "reference_logps: missing, and the step has no reference; give "
                "dpo_step(..., reference=params), or batches with their reference log-probs"
            )
        given = batch.get("reference_logps")
        if given is not None and self.reference_mixup is not None:
            raise BatchError(
                "reference_logps: computed ahead, and the reference moves (reference_mixup); take "
                "them out of the batch"
            )
        if given is not None and self.ld_alpha is not None and given["chosen"].ndim == 1:
            raise BatchError(
                "reference_logps: sums over completions, and ld_alpha weighs their tokens; attach "
                "them with by_token=True"
            )

    def weight(self, batch: Batch) -> Tensor:
        """The number of pairs, int64, 0-d; with likelihood terms [1 + terms], their tokens too."""
        device = batch["chosen"]["input_ids"].device
        # A fill, where `torch.tensor` would copy from the host and wait.
        pairs = torch.full((), examples_in(batch), dtype=torch.int64, device=device)
        kinds = self.likelihoods()
        if not kinds:
            return pairs
        return torch.stack([pairs, *(self._tokens(batch, kind) for kind in kinds)])

    def _tokens(self, batch: Batch, kind: Likelihood) -> Tensor:
        labels = batch["chosen"]["labels"]
        if kind == "sequence":
            labels = sequence_labels(batch["chosen"])
        count: Tensor = (labels[:, 1:] != IGNORE_INDEX).sum()
        return count

    def check_weight(self, weight: Tensor) -> None:
        """Nothing more to check: a pair without completion tokens has been refused."""

    def __call__(
        self, model: nn.Module, batch: Batch, coupling: Coupling | None = None
    ) -> tuple[Tensor, Metrics]:
        """The summed loss, with the metrics that preference dashboards expect.

        `perplexity` is the policy's, per token of the chosen completions. `nll_loss` is the mean of
        a mix's likelihood term; a mix with both kinds has `nll_loss/completion` and
        `nll_loss/sequence`. `padding` is the fraction of the layout's tokens that is padding.

        Policy and reference take one forward each, over chosen and rejected together.
        """
        joined = concatenated(batch["chosen"], batch["rejected"])
        layout = laid_out(self.layout, model, joined)
        known = self._known(model, batch, joined, layout, coupling)
        whole = token_scores(
            model,
            {**joined, "labels": self._labels(batch, joined)},
            head=self.head,
            layout=layout,
            paired=True,
            slopes=self._slopes(known),
        )
        taken = self._taken(whole, known)
        scores, negative, weight = taken.scores, taken.negative, self.weight(batch)
        chosen_tokens = scores.lengths.chunk(2)[0].sum()
        padding = count_padding(joined) if layout is None else layout.count_padding()
        measured = {
            "loss": m.mean(taken.total, weight),
            "perplexity": m.exponential(negative["completion"], chosen_tokens),
            "padding": m.mean(*padding),
        }
        kinds = self.likelihoods()
        for kind in kinds:
            name = "nll_loss" if len(kinds) == 1 else f"nll_loss/{kind}"
            measured[name] = m.mean(negative[kind], self._tokens(batch, kind))
        pair_metrics = self._pair_metrics(taken.logps, scores)
        return taken.total, Metrics(measured) | pair_metrics | token_metrics(scores)

    def _labels(self, batch: Batch, joined: Batch) -> Tensor:
        """What is scored: completions, and whole chosen sequences where a likelihood reads them."""
        labels: Tensor = joined["labels"]
        if "sequence" not in self.likelihoods():
            return labels
        whole = sequence_labels(batch["chosen"])
        time = labels.shape[1]
        whole = nn.functional.pad(whole, (0, time - whole.shape[1]), value=IGNORE_INDEX)
        return torch.cat([whole, labels[len(whole) :]])

    def _known(
        self,
        model: nn.Module,
        batch: Batch,
        joined: Batch,
        layout: Layout | None,
        coupling: Coupling | None = None,
    ) -> _Known:
        """What is known of the pairs before the policy scores them; the reference goes first.

        Its forward then does not find the policy's activations in memory.
        """
        mask = joined["labels"][:, 1:] != IGNORE_INDEX
        reference: Tensor | None = None
        if self.referred and "reference_logps" in batch:
            attached = batch["reference_logps"]
            if attached["chosen"].ndim == 1:
                reference = torch.cat([attached[side] for side in SIDES])
            else:
                reference = reference_tokens(attached, mask.shape[1])
        elif self.referred:
            assert self.reference is not None  # `check` has refused the batch otherwise
            reference = reference_scores(
                model, self.reference, joined, head=self.head, layout=layout, paired=True
            ).logps
        return _Known(mask=mask, reference=reference, coupling=coupling)

    def _slopes(self, known: _Known) -> PairSlopes | None:
        """The step's gradient with respect to log-probs of pairs, where it can be known early.

        That is within an accumulation, which says what the sum will be multiplied by, and for
        losses that need no other pairs, or have a coupling that tells of them.
        """
        under = accumulators.current()
        if under is None or (self.batch_coupled and known.coupling is None):
            return None

        def slopes(pairs: slice, scores: TokenScores) -> Tensor:
            with torch.enable_grad():
                leaf = scores.logps.detach().requires_grad_()
                taken = self._taken(attrs.evolve(scores, logps=leaf), known.of(pairs))
                (slope,) = torch.autograd.grad((taken.total * under.factor).sum(), leaf)
            return slope

        return slopes

    def _taken(self, whole: TokenScores, known: _Known) -> _Taken:
        """The summed loss of pairs whose log-probs are known, with what it is made of."""
        kinds = self.likelihoods()
        scores = whole.masked(known.mask) if "sequence" in kinds else whole
        logps = self._logps(scores, known)
        pair_loss = self._pair_loss(
            Observed(logps=logps, weights=self._weights(scores)), known.coupling
        )
        negative: dict[Likelihood, Tensor] = {
            "completion": -scores.logps.chunk(2)[0].sum(),
            "sequence": -whole.logps.chunk(2)[0].sum(),
        }
        total = pair_loss
        if kinds:
            terms = [factor * negative[kind] for kind, factor in kinds.items()]
            total = torch.stack([pair_loss, *terms])
        return _Taken(total=total, scores=scores, logps=logps, negative=negative)

    def _logps(self, scores: TokenScores, known: _Known) -> PairLogps:
        chosen, rejected = self._sums(scores.logps, scores.mask)
        lengths = scores.lengths.chunk(2)
        reference: Sequence[Tensor | None] = (None, None)
        if known.reference is not None:
            given = known.reference.to(scores.logps.dtype)
            if given.ndim == 1:
                reference = given.chunk(2)
            else:
                # Whoever attached them may have scored prompts and padding too.
                reference = self._sums(torch.where(scores.mask, given, 0.0), scores.mask)
        return PairLogps(
            chosen=chosen,
            rejected=rejected,
            chosen_length=lengths[0],
            rejected_length=lengths[1],
            reference_chosen=reference[0],
            reference_rejected=reference[1],
            divergence=divergence_of(self.divergence, self.divergence_alpha),
            normalized=self.length_normalized,
        )

    def _sums(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Σ over completion tokens, of chosen and of rejected, with the weights of `ld_alpha`."""
        if self.ld_alpha is not None:
            lengths = mask.sum(-1)
            shorter = torch.minimum(*lengths.chunk(2)).repeat(2)
            beyond = mask.cumsum(-1) > shorter.unsqueeze(1)
            tokens = torch.where(beyond, self.ld_alpha * tokens, tokens)
        chosen, rejected = tokens.sum(-1).chunk(2)
        return chosen, rejected

    def _weights(self, scores: TokenScores) -> Tensor | None:
        """WPO's weight of each pair: how likely the policy finds both sides, without a gradient."""
        if not self.wpo:
            return None
        with torch.no_grad():
            relative = (scores.logps - scores.collision).sum(-1) / scores.lengths
            chosen, rejected = relative.chunk(2)
            return (chosen + rejected).exp()

    def _pair_loss(self, observed: Observed, coupling: Coupling | None) -> Tensor:
        if self.batch_coupled and coupling is not None:
            return coupling.applied(observed.logps)
        return self._of_whole_batch(observed).sum()

    def _of_whole_batch(self, observed: Observed) -> Tensor:
        """The mix's value of each pair, where these pairs are their whole batch."""
        logps = observed.logps
        if "bco_pair" in self.loss:
            logps = attrs.evolve(logps, offset=self._offset(logps).to(logps.chosen.dtype))
        bare = attrs.evolve(
            logps,
            reference_chosen=None,
            reference_rejected=None,
            divergence=None,
            normalized=False,
        )
        options = self._options()
        value = torch.zeros_like(logps.chosen)
        for weight, each in self._losses():
            if each.value is not None:
                value = value + weight * each.value(logps if each.reference else bare, options)
        return value if observed.weights is None else value * observed.weights

    def _options(self) -> Options:
        names = (field.name for field in attrs.fields(Options))
        return Options(**{name: getattr(self, name) for name in names})

    @torch.no_grad()
    def observe(self, model: nn.Module, batch: Batch) -> Observed:
        """The pairs of a micro-batch, without history: the first of two passes."""
        joined = concatenated(batch["chosen"], batch["rejected"])
        layout = laid_out(self.layout, model, joined)
        known = self._known(model, batch, joined, layout)
        scores = token_scores(
            model, joined, head=self.head, detailed=self.wpo, layout=layout, paired=True
        )
        return Observed(logps=self._logps(scores, known), weights=self._weights(scores))

    def couple(self, observed: Sequence[Observed]) -> list[Coupling]:
        """For each micro-batch, the whole batch's loss as a function of its own log-probs."""
        # An evaluation may be in inference mode; only what is joined outside it can have gradients.
        with torch.inference_mode(False), torch.enable_grad():
            joined = _joined(observed)
            chosen = joined.logps.chosen.detach().requires_grad_()
            rejected = joined.logps.rejected.detach().requires_grad_()
            leaves = attrs.evolve(joined.logps, chosen=chosen, rejected=rejected)
            total = self._of_whole_batch(attrs.evolve(joined, logps=leaves)).sum()
            slopes = torch.autograd.grad(total, (chosen, rejected))
        sizes = [len(each.logps.chosen) for each in observed]
        return [
            Coupling(value=total.detach() * (size / len(chosen)), chosen=c, rejected=r)
            for size, c, r in zip(sizes, *(torch.split(s, sizes) for s in slopes), strict=True)
        ]

    @torch.no_grad()
    def _offset(self, logps: PairLogps) -> Tensor:
        """δ of `bco_pair`: the mean reward of all pairs so far, this batch's included; float64."""
        rewards = self.beta * (logps.ratio_chosen.double() + logps.ratio_rejected.double())
        total = rewards.sum()
        count = torch.full_like(total, 2 * len(rewards))
        if self._running is not None:
            total = total + self._running["reward_sum"]
            count = count + self._running["reward_count"]
        return total / count

    def init_running(self, device: torch.device) -> Tensors | None:
        """What `bco_pair` carries in `state.running`: the sum and the number of rewards."""
        if "bco_pair" not in self.loss:
            return None
        zero = torch.zeros((), dtype=torch.float64, device=device)
        return Tensors({"reward_sum": zero, "reward_count": zero.clone()})

    def advance(self, running: Tensors, metrics: Metrics) -> Tensors:
        """The running values after a step with these metrics."""
        total, count = running["reward_sum"], running["reward_count"]
        for name in ("rewards/chosen", "rewards/rejected"):
            seen = metrics.metric(name)
            total, count = total + seen.sum, count + seen.weight.to(count.device)
        return Tensors({"reward_sum": total, "reward_count": count})

    def carrying(
        self, reference: Tensors | None, running: Tensors | None
    ) -> PreferenceOptimization:
        """This objective with the reference and running values that a state carries for it."""
        if self.reference_mixup is not None and reference is not None:
            return attrs.evolve(self, reference=reference, _running=running)
        return self if running is None else attrs.evolve(self, _running=running)

    def _pair_metrics(self, logps: PairLogps, scores: TokenScores) -> Metrics:
        """Rewards as the loss sees them; `logps/…` are plain sums, unweighted by `ld_alpha`."""
        plain = scores.sums.detach().chunk(2)
        chosen = self.beta * logps.ratio_chosen.detach()
        rejected = self.beta * logps.ratio_rejected.detach()
        sums = {
            "rewards/chosen": chosen.sum(),
            "rewards/rejected": rejected.sum(),
            "rewards/margins": (chosen - rejected).sum(),
            "rewards/accuracies": (chosen > rejected).sum(),
            "logps/chosen": plain[0].sum(),
            "logps/rejected": plain[1].sum(),
        }
        if "orpo" in self.loss:
            odds = log_odds(attrs.evolve(logps, chosen=logps.chosen.detach()))
            difference = (odds[0] - odds[1]).detach()
            sums["log_odds_chosen"] = difference.sum()
            sums["log_odds_ratio"] = nn.functional.logsigmoid(difference).sum()
        pairs = torch.full((), len(chosen), dtype=torch.float64, device=chosen.device)
        return Metrics({name: m.mean(value, pairs) for name, value in sums.items()})

    def kept(self) -> Mapping[str, Tensor] | None:
        """The reference."""
        return self.reference


def _joined(observed: Sequence[Observed]) -> Observed:
    """The observations of all micro-batches, as of one batch."""
    first = observed[0]

    def cat(name: str) -> Any:
        values = [getattr(each.logps, name) for each in observed]
        return None if values[0] is None else torch.cat(values)

    names = ("chosen", "rejected", "chosen_length", "rejected_length")
    names += ("reference_chosen", "reference_rejected")  # type: ignore[assignment]
    logps = attrs.evolve(first.logps, **{name: cat(name) for name in names})
    weights = None if first.weights is None else torch.cat([o.weights for o in observed])  # type: ignore[misc]
    return Observed(logps=logps, weights=weights)
