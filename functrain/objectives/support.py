"""What a model does with sequences, found by trying it on a few tokens.

Whether it supports a way to lay them out, and whether it predicts tokens from those before them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from functrain.architecture import vocabulary_of
from functrain.errors import ArchitectureError, FunctrainWarning
from functrain.objectives.base import logits_of
from functrain.objectives.batches import IGNORE_INDEX, Batch
from functrain.objectives.head import calm, has_weights
from functrain.objectives.verdicts import Verdicts

if TYPE_CHECKING:
    from functrain.objectives.layouts import Layout


def check_weights(model: nn.Module, what: str) -> None:
    """Raise `ArchitectureError`, beginning with `what`, for a model that cannot be tried."""
    if not has_weights(model):
        raise ArchitectureError(
            f"{what}, and the architecture has no weights to try it with; call it within "
            "functrain.bound, as a step does"
        )


# Of which it has been tried whether they are causal.
_tried: Verdicts[bool] = Verdicts()


def check_causal(model: nn.Module) -> None:
    """Warn of a model whose logits depend on tokens that come after them: an encoder, say.

    It sees what it is to predict, and its loss tends to nothing. Found by trying it, once for each
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
    """Whether the last of a few tokens changes the logits before it; False where nobody can tell.

    Of three sequences that begin alike the last two tokens are others in the second. Where the
    first and the third differ as well, something else is the reason.
    """
    try:
        with calm(model, _stirred(model)):
            ids = _trial(model)[0]["input_ids"][:1].repeat(3, 1)
            ids[1, -2:] = (ids[1, -2:] + 1) % (vocabulary_of(model) or 2)
            one, other, again = logits_of(model, {"input_ids": ids})[:, :-2]
            return _apart(again, one) <= _limit(model) < _apart(other, one)
    except Exception:  # whatever a foreign forward raises, a step will too; or nothing is finite
        return False


def fault(model: nn.Module, make: Callable[[Batch], Layout]) -> str | None:
    """What is wrong with a model's logits in the layout that `make` gives; None: nothing.

    Tried on two pairs. It must also be able to go wrong: with the same tokens in plain rows it has
    to.
    """
    found = _fault(model, make)
    if found is None:
        return None
    hint = ""
    if getattr(getattr(model, "config", None), "use_cache", False):
        hint = " (under config.use_cache models of transformers do not separate sequences)"
    return f"on a few tokens {found}{hint}"


def _fault(model: nn.Module, make: Callable[[Batch], Layout]) -> str | None:
    try:
        with calm(model, _stirred(model)):
            batch, real = _trial(model)
            made = make(batch)
            ids = made.inputs["input_ids"]
            places = real[:, :-1].flatten().nonzero().squeeze(1)
            alone = _alone(model, batch, real)
            apart = _apart(made.gathered(logits_of(model, made.inputs), places), alone)
            leaking = _apart(made.gathered(logits_of(model, {"input_ids": ids}), places), alone)
            limit = _limit(model)
    except Exception as error:  # whatever a foreign forward raises, it cannot be called so
        return f"its forward raised {type(error).__name__}: {str(error)[:200]}"
    if not apart <= limit:
        return (
            f"its logits were {apart:.2g} of the largest away from those of each sequence alone, "
            f"expected at most {limit:.1g}"
        )
    if not leaking > 4 * limit:
        return f"no sequence has to do with what is before it ({leaking:.1g}), so it cannot be told"
    return None


def _stirred(model: nn.Module) -> dict[str, Tensor]:
    """Matrices under which tokens have to do with each other, whatever the weights are now.

    Each is one line of random numbers, shifted from row to row, so that it takes no memory.
    """
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, param in model.named_parameters():
        if param.ndim == 2 and param.is_floating_point():
            line = torch.randn(sum(param.shape), generator=generator) / param.shape[1] ** 0.5
            found[name] = line.to(param).as_strided(param.shape, (1, 1))
    return found


def _trial(model: nn.Module) -> tuple[dict[str, Any], Tensor]:
    """Two pairs of different lengths, the sides of one with three tokens in common.

    And which tokens something is predicted from: bool [4, 6].
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary_of(model) or 2, (4, 6), generator=generator)
    ids[2, :3] = ids[0, :3]
    lengths = torch.tensor([[6], [4], [5], [5]])
    labels = ids.masked_fill(torch.arange(6) >= lengths, IGNORE_INDEX)
    real = torch.arange(6) < lengths - 1
    return {"input_ids": ids.to(device), "labels": labels.to(device)}, real.to(device)


def _alone(model: nn.Module, batch: Batch, real: Tensor) -> Tensor:
    """The logits of each sequence by itself, one after the other."""
    sequences = zip(batch["input_ids"], real, strict=True)
    found = [logits_of(model, {"input_ids": ids[own].unsqueeze(0)}) for ids, own in sequences]
    return torch.cat([logits.squeeze(0) for logits in found])


def _apart(logits: Tensor, alone: Tensor) -> float:
    finite = alone.isfinite()
    return float((logits - alone)[finite].abs().max() / alone[finite].abs().max())


def _limit(model: nn.Module) -> float:
    """Far above the rounding of a forward, and far below what another sequence makes of it.

    √ε of the coarsest dtype that it is computed in; norms and rotary angles are float32 at best.
    """
    dtypes = {torch.float32, *(p.dtype for p in model.parameters() if p.is_floating_point())}
    device = next(model.parameters()).device.type
    if torch.is_autocast_enabled(device):
        dtypes.add(torch.get_autocast_dtype(device))
    coarsest = max(torch.finfo(dtype).eps for dtype in dtypes)
    return float(coarsest**0.5)
