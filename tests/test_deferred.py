"""A module made without its memory: each tensor has the bits that it would have had at once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from functrain import keys
from functrain.deferred import _as_laid, _Place, built, recording
from functrain.errors import ArchitectureError
from functrain.models import DecoderConfig, decoder

WIDTH = 3
Act = Callable[[list[Tensor], int, int], object]
ACTS: dict[str, Act] = {
    "normal": lambda t, i, _: t[i].normal_(0.5, 0.1),
    "uniform": lambda t, i, _: t[i].uniform_(-1, 1),
    "bernoulli": lambda t, i, _: t[i].bernoulli_(0.3),
    "fill": lambda t, i, j: t[i].fill_(j + 0.5),
    "scale": lambda t, i, _: t[i].mul_(1.5),
    "add": lambda t, i, j: t[i].add_(t[j]),
    "copy": lambda t, i, j: t[i].copy_(t[j]),
    "of one's own": lambda t, i, _: t[i].copy_(torch.arange(9.0).view(3, 3)),
    "changed later": lambda t, i, _: _lent(t[i]),
    "row": lambda t, i, j: t[i][j % WIDTH].zero_(),
    "a number into a row": lambda t, i, j: t[i].__setitem__(j % WIDTH, 7),
    "a number by index": lambda t, i, _: t[i].__setitem__((torch.tensor([0, 2]), 1), -1.0),
    "by a mask": lambda t, i, j: t[i].masked_fill_(t[j] > 0.5, 0.0),
    "transposed": lambda t, i, _: t[i].t_(),
    "view": lambda t, i, _: t.append(t[i].t()),
    "clone": lambda t, i, _: t.append(t[i].clone()),
    "new": lambda t, i, j: t.append(t[i] @ t[j]),
    "empty": lambda t, i, _: t.append(torch.empty_like(t[i]).normal_()),
    "read": lambda t, i, _: t[i].mul_(float(t[i].abs().clamp(0, 2).nan_to_num().sum()) % 3),
    "of a generator": lambda t, i, j: t[i].normal_(generator=torch.Generator().manual_seed(j)),
    "orthogonal": lambda t, i, _: nn.init.orthogonal_(t[i]),
    "truncated": lambda t, i, _: nn.init.trunc_normal_(t[i], std=0.8),
    "sparse": lambda t, i, _: nn.init.sparse_(t[i], 0.4),
    "dropout": lambda t, i, _: t[i].copy_(nn.functional.dropout(t[i].nan_to_num(), 0.5)),
    "of probabilities": lambda t, i, _: t.append(torch.bernoulli(t[i].nan_to_num().clamp(0, 1))),
    "about": lambda t, i, _: t[i].copy_(torch.normal(t[i].nan_to_num(), 0.1)),
    "of a number of its own": lambda t, i, _: t[i].bernoulli_(torch.tensor(0.3)),
    "drawn into": lambda t, i, _: torch.normal(0.0, 1.0, (3, 3), out=t[i]),
    "beside a real one": lambda t, i, _: torch._foreach_mul_([t[i], torch.ones(3)], 2.0),
    "other data": lambda t, i, _: setattr(t[i], "data", torch.full((3, 3), 4.0)),
    "data of another": lambda t, i, j: setattr(t[i], "data", t[j] * 2),
    "without a kernel of the meta device": lambda t, i, _: t[i].copy_(_rounded(t[i])),
    "decomposed": lambda t, i, _: t[i].copy_(torch.linalg.qr(t[i].clamp(-2, 2).nan_to_num())[0]),
}


def _rounded(tensor: Tensor) -> Tensor:
    known = tensor.nan_to_num().clamp(-2, 2)
    return torch.fake_quantize_per_tensor_affine(known, 0.1, 0, -128, 127)


def _lent(tensor: Tensor) -> None:
    own = torch.ones(3, 3)
    tensor.copy_(own)
    own.zero_()


def _acted(acts: list[tuple[str, int, int]]) -> list[Tensor]:
    found = [torch.empty(WIDTH, WIDTH).fill_(number) for number in range(2)]
    for name, one, other in acts:
        ACTS[name](found, one % len(found), other % len(found))
    return found


@given(st.lists(st.tuples(st.sampled_from(sorted(ACTS)), st.integers(0, 5), st.integers(0, 5))))
def test_whatever_is_done_the_bits_are_those_of_doing_it_at_once(
    acts: list[tuple[str, int, int]],
) -> None:
    with keys.seeded(1):
        expected = _acted(acts)
        drawn = torch.get_rng_state()
    with keys.seeded(1):
        with recording() as recorded:
            found = _acted(acts)
        assert torch.equal(torch.get_rng_state(), drawn)
    moved = torch.get_rng_state()
    for tensor, value in reversed(list(zip(found, expected, strict=True))):
        made = recorded.made(tensor)
        assert made.stride() == value.stride()
        torch.testing.assert_close(made, value, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(torch.get_rng_state(), moved)


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "decoder": lambda: decoder(DecoderConfig(vocabulary=20, width=16, layers=2, heads=2), seed=1),
    "encoder, of copies": _encoder,
    "LSTM": lambda: nn.LSTM(4, 4, 2),
    "padding": lambda: nn.Embedding(10, 4, padding_idx=2),
    "buffers": lambda: nn.Sequential(nn.Conv1d(3, 4, 2), nn.BatchNorm1d(4)),
    "parametrised": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
    "narrowed": lambda: nn.Linear(4, 4).bfloat16(),
    "copied": lambda: copy.deepcopy(nn.Bilinear(3, 4, 5)),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_the_same(name: str) -> None:
    with keys.seeded(2):
        expected = MODULES[name]()
    with keys.seeded(2), recording() as recorded:
        module = MODULES[name]()
    found: dict[str, Any] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    assert any(recorded.defers(tensor) for tensor in found.values())
    for key, value in [*expected.named_parameters(), *expected.named_buffers()]:
        made = recorded.made(found[key])
        assert made.device.type == "cpu"
        assert torch.equal(made, value), key


def test_without_draws_the_generators_stay_and_what_is_not_random_is_the_same() -> None:
    state = torch.get_rng_state()
    with recording(draws=False) as recorded:
        module = decoder(DecoderConfig(vocabulary=20, width=16, layers=1, heads=2))
        norm = nn.init.trunc_normal_(torch.empty(4))
    assert torch.equal(torch.get_rng_state(), state)
    assert recorded.defers(norm)
    expected = decoder(DecoderConfig(vocabulary=20, width=16, layers=1, heads=2))
    assert torch.equal(recorded.made(module.model.inv_freq), expected.model.inv_freq)
    assert torch.equal(recorded.made(module.model.norm.weight), torch.ones(16))


def test_memory_is_laid_out_as_it_was_promised() -> None:
    """Kernels of the meta device and of the CPU need not agree about strides."""
    bare = torch.empty(6, device="meta").as_strided((2, 2), (1, 3), 1)
    laid = _as_laid(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), place := _Place.of(bare))
    assert place.over(laid.untyped_storage()).tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_what_cannot_wait_is_said() -> None:
    def written_by_numpy() -> nn.Module:
        layer = nn.Linear(2, 2)
        layer.weight.data.numpy()[:] = 1
        return layer

    def failing() -> nn.Module:
        layer = nn.Linear(2, 2)
        layer.weight.data.set_(torch.ones(2, 2))
        return layer

    with pytest.raises(ArchitectureError, match=r"numpy\(\): of a parameter that has no memory"):
        built(written_by_numpy)
    with pytest.raises(ArchitectureError, match="cannot be made without its memory"):
        built(failing)


def test_a_constructor_that_has_another_way_does_not_take_it() -> None:
    """Where the meta device has no kernel; with the memory there would be no error to catch."""

    def make() -> nn.Module:
        layer = nn.Linear(3, 3)
        try:
            layer.weight.data.copy_(torch.geqrf(layer.weight.data)[0])
        except NotImplementedError:
            layer.weight.data.fill_(1)
        return layer

    with keys.seeded(2):
        expected = make()
    with keys.seeded(2):
        module, recorded = built(make)
    assert torch.equal(recorded.made(module.weight), expected.weight)  # type: ignore[arg-type]
    assert recorded.defers(module.bias)  # type: ignore[arg-type]


def test_a_tensor_of_the_meta_device_has_no_values_to_take() -> None:
    with pytest.raises(ArchitectureError, match="meta device, which has no values"), recording():
        torch.empty(3).copy_(torch.empty(3, device="meta"))


def test_outside_everything_is_as_before() -> None:
    with recording():
        pass
    assert torch.empty(2).device.type == "cpu"
    assert torch.empty(2, device="meta").is_meta
