"""What adapters are: their rank and scale, and which layers have one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs

from functrain.checks import boolean, check_fraction, check_integer, check_positive
from functrain.errors import ConfigError

ALL_LINEAR = "all-linear"


def _patterns(given: Any) -> tuple[str, ...]:
    found = (given,) if isinstance(given, str) else given
    if not isinstance(found, Sequence) or not all(isinstance(e, str) and e for e in found):
        raise ConfigError(
            f"lora: {given!r}, expected patterns of names such as 'q_proj' or 'model.layers.*'"
        )
    return tuple(found)


@attrs.frozen(kw_only=True)
class LoRA:
    """Low-rank adapters: W becomes W + (alpha / rank) · B·A, of which A and B are trained.

    `rank`: rows of A and columns of B. `alpha`: the scale, divided by the rank, or with `rslora` by
    its square root (2312.03732). `targets`: shell patterns that match the names of linear layers,
    or their ends after a dot, such as `q_proj`; or `all-linear`, all but the head, what is tied,
    what is never called, what is more than a weight and a bias, and the out_proj of Mamba's mixers,
    for which peft takes no adapter: on CUDA their kernels read the weight.

    `dropout`: on the input of A, in train mode. `dora`: a magnitude for each output is trained as
    well (2402.09353). `train`: patterns of parameters that are trained besides the adapters.

    Hu et al., 2106.09685.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = attrs.field(default=(ALL_LINEAR,), converter=_patterns)
    dropout: float = 0.0
    rslora: bool = attrs.field(default=False, validator=boolean)
    dora: bool = attrs.field(default=False, validator=boolean)
    train: tuple[str, ...] = attrs.field(default=(), converter=_patterns)

    def __attrs_post_init__(self) -> None:
        check_integer("lora rank", self.rank)
        check_positive("lora alpha", self.alpha)
        check_fraction("lora dropout", self.dropout)
        if not self.targets:
            raise ConfigError("lora targets: none; name layers such as 'q_proj', or 'all-linear'")

    @property
    def scaling(self) -> float:
        """What B·A is multiplied by."""
        return float(self.alpha / (self.rank**0.5 if self.rslora else self.rank))
