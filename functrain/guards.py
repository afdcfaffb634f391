"""Loss spikes: a step far above the steps before it is not applied.

What a guard remembers is in the state, so a resumed run skips the steps that an uninterrupted one
would have skipped. After OLMo's skip-step optimizer (2501.00656, §3.2).
"""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from functrain.checks import check_integer, check_positive


@attrs.frozen(kw_only=True, eq=False)
class GuardState:
    """What a guard has seen: the losses and norms of the latest applied steps, float64 [window].

    `count`: all applied steps. `skips`: the latest steps in a row that were not applied. Both are
    int64, 0-d.
    """

    losses: Tensor
    norms: Tensor
    count: Tensor
    skips: Tensor


@attrs.frozen(kw_only=True)
class SpikeGuard:
    """Skip steps whose loss or gradient norm is a spike: far above the latest applied steps.

    A spike lies more than `deviations` standard deviations above the mean of the latest `window`
    applied steps; there is none before half a window has been seen, and none while all values in it
    are equal. Skipped and non-finite steps never enter the window. `functrain.train` raises
    `DivergedError` after more than `most_skips` skips in a row.
    """

    window: int = 128
    deviations: float = 6.0
    most_skips: int = 10

    def __attrs_post_init__(self) -> None:
        for name, least in (("window", 4), ("most_skips", 1)):
            check_integer(name, getattr(self, name), least)
        check_positive("deviations", self.deviations)

    def init(self, device: torch.device) -> GuardState:
        """An empty window on `device`."""
        empty = torch.zeros(self.window, dtype=torch.float64, device=device)
        none = torch.zeros((), dtype=torch.int64, device=device)
        return GuardState(losses=empty, norms=empty.clone(), count=none, skips=none.clone())

    def spike(self, state: GuardState, loss: Tensor, norm: Tensor) -> Tensor:
        """Whether this loss or norm is a spike: bool, 0-d, without waiting for an accelerator."""
        seen = torch.arange(self.window, device=state.count.device) < state.count
        judged = state.count >= max(2, self.window // 2)
        high = self._high(state.losses, seen, loss) | self._high(state.norms, seen, norm)
        return judged & high

    def _high(self, values: Tensor, seen: Tensor, value: Tensor) -> Tensor:
        count = seen.sum()
        mean = values.sum() / count
        variance = torch.where(seen, (values - mean) ** 2, 0.0).sum() / (count - 1)
        far = value.to(values.device, values.dtype) > mean + self.deviations * variance.sqrt()
        # From equal values any other is infinitely far: after a window of zero losses, every other
        # loss would be skipped for ever.
        least, most = (torch.where(seen, values, end) for end in (torch.inf, -torch.inf))
        return far & (most.max() > least.min())

    def observe(self, state: GuardState, loss: Tensor, norm: Tensor, applied: Tensor) -> GuardState:
        """The state after a step, with its values in the window if it was applied."""
        place = torch.arange(self.window, device=state.count.device) == state.count % self.window
        put = place & applied.to(place.device)

        def entered(values: Tensor, value: Tensor) -> Tensor:
            return torch.where(put, value.to(values.device, values.dtype), values)

        done = applied.to(state.count.device, state.count.dtype)
        return GuardState(
            losses=entered(state.losses, loss),
            norms=entered(state.norms, norm),
            count=state.count + done,
            skips=(state.skips + 1) * (1 - done),
        )
