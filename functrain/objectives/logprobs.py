"""Log-probs of target tokens, and other statistics of their distributions.

Where the logits of a batch would be large, and the architecture shows its head, they are made a few
rows at a time (`functrain.objectives.chunks`). Rows without a target are skipped unless finding
them would synchronise. The results are the same to rounding; the choice depends on shapes alone.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Literal

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from functrain import metrics as m
from functrain.errors import ConfigError
from functrain.metrics import Metrics
from functrain.objectives import chunks
from functrain.objectives.base import logits_of
from functrain.objectives.batches import IGNORE_INDEX, Batch
from functrain.objectives.chunks import Projection
from functrain.objectives.head import Head, find_head
from functrain.objectives.layouts import Layout
from functrain.objectives.modes import are_modes
from functrain.objectives.scores import Scores, scored
from functrain.objectives.support import check_causal

HeadMode = Literal["auto", "full"]
"""`auto`: by chunks where the logits are large. `full`: always the model's logits as they are."""


_log = logging.getLogger("functrain")
# Models of which it has been logged that their logits are made whole.
_told: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def head_mode(_record: object, _field: object, given: object) -> None:
    """Raise `ConfigError` for what is not a `HeadMode`."""
    if given not in ("auto", "full"):
        raise ConfigError(f"head: {given!r}, expected 'auto' or 'full'")


@attrs.frozen(eq=False, kw_only=True)
class TokenScores:
    """Scores of each predicting position, [batch, time − 1]; 0 where `mask` has no target.

    `logps`: log p(target), nats, with its history. Without history: `entropy` of the distribution,
    nats; `correct`, whether the target is its mode; `level`, the mean logit; `collision`,
    log Σ_v p(v)².
    """

    logps: Tensor
    mask: Tensor
    entropy: Tensor
    correct: Tensor
    level: Tensor
    collision: Tensor

    @property
    def sums(self) -> Tensor:
        """Σ_t log p(target) of each sequence: [batch]."""
        return self.logps.sum(-1)

    @property
    def lengths(self) -> Tensor:
        """The number of targets of each sequence: int64 [batch]."""
        return self.mask.sum(-1)

    def masked(self, mask: Tensor) -> TokenScores:
        """The scores with only the positions in `mask` left."""
        return TokenScores(
            logps=torch.where(mask, self.logps, 0.0),
            mask=mask,
            entropy=torch.where(mask, self.entropy, 0.0),
            correct=self.correct & mask,
            level=torch.where(mask, self.level, 0.0),
            collision=torch.where(mask, self.collision, 0.0),
        )


PairSlopes = Callable[[slice, TokenScores], Tensor]
"""d loss / d log-prob [2 · pairs, time − 1] of some pairs, given the scores of both their sides."""


@attrs.frozen(eq=False)
class HiddenRows:
    """The hidden states of the rows that predict something, their targets, and the projection.

    `places`: their indices in the flattened [batch, time − 1]; None: all. `pairs`: of a paired
    batch, how many rows each pair has, in their order; else None.
    """

    hidden: Tensor
    targets: Tensor
    places: Tensor | None
    projection: Projection
    pairs: Sequence[int] | None = None


