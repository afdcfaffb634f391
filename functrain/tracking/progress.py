"""A line that says how training goes: redrawn on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TextIO

_PLAIN_SECONDS = 5.0
_LIVE_SECONDS = 0.2


class Progress:
    """`update(step, metrics)` shows stage, step, loss, tokens per second and the time left.

    Values are read only when a line is drawn, so that looking costs training nothing. On a terminal
    the line is redrawn five times a second at most; elsewhere there is one every five seconds.
    """

    def __init__(
        self,
        total: int,
        stage: str,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._stage = total, stage
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._live = self._stream.isatty()
        self._begun: tuple[float, int] | None = None
        self._drawn = -float("inf")
        self._line = ""

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step has been made."""
        now = self._clock()
        if self._begun is None:
            self._begun = (now, step)
        due = now - self._drawn >= (_LIVE_SECONDS if self._live else _PLAIN_SECONDS)
        if due or step >= self._total:
            self._drawn = now
            self._draw(self.line(step, metrics, now))

    def line(self, step: int, metrics: Mapping[str, float], now: float) -> str:
        """`pretrain   120/400  30%  loss 2.134  14,210 tokens/s  1:05 left`."""
        parts = [
            f"{self._stage:9}",
            f"{step:{len(str(self._total))}}/{self._total}",
            f"{100 * step // self._total:3}%",
        ]
        if "loss" in metrics:
            parts.append(f"loss {float(metrics['loss']):.4f}")
        if "eval_loss" in metrics:
            parts.append(f"held out {float(metrics['eval_loss']):.4f}")
        if "tokens_per_second" in metrics:
            parts.append(f"{float(metrics['tokens_per_second']):,.0f} tokens/s")
        left = self._left(step, now)
        if left is not None:
            parts.append(f"{left} left")
        return "  ".join(parts)

    def close(self) -> None:
        """End the line."""
        if self._live and self._line:
            self._stream.write("\n")
            self._stream.flush()
            self._line = ""

    def _left(self, step: int, now: float) -> str | None:
        if self._begun is None or step <= self._begun[1] or step >= self._total:
            return None
        begun, first = self._begun
        seconds = round((now - begun) / (step - first) * (self._total - step))
        minutes, seconds = divmod(seconds, 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

    def _draw(self, line: str) -> None:
        if self._live:
            self._stream.write(f"\r{line}{' ' * (len(self._line) - len(line))}")
            self._line = line
        else:
            self._stream.write(f"{line}\n")
        self._stream.flush()
