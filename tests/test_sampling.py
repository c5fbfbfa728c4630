"""The filters on logits, on distributions small enough to work out by hand."""

import math

import pytest
import torch

from mingru.sampling import SamplingOptions, filter_logits, min_p, sample, top_k, top_p, typical_p
from runtime.errors import UserError

P = torch.tensor([[0.05, 0.5, 0.15, 0.3], [0.25, 0.25, 0.25, 0.25]])


def kept(logits):
    return [[i for i, value in enumerate(row) if value > -math.inf] for row in logits.tolist()]


def test_top_k_keeps_the_likeliest():
    found = kept(top_k(P.log(), 2))
    assert found[0] == [1, 3] and len(found[1]) == 2
    assert kept(top_k(P.log(), 9))[0] == [0, 1, 2, 3]


@pytest.mark.parametrize("p, expected", [(0.01, [1]), (0.5, [1]), (0.51, [1, 3]), (0.79, [1, 3]), (0.94, [1, 2, 3])])
def test_top_p_keeps_the_fewest_that_reach_p(p, expected):
    assert kept(top_p(P[:1].log(), p)) == [expected]


@pytest.mark.parametrize("filtered", [top_p, typical_p])
def test_a_share_that_is_zero_in_float32_keeps_the_first(filtered):
    assert [len(row) for row in kept(filtered(P[:1].log(), 1e-46))] == [1]


def test_min_p_is_relative_to_the_likeliest():
    assert kept(min_p(P.log(), 0.5)) == [[1, 3], [0, 1, 2, 3]]
    assert kept(min_p(P.log(), 1.0))[0] == [1]


def test_typical_p_prefers_the_surprise_near_the_entropy():
    """Entropy 1.142 nats; surprises 3.00, 0.69, 1.90, 1.20: the fourth is the most typical, then the second."""
    assert kept(typical_p(P[:1].log(), 0.2)) == [[3]]
    assert kept(typical_p(P[:1].log(), 0.6)) == [[1, 3]]


def test_filters_combine():
    """In their order: of 0.5, 0.3, 0.15 the first two hold 0.84 of what top_k left, but only 0.8 of the whole."""
    assert kept(filter_logits(P[:1].log(), SamplingOptions(top_k=3, top_p=0.84))) == [[1, 3]]
    assert kept(filter_logits(P[:1].log(), SamplingOptions(top_p=0.84))) == [[1, 2, 3]]
    assert kept(filter_logits(P[:1].log(), SamplingOptions(top_p=0.94, min_p=0.4, typical_p=0.99))) == [[1, 3]]
    assert kept(filter_logits(P[:1].log(), SamplingOptions(top_p=0.94, min_p=0.4, typical_p=0.3))) == [[1]]


def test_filters_leave_the_rest_in_proportion():
    probabilities = filter_logits(P[:1].log(), SamplingOptions(top_k=2)).softmax(-1)
    assert probabilities[0].tolist() == pytest.approx([0, 0.625, 0, 0.375])


def test_temperature_sharpens():
    probabilities = filter_logits(P[:1].log(), SamplingOptions(temperature=0.5)).softmax(-1)
    squares = [value**2 for value in P[0].tolist()]
    assert probabilities[0].tolist() == pytest.approx([value / sum(squares) for value in squares])


def test_tiny_temperature_does_not_overflow():
    logits = torch.tensor([[1e4, 2e4, -1e4]])
    for temperature in (1e-38, 1e-50, 5e-324):
        assert sample(logits, SamplingOptions(temperature=temperature)).tolist() == [1]


def test_sample_at_zero_is_greedy():
    assert sample(P[:1].log(), SamplingOptions(temperature=0)).tolist() == [1]


def test_sample_draws_the_distribution():
    generator = torch.Generator().manual_seed(0)
    ids = sample(P[:1].log().expand(20000, 4), SamplingOptions(), generator)
    shares = torch.bincount(ids, minlength=4) / 20000
    assert torch.allclose(shares, P[0], atol=0.02)


def test_sample_repeats_with_the_seed():
    draws = [
        sample(torch.zeros(8, 256), SamplingOptions(), torch.Generator().manual_seed(seed)).tolist()
        for seed in (3, 3, 4)
    ]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -1.0}, {"temperature": math.inf}, {"temperature": math.nan}, {"top_k": 0}, {"top_p": 0.0},
        {"top_p": 1.1}, {"min_p": -0.1}, {"min_p": 1.5}, {"typical_p": 0.0}, {"typical_p": math.nan},
    ],
    ids=str,
)  # fmt: skip
def test_options_refuse_values_outside_their_range(values):
    with pytest.raises(UserError, match=f"expected for {next(iter(values))} "):
        SamplingOptions(**values)
