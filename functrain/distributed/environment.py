"""Making a world from the environment that torchrun sets."""

from __future__ import annotations

import os
import warnings
from typing import NoReturn

import torch
import torch.distributed as dist

from functrain.checks import is_number
from functrain.distributed import group
from functrain.distributed.speaking import TIMEOUT
from functrain.distributed.world import World
from functrain.errors import ConfigError, FunctrainWarning


def world(*, device: str | None = None, timeout: float = TIMEOUT) -> World:
    """The world of this process, from the environment that torchrun sets; without it, a world of 1.

    Reads `RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `MASTER_ADDR` and `MASTER_PORT`. The backend is gloo
    on the CPU and NCCL on CUDA, where the process takes the device of its local rank. An existing
    process group is used as it is; one made here ends when the last open world is left. Raises
    `ConfigError` for an inconsistent environment, and `WorkerError` if a worker does not arrive
    within `timeout` seconds.
    """
    if not is_number(timeout) or not 0 < timeout < float("inf"):
        raise ConfigError(f"timeout: {timeout!r}, expected a positive number of seconds")
    where = _where(device)
    size = _number("WORLD_SIZE", 1)
    rank = _number("RANK", 0 if size == 1 else None)
    if not rank < size:
        _refuse_rank(rank, size)
    if dist.is_initialized():
        _check_group(rank, size, where)
    if size == 1:
        return World(device=where, timeout=timeout)
    made = World(rank=rank, size=size, device=where, timeout=timeout)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    if dist.is_initialized():
        group.join(timeout)
    else:
        _check_address()
        backend = "gloo" if where.type == "cpu" else "cpu:gloo,cuda:nccl"
        with made.named("the meeting of all workers (one may be missing)"):
            group.meet(backend, rank, size, timeout)
        _warn_of_stale_addresses(backend)
    group.enter(made)
    return made


def _where(given: str | None) -> torch.device:
    try:
        where = torch.device(_device() if given in (None, "cuda") else given or "cpu")
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device: {given!r}, expected 'cpu' or 'cuda'") from error
    if where.type == "cpu" and given != "cuda":
        return where
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if where.type in ("cpu", "cuda") and not count:
        raise ConfigError(f"device: {given!r}, and this machine has none; use 'cpu'")
    if where.type == "cuda" and (where.index or 0) >= count:
        raise ConfigError(
            f"device: {str(where)!r}, and this machine has {count}; start as many workers on it, "
            "and LOCAL_RANK is the number of each"
        )
    return where


def _refuse_rank(rank: int, size: int) -> NoReturn:
    if not os.environ.get("WORLD_SIZE"):
        raise ConfigError(
            f"WORLD_SIZE: not in the environment, and RANK is {rank}, so there are several "
            "workers; start them with torchrun, which sets both"
        )
    raise ConfigError(f"RANK: {rank} of WORLD_SIZE {size}; torchrun sets both")


def _check_group(rank: int, size: int, where: torch.device) -> None:
    """Refuse an existing process group that does not fit this world."""
    if (dist.get_rank(), dist.get_world_size()) != (rank, size):
        raise ConfigError(
            f"world: the process group is of rank {dist.get_rank()} of {dist.get_world_size()}, "
            f"and the environment says {rank} of {size}"
        )
    backends = dist.get_backend_config()
    for kind in sorted({"cpu", where.type}):
        if size > 1 and f"{kind}:" not in backends:
            raise ConfigError(
                f"world: the process group, of {backends}, exchanges nothing that is on {kind}; "
                "make it with 'cpu:gloo,cuda:nccl', or let functrain make it"
            )


def _check_address() -> None:
    """Refuse an address at which the workers cannot find each other."""
    if not os.environ.get("MASTER_ADDR"):
        raise ConfigError(_missing("MASTER_ADDR"))
    port = _number("MASTER_PORT", None)
    if port >= 1 << 16:
        raise ConfigError(f"MASTER_PORT: {port} in the environment, expected less than {1 << 16}")


def _warn_of_stale_addresses(backend: str) -> None:
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    shared = os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "0") != "1"
    if restarts != "0" and shared and os.environ.get("RANK") == "0" and backend == "gloo":
        warnings.warn(
            "torchrun --max-restarts: restarted workers would look for those before them and wait "
            "for minutes; start torchrun with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
            FunctrainWarning,
            stacklevel=3,
        )


def _device() -> str:
    return f"cuda:{_number('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def _number(name: str, default: int | None) -> int:
    given = os.environ.get(name, "")
    if not given and default is not None:
        return default
    if not given:
        raise ConfigError(_missing(name))
    if not given.isdecimal():
        raise ConfigError(f"{name}: {given!r} in the environment, expected an integer")
    return int(given)


def _missing(name: str) -> str:
    return (
        f"{name}: not in the environment, and WORLD_SIZE says that there are several workers; "
        "start them with torchrun, which sets both"
    )
