"""How the sequences of a batch are laid out for the model: padded, or so that less is computed.

A layout holds the model's inputs, and an index from the batch into its outputs, so that whoever
scores the batch sees no difference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import attrs
import torch
from torch import Tensor, nn

from functrain.errors import ArchitectureError, BatchError, ConfigError
from functrain.objectives.batches import IGNORE_INDEX, Batch
from functrain.objectives.pairs import SIDES, concatenated, last_target
from functrain.objectives.support import check_weights, fault
from functrain.objectives.verdicts import Verdicts

LayoutName = Literal["padded", "padding_free", "shared_prompt"]
"""`padded`: a row for each sequence. `padding_free`: all in one row, told apart by `position_ids`.
`shared_prompt`: a row for each pair, which holds once what both sides begin with."""


def layout_name(_record: object, _field: object, given: object) -> None:
    """Raise `ConfigError` for what is not a `LayoutName`."""
    if given not in ("padded", *_MAKERS):
        raise ConfigError(
            f"layout: {given!r}, expected 'padded', 'padding_free' or 'shared_prompt'"
        )


@attrs.frozen(kw_only=True, eq=False)
class Layout:
    """A batch [batch, time] as the model is called with it.

    `inputs`: the model's keywords, with `input_ids` [rows, width]. `index`: int64 [batch, time],
    where each token is in the flattened [rows · width]; meaningless for those that are left out.
    `padding`: int64, 0-d, how many tokens of `inputs` are padding.
    """

    inputs: Batch
    index: Tensor
    padding: Tensor

    def gathered(self, outputs: Tensor, places: Tensor) -> Tensor:
        """The rows of the model's output, [rows, width, …], that make these predictions.

        `places`: int64 [n], indices into the flattened [batch, time − 1].
        """
        predicting = self.index[:, :-1].flatten()[places]
        return outputs.flatten(0, 1).index_select(0, predicting)

    def count_padding(self) -> tuple[Tensor, int]:
        """How many tokens of `inputs` are padding, and how many there are."""
        return self.padding, self.inputs["input_ids"].numel()


def laid_out(layout: LayoutName, model: nn.Module, batch: Batch) -> Layout | None:
    """How the bound `model` is called on pairs, chosen above rejected; None: as they are.

    Tokens that the mask hides, and those with no target after them, are left out. How many there
    are depends on the batch, so on an accelerator this synchronises.

    Raises `ArchitectureError` for a model that does not support the layout, which is found by
    trying it on a few tokens.
    """
    if layout == "padded":
        return None
    additive = _supported(layout, model)
    made = _MAKERS[layout](batch)
    if "attention_mask" in made.inputs:
        _check_window(model, made.inputs["input_ids"].shape[1])
    return _added(made, model) if additive else made


def check_layout(layout: LayoutName, batch: Batch) -> None:
    """Raise `BatchError` for pairs that a layout cannot hold (checked on the CPU).

    These have a target after a token that the mask hides, or `position_ids` that do not go up by
    one over the tokens of each sequence, starting from the same number in all.
    """
    if layout == "padded" or batch["chosen"]["labels"].device.type != "cpu":
        return
    joined = concatenated(batch["chosen"], batch["rejected"])
    real = _real(joined)
    lost = (joined["labels"][:, 1:] != IGNORE_INDEX) & ~real[:, :-1]
    if bool(lost.any()):
        side, row, place = _first(lost)
        raise BatchError(
            f"{side}.labels: a target at {[row, place + 1]}, after a token that attention_mask "
            f"hides, and layout={layout!r} leaves that out; make it -100, or use layout='padded'"
        )
    if "position_ids" not in joined:
        return
    begins = joined["position_ids"] - _ranks(real)
    begin = int(begins[real][0])
    other = real & (begins != begin)
    if bool(other.any()):
        side, row, place = _first(other)
        raise BatchError(
            f"{side}.position_ids: {int(batch[side]['position_ids'][row, place])} at "
            f"{[row, place]}; layout={layout!r} expects them to go up by one over the tokens of "
            f"each sequence, from {begin} as in the first; leave them out, or use layout='padded'"
        )


def _first(where: Tensor) -> tuple[str, int, int]:
    """The side, row and position of the first True in a mask of chosen above rejected."""
    row, place = where.nonzero()[0].tolist()
    pairs = len(where) // 2
    return SIDES[row // pairs], row % pairs, place


def _real(batch: Batch) -> Tensor:
    """Which tokens are kept: unmasked ones with a target after them; bool [batch, time]."""
    labels = batch["labels"]
    places = torch.arange(labels.shape[1], device=labels.device)
    real = places < last_target(labels).unsqueeze(1)
    return real & (batch["attention_mask"] != 0) if "attention_mask" in batch else real


def _ranks(real: Tensor) -> Tensor:
    """How many kept tokens of its sequence precede each one: int64 [batch, time]."""
    return (real.cumsum(1) - 1).clamp(min=0)


def padding_free(batch: Batch) -> Layout:
    """One row of all tokens, without a mask: positions that restart separate the sequences.

    Where attention has no kernel for rows of several sequences, it is computed over the whole row.
    """
    real = _real(batch)
    positions = batch.get("position_ids", _ranks(real))
    places = real.flatten().nonzero().squeeze(1)
    inputs = {"input_ids": batch["input_ids"], "position_ids": positions}
    index = real.flatten().cumsum(0).view_as(real) - 1
    return Layout(
        inputs={key: value.flatten()[places].unsqueeze(0) for key, value in inputs.items()},
        index=index.clamp(min=0),
        padding=torch.zeros_like(index[0, 0]),
    )


def _shared_prompt(batch: Batch) -> Layout:
    """A row for each pair: the common prefix, the rest of chosen, the rest of rejected.

    A row's rejected tokens see only the prefix and themselves.
    """
    real = _real(batch)
    positions = batch.get("position_ids", _ranks(real))
    chosen, rejected = real.sum(1).chunk(2)
    shared = _common(batch["input_ids"], positions, real)
    ranks = _ranks(real)
    moved = (chosen - shared).unsqueeze(1) * (ranks.chunk(2)[1] >= shared.unsqueeze(1))
    columns = ranks + torch.cat([torch.zeros_like(moved), moved])
    width = int((chosen + rejected - shared).max())
    rows = torch.arange(len(chosen), device=real.device).repeat(2).unsqueeze(1)
    index = torch.where(real, rows * width + columns, 0)

    def placed(values: Tensor) -> Tensor:
        # Both sides write the same tokens where the prefix is.
        whole = values.new_zeros(len(chosen) * width)
        return whole.index_copy(0, index[real], values[real]).view(-1, width)

    return Layout(
        inputs={
            "input_ids": placed(batch["input_ids"]),
            "position_ids": placed(positions),
            "attention_mask": _branching(shared, chosen, width),
        },
        index=index,
        padding=(width - (chosen + rejected - shared)).sum(),
    )


def _common(ids: Tensor, positions: Tensor, real: Tensor) -> Tensor:
    """The length of each pair's common prefix, of tokens and positions both: int64 [pairs]."""
    order = real.logical_not().to(torch.int8).argsort(dim=1, stable=True)  # kept first
    same = real.gather(1, order).chunk(2)
    equal = same[0] & same[1]
    for values in (ids, positions):
        one, other = values.gather(1, order).chunk(2)
        equal = equal & (one == other)
    return equal.cumprod(1).sum(1)


