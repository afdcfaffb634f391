"""Memory for tensors that are filled at once: in large pages where the system has them.

Fresh memory is given by the kernel page by page, each zeroed when it is first touched. On Linux
that is most of the time of a load from the page cache: 0.32 s for 0.5 GB in pages of 4 KiB, 0.08 s
in pages of 2 MiB, asked for with madvise.
"""

from __future__ import annotations

import ctypes
import math
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


def _found() -> ctypes._NamedFuncPointer | None:
    function = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
    if function is not None:
        function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


_madvise = _found()


def peak(device: torch.device) -> int:
    """The most bytes so far: of tensors on a CUDA device; else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def keep_pages() -> bool:
    """Have this process keep the memory that it frees, for its next tensors; whether it now does.

    On Linux, glibc gives large freed blocks back to the kernel, which zeroes them page by page when
    they are asked for again: a training step does that at every tensor of its forward. With this
    the peak stays reserved, and steps spare the time (of other threads than the main one, blocks of
    64 MiB and more go back all the same). It changes no value. Under another allocator than glibc's
    nothing happens.
    """
    return _set({_MMAP_MAX: 0, _TRIM: -1})


def return_pages() -> bool:
    """Have this process return each large tensor's memory as it is freed; whether it now does.

    On Linux, glibc learns from what is freed to lay blocks of up to 32 MiB side by side in its
    heap. What is freed between others that are still in use stays with the process, and the next
    tensor often does not fit. With this each from 256 KiB on has pages of its own, which the
    kernel has again at once, and must zero when it gives them. A step of `benchmarks/steps.py`
    peaked at 635 MB instead of 740, in 1.05 times the time.

    Call it before the model is made: room that is free in the heap by then is used again, and
    stays. It changes no value; `keep_pages` is the opposite. Under another allocator than glibc's
    nothing happens.
    """
    # A threshold that is set no longer grows. The others are glibc's own defaults.
    if not _set({_MMAP_THRESHOLD: 1 << 18, _MMAP_MAX: 1 << 16, _TRIM: 1 << 17}):
        return False
    ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))  # what has been freed by now
    return True


def _set(options: Mapping[int, int]) -> bool:
    """Give glibc's allocator these options; whether it is this process's, and took them."""
    return _is_glibc() and all(ctypes.CDLL(None).mallopt(*each) == 1 for each in options.items())


def _is_glibc() -> bool:
    """Whether memory comes from glibc: with another allocator before it, its options are nobody's.

    jemalloc brings no `mallopt`, so that glibc's would answer; tcmalloc's answers 1 to everything.
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
    """`torch.zeros`; on the CPU in large pages where there are any."""
    if device.type == "cpu":
        return empty(shape, dtype).zero_()
    return torch.zeros(tuple(shape), dtype=dtype, device=device)


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`torch.empty` on the CPU; what is large lies in large pages where there are any.

    A hint, which changes no value: a kernel that refuses it gives ordinary pages.
    """
    tensor = torch.empty(tuple(shape), dtype=dtype, device="cpu")
    if tensor.nbytes >= _WORTH and _madvise is not None:
        # Whole pages within the tensor only: its neighbours' memory is theirs.
        begin = -(-tensor.data_ptr() // _PAGE) * _PAGE
        end = (tensor.data_ptr() + tensor.nbytes) // _PAGE * _PAGE
        _madvise(begin, end - begin, _ADVICE)
    return tensor


_reused: ContextVar[dict[torch.dtype, Tensor] | None] = ContextVar("reused", default=None)


@contextmanager
def reusing() -> Generator[None]:
    """Within it, on this thread, `scratch` gives the same memory again; after it, it is free."""
    token = _reused.set({})
    try:
        yield
    finally:
        _reused.reset(token)


def scratch(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`empty`; within `reusing` in the memory of the call before, as far as it has room.

    For one who is done with it before the next is asked for: the kernel need not find and zero it
    for each micro-batch. What is large is not kept, since in large pages that takes little time and
    the rest of the step has use for its memory.
    """
    kept, count = _reused.get(), math.prod(shape)
    if kept is None or count * dtype.itemsize >= _WORTH:
        return empty(shape, dtype)
    if dtype not in kept or len(kept[dtype]) < count:
        kept.pop(dtype, None)  # before the larger one is made
        kept[dtype] = empty((count,), dtype)
    return kept[dtype][:count].view(tuple(shape))
