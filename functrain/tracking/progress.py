"""The progress of training: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

_PLAIN_SECONDS = 5.0
_LIVE_SECONDS = 0.2
_HELD_OUT = "eval_loss"


class Progress:
    """Shows stage, step, loss, tokens per second and the time left, by `update(step, metrics)`.

    Metrics are read only when something is drawn, so that showing them costs training nothing. On a
    terminal rich draws a bar, at most five times a second; elsewhere, and on a dumb terminal, there
    is a line every five seconds and one for each evaluation. A stream that cannot be written to
    (its reader is gone, the disk is full) does not end the run.
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
        self._bar: Bar | None = None
        with self._writing():
            self._bar = _bar(total, self._stream) if self._stream.isatty() else None
        self._begun: tuple[float, int] | None = None
        self._drawn = -float("inf")

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
        """Show the progress after a step, if it is due."""
        if self.due(step) or _HELD_OUT in metrics:
            self._drawn = now = self._clock()
            parts = self._parts(step, metrics, now)
            with self._writing():
                self._draw(step, parts)

    def due(self, step: int) -> bool:
        """Whether to draw something after this step, and so to read its metrics."""
        now = self._clock()
        if self._begun is None:
            self._begun = (now, step)
        pause = _PLAIN_SECONDS if self._bar is None else _LIVE_SECONDS
        return now - self._drawn >= pause or step >= self._total

    def close(self) -> None:
        """Stop the bar and leave it as it is."""
        if self._bar is not None:
            with self._writing():
                self._bar.stop()

    @contextmanager
    def _writing(self) -> Generator[None]:
        """Wraps writing to the display; a bar that cannot be written is given up."""
        try:
            yield
        except OSError:
            self._bar = None

    def _parts(self, step: int, metrics: Mapping[str, float], now: float) -> list[str]:
        parts = []
        if "loss" in metrics:
            parts.append(f"loss {float(metrics['loss']):.4f}")
        if _HELD_OUT in metrics:
            parts.append(f"held out {float(metrics[_HELD_OUT]):.4f}")
        if "tokens_per_second" in metrics:
            parts.append(f"{float(metrics['tokens_per_second']):,.0f} tokens/s")
        left = self._left(step, now)
        if left is not None:
            parts.append(f"{left} left")
        return parts

    def _left(self, step: int, now: float) -> str | None:
        if self._begun is None or step <= self._begun[1] or step >= self._total:
            return None
        begun, first = self._begun
        seconds = round((now - begun) / (step - first) * (self._total - step))
        minutes, seconds = divmod(seconds, 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

    def _draw(self, step: int, parts: list[str]) -> None:
        """`pretrain   120/400  30%  loss 2.134  14,210 tokens/s  1:05 left`."""
        count = f"{step:{len(str(self._total))}}/{self._total}"
        if self._bar is not None:
            self._bar.update(
                self._bar.task_ids[0],
                completed=step,
                stage=f"{self._stage:8}",
                count=count,
                rest="  ".join(parts),
            )
            self._bar.refresh()
        else:
            percent = f"{100 * step // self._total:3}%"
            self._stream.write("  ".join([f"{self._stage:9}", count, percent, *parts]) + "\n")
            self._stream.flush()


def _bar(total: int, stream: TextIO) -> Bar | None:
    """A bar; None for a terminal that cannot move back in a line, where it would show too late."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    console = Console(file=stream)
    if console.is_dumb_terminal:
        return None
    bar = Bar(
        TextColumn("{task.fields[stage]}", style="bold"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[count]}", style="cyan"),
        TextColumn("{task.fields[rest]}"),
        console=console,
        # The steps draw it themselves: no thread runs beside training.
        auto_refresh=False,
    )
    bar.add_task("", total=total, stage="", count="", rest="")
    bar.start()
    return bar