def _branching(shared: Tensor, chosen: Tensor, width: int) -> Tensor:
    """The causal mask in which rejected tokens do not see those of chosen alone.

    bool [pairs, 1, width, width], True where a token is seen.
    """
    places = torch.arange(width, device=shared.device)
    after = places >= chosen.unsqueeze(1)
    own = (places >= shared.unsqueeze(1)) & ~after
    seen = (after.unsqueeze(2) & own.unsqueeze(1)).logical_not()
    return seen.tril().unsqueeze(1)


_MAKERS: dict[str, Callable[[Batch], Layout]] = {
    "padding_free": padding_free,
    "shared_prompt": _shared_prompt,
}


def _added(layout: Layout, model: nn.Module) -> Layout:
    """The mask as a term added to attention scores, in the dtype of the model."""
    seen = layout.inputs["attention_mask"]
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    scores = torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, -torch.inf)
    return attrs.evolve(layout, inputs={**layout.inputs, "attention_mask": scores})


def _check_window(model: nn.Module, width: int) -> None:
    """Raise `ArchitectureError` where our mask would replace one of the model's with a window."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    for name in ("sliding_window", "attention_chunk_size", "window_size"):
        window = getattr(config, name, None)
        if isinstance(window, int) and 0 < window < width:
            raise ArchitectureError(
                f"layout: a row of {width} tokens, and the model's attention has a window of "
                f"{window} ({name}), which the mask of 'shared_prompt' would do away with; use "
                "layout='padding_free' or 'padded'"
            )


# By layout: whether the mask has to be additive.
_found: Verdicts[bool] = Verdicts()


def _supported(layout: str, model: nn.Module) -> bool:
    """Whether the mask has to be additive; `ArchitectureError` if the layout is unsupported."""
    known = _found.of(model)
    if layout not in known:
        known[layout] = _tried(layout, model)
    return known[layout]


def _tried(layout: str, model: nn.Module) -> bool:
    check_weights(model, f"layout: {layout!r}")
    make = _MAKERS[layout]
    found = fault(model, make)
    if found is None:
        return False
    if layout == "shared_prompt" and fault(model, lambda b: _added(make(b), model)) is None:
        return True
    raise ArchitectureError(
        f"layout: the model does not support {layout!r}: {found}; use layout='padded'"
    )
