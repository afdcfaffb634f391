"""Saving and loading a state, compared with `torch.save` and torch's distributed checkpoint.

    python benchmarks/checkpoint.py [--gigabytes 0.5] [--rounds 5] [--directory /tmp]

A state of AdamW, a third params and two thirds moments, is written to and read from the same disk
by each in turn. Ours is hashed, fsynced, renamed, and verified on loading; DCP, with its defaults,
fsyncs but does not verify, and loads into existing tensors; `torch.save` is measured with an fsync
and without one, which guarantees nothing. The order changes each round; the result is the median of
the ratios to `torch.save` with an fsync, or to `torch.load`, of the same round. All read from the
page cache. With `--directory /dev/shm` nothing waits for a disk, and only the work is measured.
"""

import argparse
import os
import resource
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import attrs
import harness
import torch
import torch.distributed.checkpoint as dcp

import functrain as ft

Act = Callable[[Path], object]


def made(gigabytes: float) -> tuple[ft.Step, ft.TrainState]:
    """A state of about so many gigabytes, in tensors of 16 MB and small ones."""
    width = 2048
    count = max(1, round(gigabytes * 1e9 / (3 * 4 * width * width)))
    module = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(count)))
    architecture, params, buffers = ft.split(module)
    step = ft.pretrain_step(architecture, ft.optim.adamw())
    return step, step.init(params, buffers)


def plain(state: ft.TrainState) -> dict[str, object]:
    """The same tensors in the form that one would pass to `torch.save`."""
    slots = {name: dict(items) for name, items in state.optimizer.slots.items()}
    return {"model": dict(state.params), "optimizer": slots, "step": state.step}


def savers(state: ft.TrainState) -> dict[str, Act]:
    """Every way to save, by name."""

    def synced(path: Path) -> None:
        with (path / "state.pt").open("wb") as file:
            torch.save(plain(state), file)
            file.flush()
            os.fsync(file.fileno())

    def distributed(path: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save(plain(state), checkpoint_id=path / "dcp")

    return {
        "torch.save": lambda path: torch.save(plain(state), path / "state.pt"),
        "torch.save, fsync": synced,
        "DCP": distributed,
        "functrain": lambda path: ft.save(path / "ours", state),
    }


def loaders(state: ft.TrainState) -> dict[str, Act]:
    """Every way to load what was saved."""
    into = plain(ft.clone(state))

    def distributed(path: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(into, checkpoint_id=path / "dcp")

    return {
        "torch.load": lambda path: torch.load(path / "state.pt"),
        "DCP": distributed,
        "functrain": lambda path: ft.load(path / "ours", like=state),
    }


def stall(state: ft.TrainState, path: Path) -> tuple[float, float]:
    """Seconds for which a background save blocks training, and those of a plain copy."""
    with ft.checkpoint.BackgroundWriter(path / "beside") as writer:
        writer.save(state)  # allocates the memory that later saves reuse
        writer.wait()
        later = attrs.evolve(state, step=state.step + 1)
        begun = time.perf_counter()
        writer.save(later)
        held = time.perf_counter() - begun
        writer.wait()
    target = ft.clone(state)
    begun = time.perf_counter()
    for name, tensor in target.params.items():
        tensor.copy_(state.params[name])
    for slot, items in target.optimizer.slots.items():
        for name, tensor in items.items():
            tensor.copy_(state.optimizer.slots[slot][name])
    return held, time.perf_counter() - begun


def timed(act: Act, path: Path) -> float:
    begun = time.perf_counter()
    act(path)
    return time.perf_counter() - begun


def measured(ways: dict[str, Act], base: str, rounds: int, fresh: bool, path: Path) -> None:
    """Print each way's median seconds, and its median ratio to the base of the same round."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        names = list(ways)
        names = names[number % len(names) :] + names[: number % len(names)]
        if fresh:
            shutil.rmtree(path)
            path.mkdir()
            os.sync()
        for name in names:
            seconds[name].append(timed(ways[name], path))
    for name, took in seconds.items():
        ratios = [a / b for a, b in zip(took, seconds[base], strict=True)]
        low, high = harness.quartiles(ratios)
        print(
            f"  {name:<18} {statistics.median(took):6.2f} s   "
            f"ratio {statistics.median(ratios):.2f} (quartiles {low:.2f} to {high:.2f})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", default=None)
    options = parser.parse_args()
    _, state = made(options.gigabytes)
    size = sum(t.nbytes for t in state.params.values()) * 3
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        path = Path(name) / "files"
        path.mkdir()
        print(f"a state of {size / 1e9:.2f} GB")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        ft.save(path / "first", state)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f"saving: peak memory above the state {(after - before) * 1024 / 1e6:,.0f} MB")
        measured(savers(state), "torch.save, fsync", options.rounds, True, path)
        print("loading, from the page cache:")
        measured(loaders(state), "torch.load", options.rounds, False, path)
        held, copy = stall(state, path)
        print(f"a background save holds training up for {held:.3f} s; a copy takes {copy:.3f} s")


if __name__ == "__main__":
    main()
