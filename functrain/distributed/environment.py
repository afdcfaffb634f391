"""The environment that torchrun sets, as a world."""

from __future__ import annotations

import atexit
import os
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist

from functrain.distributed.speaking import TIMEOUT
from functrain.distributed.world import World, end
from functrain.errors import ConfigError, FunctrainWarning, is_number


def world(*, device: str | None = None, timeout: float = TIMEOUT) -> World:
    """The world of this process, from the environment that torchrun sets; `ALONE` without it.

    `RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `MASTER_ADDR` and `MASTER_PORT` are read. gloo on the CPU,
    NCCL on CUDA, where the process takes the device of its local rank. Raises `ConfigError` for an
    environment that makes no sense, and `WorkerError` where a worker does not come in `timeout`
    seconds.
    """
    if not is_number(timeout) or not 0 < timeout < float("inf"):
        raise ConfigError(f"timeout: {timeout!r}, expected a positive number of seconds")
    size = _number("WORLD_SIZE", 1)
    rank = _number("RANK", 0)
    where = torch.device(_device() if device in (None, "cuda") else device or "cpu")
    if device == "cuda" and where.type == "cpu":
        raise ConfigError("device: 'cuda', and this machine has none; use 'cpu'")
    if size == 1:
        return World(device=where, timeout=timeout)
    if not 0 <= rank < size:
        raise ConfigError(f"RANK: {rank} of WORLD_SIZE {size}; torchrun sets both")
    made = World(rank=rank, size=size, device=where, timeout=timeout)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    if not dist.is_initialized():
        backend = "gloo" if where.type == "cpu" else "cpu:gloo,cuda:nccl"
        with made.meeting("the meeting of all workers (one may be missing)"):
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
        _warn_of_stale_addresses(backend)
        # Gloo may abort a process that ends with its threads alive.
        atexit.register(end)
    elif (dist.get_rank(), dist.get_world_size()) != (rank, size):
        raise ConfigError(
            f"world: the process group is of rank {dist.get_rank()} of {dist.get_world_size()}, "
            f"and the environment says {rank} of {size}"
        )
    return made


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


def _number(name: str, default: int) -> int:
    given = os.environ.get(name, "")
    if not given:
        return default
    if not given.isdecimal():
        raise ConfigError(f"{name}: {given!r} in the environment, expected an integer")
    return int(given)
