"""Memory for tensors that are filled at once: in large pages if the system has them.

The kernel provides fresh memory page by page, and zeroes each page when it is first touched. On
Linux that is most of the time of a load from the page cache: 0.32 s for 0.5 GB in pages of 4 KiB,
0.08 s in pages of 2 MiB, requested with madvise.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_ADVICE = 14  # MADV_HUGEPAGE, on every Linux
_TRIM, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # M_TRIM_THRESHOLD and so on, of malloc.h
_PAGE = 1 << 21
_WORTH = 4 * _PAGE
_TOUCHED = 1 << 24
LARGE = 1 << 25
"""From this many bytes on, a tensor's arithmetic outweighs the time that `trim` takes."""


def _found() -> ctypes._NamedFuncPointer | None:
    function = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
    if function is not None:
        function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


_madvise = _found()


def peak(device: torch.device) -> int:
    """The peak memory so far, in bytes: of tensors on a CUDA device, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def installed() -> int:
    """The memory of this machine, in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def keep_pages() -> bool:
    """Make this process keep freed memory for its next tensors; returns whether it now does.

    On Linux, glibc returns large freed blocks to the kernel, which zeroes them page by page when
    they are requested again; a training step pays for that at every tensor of its forward. With
    this the peak stays reserved and steps save the time (threads other than the main one still
    return blocks of 64 MiB and more); nor is anything trimmed before large logits. No value
    changes. Under another allocator than glibc's nothing happens.
    """
    global _trims
    kept = _set({_MMAP_MAX: 0, _TRIM: -1})
    _trims = _trims and not kept
    return kept


def return_pages() -> bool:
    """Make this process return each large tensor's memory once freed; returns whether it does.

    On Linux, glibc learns from what is freed to place blocks of up to 32 MiB side by side in its
    heap. A block freed between others still in use stays with the process, and often does not fit
    the next tensor. With this each block from 256 KiB on has pages of its own, which return to the
    kernel at once, and which it must zero when it provides them again. A step of
    `benchmarks/steps.py` peaked at 635 MB instead of 658, in 1.01 times the time.

    Call it before the model is made: heap memory that is already free then is reused and never
    returned. It changes no value; `keep_pages` does the opposite. Under another allocator than
    glibc's nothing happens.
    """
    global _trims
    # Once set, the threshold no longer grows. The other values are glibc's own defaults.
    if not _set({_MMAP_THRESHOLD: 1 << 18, _MMAP_MAX: 1 << 16, _TRIM: 1 << 17}):
        return False
    _trims = True
    _trim()  # what has been freed by now
    return True


# Whether `trim` does anything, and the page faults of this process at the last time.
_trims, _faults = True, 0


def trim() -> None:
    """Return what lies free in the heap, if this process has touched 16 MiB since the last time.

    glibc keeps the pages of activations that are freed in another order than they were made, and
    the next tensor, which must be aligned, often fits none of the gaps: `benchmarks/steps.py` held
    100 MB that nothing was in when it made its logits, which is where a step is at its peak. So a
    chunked head calls this before it makes large buffers, and a step of a model with a large table
    after its first micro-batch. Returned pages must be zeroed again: called after every micro-batch
    it cost models without a large head 3 to 6 % of their time. What has been touched is known from
    the page faults, within 2 µs.

    Nothing happens after `keep_pages`, or under another allocator than glibc's.
    """
    global _faults
    if not _trims or not _is_glibc():
        return
    import resource

    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    before = _faults if _faults <= faults else 0  # a forked child counts anew
    if (faults - before) * resource.getpagesize() >= _TOUCHED:
        _trim()
        _faults = faults


def _trim() -> None:
    ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))


def _set(options: Mapping[int, int]) -> bool:
    """Set these options of glibc's allocator; whether the process uses it and it took them."""
    return _is_glibc() and all(ctypes.CDLL(None).mallopt(*each) == 1 for each in options.items())


@functools.cache
def _is_glibc() -> bool:
    """Whether memory comes from glibc; with another allocator preloaded, `mallopt` misleads.

    jemalloc has no `mallopt`, so glibc's would answer; tcmalloc's answers 1 to everything.
    """
    if sys.platform != "linux":
        return False
    try:
        glibc, here = ctypes.CDLL("libc.so.6"), ctypes.CDLL(None)
        names = ("malloc", "mallopt", "malloc_trim")
        return all(_address(glibc, name) == _address(here, name) for name in names)
    except (OSError, AttributeError):  # another C library
        return False


def _address(library: ctypes.CDLL, name: str) -> int | None:
    return ctypes.cast(getattr(library, name), ctypes.c_void_p).value


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.zeros`; on the CPU in large pages if the system has them."""
    if device.type == "cpu":
        return empty(shape, dtype).zero_()
    return torch.zeros(tuple(shape), dtype=dtype, device=device)


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`torch.empty` on the CPU; a large tensor lies in large pages if the system has them.

    This is a hint that changes no value: a kernel that refuses it provides ordinary pages.
    """
    tensor = torch.empty(tuple(shape), dtype=dtype, device="cpu")
    if tensor.nbytes >= _WORTH and _madvise is not None:
        # Only pages that lie within the tensor: the memory beside it belongs to others.
        begin = -(-tensor.data_ptr() // _PAGE) * _PAGE
        end = (tensor.data_ptr() + tensor.nbytes) // _PAGE * _PAGE
        _madvise(begin, end - begin, _ADVICE)
    return tensor


_reused: ContextVar[dict[torch.dtype, Tensor] | None] = ContextVar("reused", default=None)


@contextmanager
def reusing() -> Generator[None]:
    """A context in which `scratch` reuses its memory on this thread; it is freed at the end."""
    token = _reused.set({})
    try:
        yield
    finally:
        _reused.reset(token)


def scratch(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`empty`; within `reusing`, in the memory of the previous call if there is room.

    It is for callers that are done with one tensor before they ask for the next: the kernel need
    not find and zero memory for each micro-batch. A large tensor's memory is not kept, since large
    pages cost little time and the rest of the step can use them.
    """
    kept, count = _reused.get(), math.prod(shape)
    if kept is None or count * dtype.itemsize >= _WORTH:
        return empty(shape, dtype)
    if dtype not in kept or len(kept[dtype]) < count:
        kept.pop(dtype, None)  # before the larger one is made
        kept[dtype] = empty((count,), dtype)
    return kept[dtype][:count].view(tuple(shape))