def hidden_rows(
    model: nn.Module,
    batch: Batch,
    *,
    call: Callable[..., object] | None = None,
    values: Mapping[str, Tensor] | None = None,
    head: HeadMode = "auto",
    layout: Layout | None = None,
    paired: bool = False,
) -> HiddenRows | None:
    """The rows to be scored by chunks; None where the logits are to be taken whole.

    `call` and `values`: a forward other than the model's own, and its params. `layout`: how the
    model is called with the batch, if not with the batch as it is. `paired`: the second half of the
    batch holds the other sides of the first; the rows come pair by pair.
    """
    if head == "full":
        return None
    shown = find_head(model)
    if not isinstance(shown, Head):
        _tell_whole(model, shown)
        return None
    targets = batch["labels"][:, 1:].flatten()
    made = len(targets) if layout is None else layout.inputs["input_ids"].numel()
    if not chunks.are_worth(made, shown.projection.out_features, chunks.BUDGET):
        return None
    call = model if call is None else call
    places: Tensor | None = None
    if layout is not None or targets.device.type == "cpu":  # on an accelerator it would synchronise
        places = _places(targets)
    sizes: list[int] | None = None
    if paired:
        places, sizes = _by_pairs(places, batch["labels"])
    if layout is not None:
        assert places is not None
        hidden = layout.gathered(shown.hidden(call, layout.inputs), places)
    else:
        hidden = shown.hidden(call, batch)
        if places is not None and not paired and len(places) == len(targets):
            places = None
        if places is None:
            hidden = hidden[:, :-1].flatten(0, 1)
        else:  # the last token of each sequence predicts nothing
            time = batch["labels"].shape[1] - 1
            hidden = hidden.flatten(0, 1).index_select(0, places + places // time)
    if places is not None:
        targets = targets[places]
    projection = _projection(model, shown, values, hidden.dtype)
    return HiddenRows(hidden, targets, places, projection, sizes)


def _by_pairs(places: Tensor | None, labels: Tensor) -> tuple[Tensor, list[int]]:
    """The places pair by pair, chosen before rejected, and how many each pair has."""
    count, time = len(labels) // 2, labels.shape[1] - 1
    if places is None:
        every = torch.arange(2 * count * time, device=labels.device).view(2, count, time)
        return every.transpose(0, 1).flatten(), [2 * time] * count
    pair = places // time % count
    sizes: list[int] = torch.bincount(pair, minlength=count).tolist()
    return places[pair.argsort(stable=True)], sizes


def _tell_whole(model: nn.Module, reason: str) -> None:
    """Log once why logits are whole: a run may need far more memory than its user expects."""
    if model not in _told:
        _told.add(model)
        _log.info("whole logits: %s; their memory is batch x time x vocabulary", reason)


def _places(targets: Tensor) -> Tensor:
    """The indices into the flattened [batch, time − 1] that have a target: int64 [n]."""
    return (targets != IGNORE_INDEX).nonzero().squeeze(1)


def _projection(
    model: nn.Module,
    head: Head,
    values: Mapping[str, Tensor] | None,
    dtype: torch.dtype,
) -> Projection:
    weight: Tensor = head.projection.weight
    bias: Tensor | None = head.projection.bias
    if values is not None:
        # Params that the architecture holds itself are not among the values.
        weight = values.get(head.weight, weight)
        bias = None if head.bias is None else values.get(head.bias, bias)
    return Projection(
        weight=weight, bias=bias, finish=head.finish(model), budget=chunks.BUDGET, dtype=dtype
    )


def token_scores(
    model: nn.Module,
    batch: Batch,
    *,
    call: Callable[..., object] | None = None,
    values: Mapping[str, Tensor] | None = None,
    head: HeadMode = "auto",
    detailed: bool = True,
    layout: Layout | None = None,
    paired: bool = False,
    slopes: PairSlopes | None = None,
) -> TokenScores:
    """Score the target tokens of a batch of sequences; arguments as for `hidden_rows`.

    Without `detailed` only `logps` and `correct` are computed, and the others are 0. `slopes`, for
    a `paired` batch: the gradient that the backward pass will give the log-probs of some pairs;
    by chunks, knowing it saves time and memory (`functrain.objectives.scores`).
    """
    check_causal(model)
    rows = hidden_rows(
        model,
        batch,
        call=call,
        values=values,
        head=head,
        layout=layout,
        paired=paired,
    )
    call = model if call is None else call
    if rows is not None:
        return _scored_by_chunks(rows, batch["labels"], detailed=detailed, slopes=slopes)
    if layout is None:
        logits, labels = logits_of(call, batch), batch["labels"]
        return _scores(logits[:, :-1], labels[:, 1:], detailed=detailed)
    targets = batch["labels"][:, 1:].flatten()
    places = _places(targets)
    logits = layout.gathered(logits_of(call, layout.inputs), places)
    scores = _scores(logits.unsqueeze(0), targets[places].unsqueeze(0), detailed=detailed)
    return _placed(scores, places, batch["labels"])


def _scored_by_chunks(
    rows: HiddenRows, labels: Tensor, *, detailed: bool, slopes: PairSlopes | None
) -> TokenScores:
    if rows.pairs is None or rows.places is None:
        found = scored(rows.hidden, rows.targets, rows.projection, detailed=detailed)
        return _placed(found, rows.places, labels)
    places, count, time = rows.places, len(labels) // 2, labels.shape[1] - 1
    counts = chunks.grouped(rows.pairs, rows.projection)
    pairs = [slice(*ends) for ends in pairwise(accumulate(counts, initial=0))]
    sizes = [sum(rows.pairs[each]) for each in pairs]
    begins = list(accumulate(sizes, initial=0))

    def of_group(index: int, scores: Scores) -> Tensor:
        assert slopes is not None
        group = pairs[index]
        here = places[begins[index] : begins[index + 1]]
        # Their indices in a batch of these pairs alone.
        spared = torch.where(here < count * time, group.start, count + group.start - counts[index])
        here = here - spared * time
        slope = slopes(group, _placed(scores, here, sides_of(labels, group)))
        return slope.flatten()[here]

    found = scored(
        rows.hidden,
        rows.targets,
        rows.projection,
        detailed=detailed,
        groups=sizes,
        slopes=None if slopes is None else of_group,
    )
    return _placed(found, places, labels)


def sides_of(values: Tensor, pairs: slice) -> Tensor:
    """Of values [2 · pairs, …], chosen above rejected, those of some pairs in the same order."""
    return torch.cat([half[pairs] for half in values.chunk(2)])


def _placed(found: Scores | TokenScores, places: Tensor | None, labels: Tensor) -> TokenScores:
    """The scores of rows, put where they are in [batch, time − 1]; `places` as in `HiddenRows`."""
    mask = labels[:, 1:] != IGNORE_INDEX

    def placed(values: Tensor) -> Tensor:
        if places is not None:
            whole = values.new_zeros(mask.numel())
            values = whole.index_copy(0, places, values.flatten())
        return values.view(mask.shape)

    return TokenScores(
        logps=placed(found.logps),
        mask=mask,
        entropy=placed(found.entropy),
        correct=placed(found.correct),
        level=placed(found.level),
        collision=placed(found.collision),
    )


def _scores(logits: Tensor, targets: Tensor, *, detailed: bool) -> TokenScores:
    """Cross entropy without reduction gives −log p for each target and 0 where there is none."""
    losses = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    )
    mask = targets != IGNORE_INDEX
    logps = -losses.view(targets.shape)
    with torch.no_grad():
        column = targets.masked_fill(~mask, 0).flatten().unsqueeze(1)
        correct = are_modes(logits.flatten(0, 1), column).view(mask.shape) & mask
        entropy = level = collision = torch.zeros_like(logps)
        if detailed:
            normed = logits.log_softmax(-1)
            # Masked, not indexed: indexing would wait for an accelerator.
            entropy = torch.where(mask, torch.special.entr(normed.exp()).sum(-1), 0.0)
            level = torch.where(mask, logits.mean(-1), 0.0)
            collision = torch.where(mask, (2 * normed).logsumexp(-1), 0.0)
    return TokenScores(
        logps=logps, mask=mask, entropy=entropy, correct=correct, level=level, collision=collision
    )


