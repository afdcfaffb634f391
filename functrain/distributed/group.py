"""The process group: made for the first world of a process, and ended with the last one.

The worlds of a process may be nested, and may come one after another: each time all have been left
the next one meets anew, under a name of its own in the store in which the workers find each other.
That store lives on, under torchrun and where worker 0 is slow to leave, and has the addresses of
the group before.
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
    """What functrain has made in this process; a group of somebody else's is nobody's here."""

    group: Any = None
    number: int = 0
    store: Any = None
    worlds: weakref.WeakSet[Any] = attrs.field(factory=weakref.WeakSet)


_made = _Made()


def meet(backend: str, rank: int, size: int, timeout: float) -> None:
    """Make the process group, with all workers."""
    given: dict[str, Any] = {"timeout": timedelta(seconds=timeout)}
    if _made.store is not None:
        # After one that has ended, whose addresses the store still has.
        store = dist.distributed_c10d.PrefixStore(f"functrain/group/{_made.number}", _made.store)
        given |= {"store": store, "rank": rank, "world_size": size}
    dist.init_process_group(backend, **given)
    if _made.store is None:
        _made.store = store_of_group()
        # Gloo may abort a process that ends with its threads alive.
        atexit.register(end)
    _made.group = dist.group.WORLD
    _made.number += 1


def join(timeout: float) -> None:
    """Go on with the group that is there; who else made it has chosen its timeout."""
    if _is_ours():
        # Its own name came with torch 2.14, which warns of the other.
        change = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
        change(timedelta(seconds=timeout))


def enter(world: object) -> None:
    """Note a world that uses the group."""
    _made.worlds.add(world)


def leave(world: object) -> None:
    """Note that a world no longer uses it; with the last one the group ends.

    Where that has failed, the others do not wait for this worker then (where DTensor has used the
    group, it keeps the connections for as long as the process lasts).
    """
    _made.worlds.discard(world)
    if not _made.worlds:
        end()


def store_of_group() -> Any:
    """The store in which the workers of the group have found each other."""
    return dist.distributed_c10d._get_default_store()


def end() -> None:
    """End the group, where it is ours, with what was said written."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # its reader has gone, or it is closed
            stream.flush()
    if _is_ours():
        dist.destroy_process_group()
    _made.group = None


def _is_ours() -> bool:
    return _made.group is not None and dist.is_initialized() and dist.group.WORLD is _made.group
