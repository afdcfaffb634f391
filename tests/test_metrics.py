"""Metrics are sums and weights: merging the parts gives the whole, whatever the parts are."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from functrain import metrics as m
from functrain.metrics import Metric, Metrics

LOSSES = st.floats(-5, 5)
# A loss for each of some tokens, in micro-batches that may have none.
PARTS = st.lists(st.lists(LOSSES, max_size=6), min_size=1, max_size=6).filter(any)


def _measured(losses: list[float]) -> Metrics:
    """What an objective measures over some tokens."""
    total, weight = math.fsum(losses), len(losses)
    return Metrics(
        {
            "loss": m.mean(torch.tensor(total, dtype=torch.float64), torch.tensor(weight)),
            "perplexity": m.exponential(total, weight),
            "num_tokens": m.total(torch.tensor(weight)),
        }
    )


def _values(metrics: Metrics) -> Any:
    return pytest.approx(metrics.to_dict(), rel=1e-12, abs=1e-12)


def _merged(parts: list[Metrics]) -> Metrics:
    return functools.reduce(Metrics.merge, parts)


@given(parts=PARTS)
def test_merged_parts_are_the_whole(parts: list[list[float]]) -> None:
    """Loss, perplexity and count over all tokens, a part without a token included."""
    whole = _measured(list(itertools.chain(*parts)))
    assert _merged([_measured(part) for part in parts]).to_dict() == _values(whole)


def test_several_sums_with_a_weight_each_are_read_as_their_quotients_sum() -> None:
    """So is a perplexity of them: the exponential of the whole, not of each."""
    sums, weights = torch.tensor([1.0, 3.0]), torch.tensor([2, 4])
    assert float(m.mean(sums, weights).value) == 1.25
    assert float(m.exponential(sums, weights).value) == pytest.approx(math.exp(1.25))


@given(parts=PARTS, data=st.data())
def test_merging_is_associative_and_commutative(parts: list[list[float]], data: Any) -> None:
    measured = [_measured(part) for part in parts]
    cut = data.draw(st.integers(0, len(measured)))
    shuffled = data.draw(st.permutations(measured))
    nested = (
        Metrics({})
        .merge(_merged([Metrics({}), *measured[:cut]]))
        .merge(_merged([Metrics({}), *measured[cut:]]))
    )
    plain = _merged(measured)
    assert nested.to_dict() == _values(plain)
    assert _merged(list(shuffled)).to_dict() == _values(plain)


@given(parts=PARTS)
def test_a_perplexity_is_that_of_the_merged_loss(parts: list[list[float]]) -> None:
    """Not the mean of the parts' perplexities."""
    merged = _merged([_measured(part) for part in parts])
    assert float(merged["perplexity"]) == pytest.approx(math.exp(float(merged["loss"])), rel=1e-12)


def test_a_mean_of_means_is_something_else() -> None:
    """One token of loss 3 and nine of 1: 1.2, where the mean of the two means would be 2."""
    merged = _measured([3.0]).merge(_measured([1.0] * 9))
    assert float(merged["loss"]) == pytest.approx(1.2, rel=1e-15)
    assert float(merged["num_tokens"]) == 10


def test_merging_changes_neither() -> None:
    one, other = _measured([1.0]), _measured([3.0])
    one.merge(other)
    one | other
    assert one.to_dict() == _measured([1.0]).to_dict()
    assert other.to_dict() == _measured([3.0]).to_dict()


def test_a_name_that_only_one_has_keeps_its_own_weight() -> None:
    merged = Metrics({"a": m.mean(6, 3)}).merge(Metrics({"b": m.total(5)}))
    assert merged.to_dict() == {"a": 2.0, "b": 5.0}


def test_the_right_one_wins_in_a_union() -> None:
    one, other = Metrics({"a": m.mean(1), "b": m.mean(2)}), Metrics({"b": m.mean(3)})
    assert (one | other).to_dict() == {"a": 1.0, "b": 3.0}


def test_metrics_read_as_a_mapping_of_scalar_tensors() -> None:
    metrics = _measured([1.0, 2.0])
    assert list(metrics) == ["loss", "perplexity", "num_tokens"]
    assert len(metrics) == 3
    assert "loss" in metrics
    assert "eval_loss" not in metrics
    assert dict(metrics).keys() == metrics.keys()
    for value in metrics.values():
        assert (value.dtype, value.shape) == (torch.float64, ())
    assert metrics.prefixed("eval_").to_dict() == {
        f"eval_{name}": value for name, value in metrics.to_dict().items()
    }
    assert repr(Metrics({"loss": m.mean(3.0, 2)})) == "Metrics(loss=1.5)"


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(KeyError, match="'los'; did you mean 'loss'"):
        _measured([1.0])["los"]
    assert _measured([1.0]).get("los") is None


def test_nothing_measured_is_not_a_number() -> None:
    """A mean over no weight is NaN, not an error and not 0; a count is 0."""
    nothing = _measured([])
    assert math.isnan(float(nothing["loss"]))
    assert math.isnan(float(nothing["perplexity"]))
    assert float(nothing["num_tokens"]) == 0


def test_a_mean_over_nothing_is_not_among_the_values() -> None:
    """It is there to be merged; a count of 0, and what is not finite for a reason, are shown."""
    nothing = _measured([])
    assert nothing.to_dict() == {"num_tokens": 0.0}
    assert repr(nothing) == "Metrics(num_tokens=0)"
    assert nothing.merge(_measured([2.0])).to_dict() == _measured([2.0]).to_dict()
    broken = Metrics({"loss": m.mean(math.nan, 0), "norm": m.mean(math.nan)})
    assert broken.to_dict().keys() == {"loss", "norm"}
    two = m.mean(torch.tensor([1.0, 0.0]), torch.tensor([2, 0]))
    assert Metrics({"loss": two}).to_dict() == {}


def test_what_is_not_finite_is_not_hidden() -> None:
    merged = _measured([1.0]).merge(_measured([math.nan]))
    assert math.isnan(float(merged["loss"]))
    assert float(_measured([math.inf])["loss"]) == math.inf


def test_sums_are_kept_in_float64_and_without_history() -> None:
    """In float32 a count stands still at 16,777,216 tokens."""
    counted = m.total(torch.tensor(2.0**24, dtype=torch.float32)).merge(m.total(1))
    assert float(counted.value) == 2**24 + 1
    loss = torch.tensor(1.0, requires_grad=True) * 2
    assert not m.mean(loss, 2).sum.requires_grad


@pytest.mark.parametrize("reading", ["mean", "total", "exp"])
def test_a_metric_keeps_its_reading_when_merged(reading: Any) -> None:
    half = Metric(torch.tensor(1.0).double(), torch.tensor(2.0).double(), reading)
    expected = {"mean": 0.5, "total": 2.0, "exp": math.exp(0.5)}[reading]
    assert float(half.merge(half).value) == pytest.approx(expected, rel=1e-15)
