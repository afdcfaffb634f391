"""What a model does with sequences, found by trying it on a few tokens.

That is, whether it supports a layout of them, and whether it predicts tokens from earlier ones.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from functrain.descriptions import vocabulary_of
from functrain.errors import ArchitectureError, FunctrainWarning
from functrain.objectives.base import logits_of
from functrain.objectives.batches import IGNORE_INDEX, Batch
from functrain.objectives.head import calm, has_weights
from functrain.objectives.verdicts import Verdicts

if TYPE_CHECKING:
    from functrain.objectives.layouts import Layout


Found = TypeVar("Found")
_under_trial: ContextVar[bool] = ContextVar("under_trial", default=False)


def under_trial() -> bool:
    """Whether a model is being tried, which happens in its first step only."""
    return _under_trial.get()


def check_weights(model: nn.Module, what: str) -> None:
    """Raise `ArchitectureError`, beginning with `what`, for a model that cannot be tried."""
    if not has_weights(model):
        raise ArchitectureError(
            f"{what}, and the architecture has no weights to try it with; call it within "
            "functrain.bound, as a step does"
        )


# Models that have been tried for whether they are causal.
_tried: Verdicts[bool] = Verdicts()


def check_causal(model: nn.Module) -> None:
    """Warn of a model whose logits depend on tokens that come after them, such as an encoder.

    It sees what it is to predict, so its loss tends to nothing. Found by trying it, once for each
    architecture and config. Raises `ArchitectureError` for an encoder-decoder of transformers.
    """
    known = _tried.of(model)
    if "causal" in known or not has_weights(model):
        return
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ArchitectureError(
            f"{type(model).__name__}: an encoder-decoder, whose encoder sees every token that is "
            "to be predicted; take a model that is a decoder alone (…ForCausalLM)"
        )
    known["causal"] = True
    if _sees_ahead(model):
        warnings.warn(
            f"{type(model).__name__}: its logits depend on tokens that come after them, so that it "
            "sees what it is to predict, and its loss says little of next tokens; give it a causal "
            "mask (a model of transformers that may be an encoder: is_decoder=True in its config, "
            "before it is made)",
            FunctrainWarning,
            stacklevel=2,
        )


def _sees_ahead(model: nn.Module) -> bool:
    """Whether the last of a few tokens change the logits before them; False if that is unclear.

    Of three equal sequences the second is given two other tokens at its end. Where the first and
    the third differ as well, something else is the reason.
    """
    try:
        return _trying(model, _differs_ahead)
    except Exception:  # whatever a foreign forward raises, a step will too; or nothing is finite
        return False


def _differs_ahead(model: nn.Module) -> bool:
    ids = _trial(model)[0]["input_ids"][:1].repeat(3, 1)
    ids[1, -2:] = (ids[1, -2:] + 1) % (vocabulary_of(model) or 2)
    one, other, again = logits_of(model, {"input_ids": ids})[:, :-2]
    limit = math.sqrt(_epsilon(model))
    return _apart(again, one) <= limit < _apart(other, one)


def fault(model: nn.Module, make: Callable[[Batch], Layout]) -> str | None:
    """What is wrong with a model's logits in the layout that `make` gives; None: nothing.

    Tried on two pairs. Each sequence must have the logits that it has alone (with other positions
    they would be others), whatever the tokens of the other sequences. The trial must also be able
    to fail: the same tokens in plain rows have to give other logits.
    """
    try:
        found = _trying(model, lambda trying: _fault(trying, make))
    except Exception as error:  # whatever a foreign forward raises, it cannot be called so
        found = f"its forward raised {type(error).__name__}: {str(error)[:200]}"
    return None if found is None else f"on a few tokens {found}"


def _fault(model: nn.Module, make: Callable[[Batch], Layout]) -> str | None:
    batch, real = _trial(model)
    made = make(batch)
    ids = made.inputs["input_ids"]
    places = real[:, :-1].flatten().nonzero().squeeze(1)
    logits, alone = logits_of(model, made.inputs), _alone(model, batch, real)
    epsilon = _epsilon(model)
    # Far above the rounding of a forward, and far below what other positions make of it.
    limit = math.sqrt(epsilon)
    apart = _apart(made.gathered(logits, places), alone)
    if not apart <= limit:
        return (
            f"its logits were {apart:.2g} of the largest away from those of each sequence alone, "
            f"expected at most {limit:.1g}"
        )
    # With equal shapes every kernel sums in the same order; but experts are handed other numbers
    # of tokens, which made 9 ε in models of 8 layers.
    told, rounding = _told(model, made, real, logits), min(64 * epsilon, limit)
    if not told <= rounding:
        return (
            f"the logits of a sequence changed with the tokens of others by {told:.2g} of the "
            f"largest, expected at most {rounding:.1g}"
        )
    leaking = _apart(made.gathered(logits_of(model, {"input_ids": ids}), places), alone)
    if not leaking > 4 * limit:
        return f"no sequence has to do with what is before it ({leaking:.1g}), so it cannot be told"
    return None


def _told(model: nn.Module, made: Layout, real: Tensor, logits: Tensor) -> float:
    """How far the logits of any sequence move when all the other sequences have other tokens."""
    ids = made.inputs["input_ids"]
    logits = logits.flatten(0, 1)
    found: list[float] = []
    for index, own in zip(made.index, real, strict=True):
        kept = index[own]
        changed = (ids.flatten() + 1) % (vocabulary_of(model) or 2)
        changed[kept] = ids.flatten()[kept]
        moved = logits_of(model, {**made.inputs, "input_ids": changed.view_as(ids)})
        found.append(_apart(moved.flatten(0, 1)[kept], logits[kept]))
    return float(torch.tensor(found, device="cpu").max())  # NaN, where any is


def _trying(model: nn.Module, find: Callable[[nn.Module], Found]) -> Found:
    """What `find` finds of the model with stirred values, in float32 whatever the step's precision.

    In half precision rounding would hide small differences. A model that cannot be called in
    float32, as with flash attention, is tried as it is.
    """
    token = _under_trial.set(True)
    try:
        return _in_float32(model, find)
    finally:
        _under_trial.reset(token)


def _in_float32(model: nn.Module, find: Callable[[nn.Module], Found]) -> Found:
    device = next(model.parameters()).device.type
    buffers = {name: buffer.to(_wide(buffer.dtype)) for name, buffer in model.named_buffers()}
    try:
        with (
            calm(model, _stirred(model, _wide), buffers),
            torch.autocast(device, enabled=False),
            _unrounded(),
        ):
            return find(model)
    except Exception:  # from a foreign forward; a second one is the caller's
        with calm(model, _stirred(model)):
            return find(model)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype


@contextmanager
def _unrounded() -> Generator[None]:
    """Within this context no kernel computes float32 in TF32 or bfloat16."""
    backends: Any = torch.backends  # some of which are not typed
    places = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul)
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "ieee"
        yield
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision


def _stirred(
    model: nn.Module, cast: Callable[[torch.dtype], torch.dtype] = lambda dtype: dtype
) -> dict[str, Tensor]:
    """Values under which tokens affect each other, whatever the weights are now.

    A matrix is one line of random numbers, shifted from row to row, so that it takes no memory.
    With more dimensions all slices are the same, and shared by all parameters with such slices, as
    a kernel for experts takes no shifted ones. Scales and biases are near 1, so that a gate that
    begins at 0 does not hide what it will let through.
    """
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Tensor] = {}
    slices: dict[tuple[object, ...], Tensor] = {}

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu")

    for name, param in model.named_parameters():
        if not param.is_floating_point():
            continue
        shape, to = param.shape, (param.device, cast(param.dtype))
        if param.ndim < 2:
            found[name] = (1 + random(*shape) / 8).to(*to)
        elif param.ndim == 2:
            line = random(sum(shape)) / shape[1] ** 0.5
            found[name] = line.to(*to).as_strided(shape, (1, 1))
        else:
            key = (shape[1:], *to)
            if key not in slices:
                slices[key] = (random(*shape[1:]) / shape[-1] ** 0.5).to(*to)
            found[name] = slices[key].expand(shape)
    return found


def _trial(model: nn.Module) -> tuple[dict[str, Any], Tensor]:
    """Two pairs of different lengths, in one of which the sides begin with the same three tokens.

    And which tokens have something to predict: bool [4, 6].
    """
    device = next(model.parameters()).device
    with torch.device("cpu"):  # whatever the default is
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, vocabulary_of(model) or 2, (4, 6), generator=generator)
        ids[2, :3] = ids[0, :3]
        lengths = torch.tensor([[6], [4], [5], [5]])
        labels = ids.masked_fill(torch.arange(6) >= lengths, IGNORE_INDEX)
        real = torch.arange(6) < lengths - 1
    return {"input_ids": ids.to(device), "labels": labels.to(device)}, real.to(device)


def _alone(model: nn.Module, batch: Batch, real: Tensor) -> Tensor:
    """The logits of each sequence by itself, concatenated."""
    sequences = zip(batch["input_ids"], real, strict=True)
    found = [logits_of(model, {"input_ids": ids[own].unsqueeze(0)}) for ids, own in sequences]
    return torch.cat([logits.squeeze(0) for logits in found])


def _apart(logits: Tensor, alone: Tensor) -> float:
    finite = alone.isfinite()
    return float((logits - alone)[finite].abs().max() / alone[finite].abs().max())


def _epsilon(model: nn.Module) -> float:
    """ε of the coarsest dtype computed in; norms and rotary angles are float32 at best."""
    dtypes = {torch.float32, *(p.dtype for p in model.parameters() if p.is_floating_point())}
    device = next(model.parameters()).device.type
    if torch.is_autocast_enabled(device):
        dtypes.add(torch.get_autocast_dtype(device))
    return max(torch.finfo(dtype).eps for dtype in dtypes)
