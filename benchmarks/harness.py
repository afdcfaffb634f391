"""What the benchmarks share: a process for each measurement, taking turns, and a table of ratios.

Every measurement is a process of its own, so that none profits from another's memory or caches.
Each round goes through all ways, alternately forwards and backwards, and ratios are within a round,
so that whatever else a shared machine does affects all alike. Each process makes warm-up steps.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from picture import bars

Result = dict[str, Any]
"""`wall` and `cpu` seconds per step, `megabytes` above the loaded model, `losses` by step."""

WARMUP = 1


class Clock:
    """Wall and CPU seconds of each step, and peak memory above that at the start."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []
        release()
        self._loaded = resident()
        self.start()

    def start(self) -> None:
        """Begin the next step."""
        self._since = time.perf_counter(), time.process_time()

    def step(self) -> None:
        """End a step, and begin the next."""
        now = time.perf_counter(), time.process_time()
        self.steps.append((now[0] - self._since[0], now[1] - self._since[1]))
        self._since = now

    def report(self, losses: Sequence[float]) -> Result:
        """The medians over the steps after the warm-up."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        wall, cpu = (statistics.median(each) for each in zip(*self.steps[WARMUP:], strict=True))
        megabytes = (peak - self._loaded) / 1e6
        return {"wall": wall, "cpu": cpu, "megabytes": megabytes, "losses": list(losses)}


def release() -> None:
    """Return to the kernel what loading the model has freed, which a step could otherwise reuse.

    Otherwise a process that keeps its memory (`functrain.keep_pages`) would start 100 MB higher.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        gc.collect()
        trim(0)


def resident() -> int:
    """The resident memory of this process, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def chosen(given: str, known: Collection[str]) -> list[str]:
    """The kinds that `--kinds` names; an unknown one ends the program before any of them runs."""
    kinds = [kind.strip() for kind in given.split(",")]
    unknown = next((kind for kind in kinds if kind not in known), None)
    if unknown is not None:
        raise SystemExit(f"--kinds: {unknown!r} is unknown; known: {', '.join(known)}")
    return kinds


def interleaved(
    script: str, kinds: Sequence[str], rounds: int, arguments: Sequence[str], threads: int
) -> dict[str, list[Result]]:
    """The results of each kind, one per round; the script is called with `--child KIND`."""
    results: dict[str, list[Result]] = {kind: [] for kind in kinds}
    for number in range(rounds):
        for kind in kinds if number % 2 == 0 else reversed(kinds):
            results[kind].append(_child(script, kind, arguments, threads))
            print(f"{number + 1}/{rounds} {kind}", file=sys.stderr)
    return results


def _child(script: str, kind: str, arguments: Sequence[str], threads: int) -> Result:
    command = [sys.executable, script, "--child", kind, *arguments, "--threads", str(threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{kind}:\n{done.stderr[-2000:]}")
    found: Result = json.loads(done.stdout.splitlines()[-1])
    return found


def check_losses(results: Mapping[str, Sequence[Result]], tolerance: float) -> float:
    """The largest difference between losses of the same step; exits if it is above `tolerance`."""
    losses = [result["losses"] for each in results.values() for result in each]
    apart = max(max(each) - min(each) for each in zip(*losses, strict=True))
    if apart > tolerance:
        raise SystemExit(f"the losses are not the same, by {apart}: {losses}")
    return float(apart)


def table(results: Mapping[str, Sequence[Result]], base: Callable[[str], str]) -> str:
    """A Markdown table of medians, and of median ratios to `base(kind)` with quartiles."""
    lines = [
        "| | wall s | CPU s | MB above the model | wall | CPU (quartiles) | memory |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for kind, found in results.items():
        beside = results[base(kind)]
        wall, cpu, megabytes = (
            statistics.median(each[key] for each in found) for key in ("wall", "cpu", "megabytes")
        )
        ratios = {
            key: [a[key] / b[key] for a, b in zip(found, beside, strict=True)]
            for key in ("wall", "cpu", "megabytes")
        }
        low, high = quartiles(ratios["cpu"])
        middle = {key: statistics.median(values) for key, values in ratios.items()}
        lines.append(
            f"| {kind} | {wall:.3f} | {cpu:.3f} | {megabytes:,.0f} | {middle['wall']:.2f} | "
            f"{middle['cpu']:.2f} ({low:.2f} to {high:.2f}) | {middle['megabytes']:.2f} |"
        )
    return "\n".join(lines)


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third quartile; for a single value, the value twice."""
    if len(values) < 2:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark of steps has."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--steps", type=int, default=4)
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--json", type=Path, default=None, help="write all results here")
    made.add_argument("--picture", type=Path, default=None, help="draw the medians here, as SVG")
    made.add_argument("--child", default=None, help=argparse.SUPPRESS)
    return made


def written(
    options: argparse.Namespace,
    title: str,
    results: Mapping[str, Any],
    picture: Callable[[], str] | None = None,
) -> None:
    """Write all results with the machine as JSON, and a picture, if the options ask for them.

    The default picture shows the medians of each kind's results as bars.
    """
    if options.json is not None:
        found = {"title": title, "machine": machine(), "results": results}
        options.json.write_text(json.dumps(found, indent=1))
    if options.picture is not None:
        drawn = bars(title, results, "functrain") if picture is None else picture()
        options.picture.write_text(drawn)
