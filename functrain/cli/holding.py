"""Checkpoints that other runs start from, which the run that made them must not prune.

Adapters need theirs for as long as they are used, and a DPO run needs its as the reference. The
directory `used` of a run has a file for each such step, which lists the runs that start there, one
per line.
"""

from __future__ import annotations

import os
from pathlib import Path

from functrain import writing
from functrain.checkpoint.manifest import step_of
from functrain.cli.origins import RunDirectory


def hold(checkpoint: Path, user: Path) -> str | None:
    """Have a checkpoint's run keep it for the run `user`; returns why it cannot, or None.

    What is not a run's checkpoint (a transformers model) is never pruned and needs no record.
    """
    run = RunDirectory(checkpoint.parent.parent)
    if step_of(checkpoint) is None or checkpoint.parent != run.checkpoints:
        return None
    file, line = run.used / checkpoint.name, os.fsencode(user.absolute())
    try:
        if not file.exists() or line not in file.read_bytes().splitlines():
            file.parent.mkdir(exist_ok=True)
            # Appended, so that runs that begin at the same time each add their line.
            with file.open("ab", buffering=0) as opened:
                writing.append(opened, line + b"\n")
    except OSError as error:
        return f"{file}: cannot be written ({error.strerror})"
    return None


def used_steps(run: RunDirectory) -> tuple[int, ...]:
    """The steps of a run that other runs start from."""
    steps = (step_of(each) for each in run.used.glob("step-*"))
    return tuple(sorted(step for step in steps if step is not None))
