"""Memory: given as asked for, kept where the user wants it, and none beside for a norm."""

from __future__ import annotations

import mmap
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import functrain as ft
from functrain import memory, norms, trees
from functrain.objectives import chunks

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="an option of Linux' glibc")

# Large and small blocks in turn, as a forward pass asks for them.
FREED = """
import os, signal, torch
from pathlib import Path
from functrain import keep_pages, memory, return_pages

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

def measured(asked):
    for each in asked:
        if each != "trim":
            assert {"keep": keep_pages, "return": return_pages}[each]()
    torch.ones((8 << 20) - 64)  # freed at once: glibc lays what is up to so large into its heap
    before = resident()
    blocks = [(torch.ones(1 << 20), torch.ones(1 << 14)) for _ in range(50)]
    between = [small for _, small in blocks]
    del blocks
    if "trim" in asked:
        memory.trim()
    return (resident() - before) >> 20

for asked in CASES:
    child = os.fork()
    if not child:
        signal.alarm(60)  # the end of one that hangs
        print(measured(asked.split()), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""
# What is asked for, and how many MiB are left, at least and at most.
FREED_CASES = {
    "": (50, 260),
    "keep": (150, 260),
    "return": (-20, 20),
    "keep return": (-20, 20),
    "return keep": (150, 260),
    "trim": (-20, 20),
    "return trim": (-20, 20),
    "keep trim": (150, 260),
    "keep return trim": (-20, 20),
}


@LINUX
def test_what_is_freed_stays_or_goes_as_asked_for() -> None:
    """Small tensors in use lie between large ones, which by itself glibc cannot give back then."""
    code = f"CASES = {list(FREED_CASES)}\n{FREED}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = dict(zip(FREED_CASES, map(int, done.stdout.split()), strict=True))
    assert {
        asked: left
        for asked, left in found.items()
        if not FREED_CASES[asked][0] <= left <= FREED_CASES[asked][1]
    } == {}


def _trims(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """An entry for each time that the heap is trimmed from here on."""
    made: list[None] = []
    monkeypatch.setattr(memory, "_trim", lambda: made.append(None))
    monkeypatch.setattr(memory, "_faults", 0)
    return made


@LINUX
def test_the_heap_is_trimmed_once_enough_has_been_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    made = _trims(monkeypatch)
    memory.trim()  # this process has touched more than 16 MiB by now
    assert len(made) == 1
    memory.trim()
    assert len(made) == 1
    touched = mmap.mmap(-1, memory._TOUCHED + (1 << 20))
    for page in range(0, len(touched), mmap.PAGESIZE):
        touched[page] = 1
    memory.trim()
    assert len(made) == 2


@LINUX
def test_a_forked_process_counts_what_it_touches_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    made = _trims(monkeypatch)
    monkeypatch.setattr(memory, "_faults", 1 << 60)
    memory.trim()
    assert len(made) == 1


@LINUX
@pytest.mark.parametrize(
    ("microbatches", "large", "expected"),
    [(2, True, 3), (1, True, 2), (2, False, 0)],  # one for each head, and after the first
)
def test_a_step_trims_before_large_logits_and_after_its_first_micro_batch(
    monkeypatch: pytest.MonkeyPatch, microbatches: int, large: bool, expected: int
) -> None:
    monkeypatch.setattr(chunks, "WORTH", 0)
    monkeypatch.setattr(memory, "LARGE", 0 if large else memory.LARGE)
    called: list[None] = []
    monkeypatch.setattr(memory, "trim", lambda: called.append(None))
    config = ft.models.DecoderConfig(vocabulary=64, width=8, layers=1, heads=2)
    architecture, params, buffers = ft.split(ft.models.decoder(config))
    step = ft.pretrain_step(architecture, ft.optim.adamw(), microbatches=microbatches)
    ids = torch.arange(16).view(2, 8)
    step(step.init(params, buffers), {"input_ids": ids, "labels": ids})
    assert len(called) == expected


# One that answers 1 to every option, as tcmalloc's mallopt does, which is an error there.
OTHER = """
#include <stddef.h>
int mallopt(int option, int value) { return 1; }
int malloc_trim(size_t pad) { return 1; }
"""


@LINUX
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_under_another_allocator_nothing_is_said_to_be_kept(tmp_path: Path) -> None:
    (tmp_path / "other.c").write_text(OTHER)
    library = tmp_path / "other.so"
    subprocess.run(["cc", "-shared", "-fPIC", tmp_path / "other.c", "-o", library], check=True)
    ask = "from functrain import keep_pages, return_pages; print(keep_pages(), return_pages())"
    done = subprocess.run(
        [sys.executable, "-c", ask],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "LD_PRELOAD": str(library)},
    )
    assert done.stdout.split() == ["False", "False"]


@given(
    shape=st.lists(st.integers(0, 2000), min_size=0, max_size=3).filter(
        lambda shape: torch.Size(shape).numel() < 1 << 23
    ),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.bool]),
)
def test_shapes_and_values(shape: list[int], dtype: torch.dtype) -> None:
    made = memory.zeros(shape, dtype, torch.device("cpu"))
    assert torch.equal(made, torch.zeros(shape, dtype=dtype))
    assert memory.empty(shape, dtype).shape == made.shape


def test_scratch_is_the_same_memory_as_long_as_it_has_room() -> None:
    """Within `reusing` alone, on the thread that is within it, and one memory for each dtype."""
    with memory.reusing():
        first = memory.scratch((4, 5), torch.float32)
        narrow = memory.scratch((4, 5), torch.bfloat16)
        assert memory.scratch((2, 10), torch.float32).data_ptr() == first.data_ptr()
        assert memory.scratch((3,), torch.float32).data_ptr() == first.data_ptr()
        assert narrow.data_ptr() != first.data_ptr()
        larger = memory.scratch((5, 5), torch.float32)
        assert larger.shape == (5, 5)
        assert larger.data_ptr() != first.data_ptr()
        assert memory.scratch((25,), torch.float32).data_ptr() == larger.data_ptr()
        assert memory.scratch((0, 7), torch.float32).shape == (0, 7)
        large = [memory.scratch((memory._WORTH // 4,), torch.float32) for _ in range(2)]
        assert large[0].data_ptr() != large[1].data_ptr()
        with ThreadPoolExecutor(1) as elsewhere:
            other = elsewhere.submit(memory.scratch, (5, 5), torch.float32).result()
        assert other.data_ptr() != larger.data_ptr()
        with memory.reusing():
            assert memory.scratch((5, 5), torch.float32).data_ptr() != larger.data_ptr()
        assert memory.scratch((5, 5), torch.float32).data_ptr() == larger.data_ptr()
    one, two = memory.scratch((5, 5), torch.float32), memory.scratch((5, 5), torch.float32)
    assert len({one.data_ptr(), two.data_ptr(), larger.data_ptr()}) == 3


class Normed(TorchDispatchMode):
    """The most elements that a norm has been taken of at once, and the most bytes copied.

    Matrices in float64 are counted apart: how many have been made, and the most elements of one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.copied = 0, 0
        self.matrices, self.widest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        found = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.linalg_vector_norm.default and args[0].ndim > 1:
            self.elements = max(self.elements, args[0].numel())
        if isinstance(found, torch.Tensor) and not func.is_view:
            if found.dtype == torch.float64 and found.ndim > 1:
                self.matrices += found is not args[0]  # as it is where it was written into
                self.widest = max(self.widest, found.numel())
            else:
                self.copied = max(self.copied, found.nbytes)
        return found


@pytest.mark.parametrize("size", [(1, 1), (513, 2049), (1 << 18, 3), (3, 1 << 17), (7,), ()])
def test_the_norm_of_a_large_leaf_is_taken_in_pieces(size: tuple[int, ...]) -> None:
    """The CPU's kernel needs a copy in float64: it is one of a piece, and the next takes its place.

    A piece has two rows at least. What is kept is a number for each row of both leaves.
    """
    leaf = torch.randn(size, generator=torch.Generator().manual_seed(1))
    turned = leaf.t() if leaf.ndim == 2 else leaf
    with Normed() as normed:
        norm = trees.global_norm({"leaf": leaf, "turned": turned})
    piece = max(norms._PIECE, 2 * max(size, default=1))
    assert normed.elements <= piece
    rows = sum(size[:2]) if size else 2
    assert normed.copied <= 8 * max(rows, 2 * leaf.numel() if leaf.ndim < 2 else 0)
    assert normed.matrices <= 2  # for each leaf
    assert normed.widest <= piece
    expected = torch.linalg.vector_norm(torch.stack([leaf, leaf]).double())
    torch.testing.assert_close(norm, expected, rtol=1e-13, atol=0.0)
