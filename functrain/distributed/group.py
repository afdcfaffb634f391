"""The process group: made for the first world of a process, and ended with the last one.

The worlds of a process may be nested, or follow one another. After all have been left, the next one
makes a new group, under a new name in the store through which the workers find each other: the
store may outlive the group (under torchrun, or where worker 0 is slow to leave), and still holds
the addresses of the previous one.
"""

from __future__ import annotations

import atexit
import sys
import weakref
from contextlib import suppress
from datetime import timedelta
from typing import Any

import attrs
import torch.distributed as dist


@attrs.define
class _Made:
    """What functrain has made in this process; a process group made elsewhere is not recorded."""

    group: Any = None
    number: int = 0
    store: Any = None
    worlds: weakref.WeakSet[Any] = attrs.field(factory=weakref.WeakSet)


_made = _Made()


def meet(backend: str, rank: int, size: int, timeout: float) -> None:
    """Make the process group, with all workers."""
    given: dict[str, Any] = {"timeout": timedelta(seconds=timeout)}
    if _made.store is not None:
        # After a group that has ended, whose addresses the store still holds.
        store = dist.distributed_c10d.PrefixStore(f"functrain/group/{_made.number}", _made.store)
        given |= {"store": store, "rank": rank, "world_size": size}
    dist.init_process_group(backend, **given)
    if _made.store is None:
        _made.store = store_of_group()
        # Gloo may abort a process that exits while its threads are alive.
        atexit.register(end)
    _made.group = dist.group.WORLD
    _made.number += 1


def join(timeout: float) -> None:
    """Use the existing group; its timeout is changed only if functrain made it."""
    if _is_ours():
        # torch 2.14 made the function public, and warns of the private name.
        change = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
        change(timedelta(seconds=timeout))


def enter(world: object) -> None:
    """Register a world that uses the group."""
    _made.worlds.add(world)


def leave(world: object) -> None:
    """Unregister a world; the group ends with the last one.

    After a failure here this spares the others from waiting for this worker (unless DTensor has
    used the group: it keeps the connections for as long as the process lives).
    """
    _made.worlds.discard(world)
    if not _made.worlds:
        end()


def store_of_group() -> Any:
    """The store through which the workers of the group found each other."""
    return dist.distributed_c10d._get_default_store()


def end() -> None:
    """End the group, if functrain made it, after flushing the output."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # its reader is gone, or it is closed
            stream.flush()
    if _is_ours():
        dist.destroy_process_group()
    _made.group = None


def _is_ours() -> bool:
    return _made.group is not None and dist.is_initialized() and dist.group.WORLD is _made.group