def sequence_logps(
    model: nn.Module, batch: Batch, *, head: HeadMode = "auto"
) -> tuple[Tensor, Tensor]:
    """Per example, Σ_t log p(label_t) over its target tokens, and how many there are.

    `(float [batch], int64 [batch])`, in nats.
    """
    scores = token_scores(model, batch, head=head, detailed=False)
    return scores.sums, scores.lengths


@torch.no_grad()
def token_metrics(scores: TokenScores) -> Metrics:
    """Metrics over completion tokens of pairs stacked as chosen, then rejected.

    `entropy` (nats) over both; `mean_token_accuracy` over the chosen (of equal logits the first is
    the largest, as by `argmax`); `logits/chosen` and `logits/rejected`, the mean logit.
    """
    correct = scores.correct.chunk(2)[0]
    level_chosen, level_rejected = scores.level.chunk(2)
    chosen, rejected = (side.sum() for side in scores.mask.chunk(2))
    return Metrics(
        {
            "entropy": m.mean(scores.entropy.sum(), chosen + rejected),
            "mean_token_accuracy": m.mean(correct.sum(), chosen),
            "logits/chosen": m.mean(level_chosen.sum(), chosen),
            "logits/rejected": m.mean(level_rejected.sum(), rejected),
            "num_tokens": m.total(chosen + rejected),
        }
    )
