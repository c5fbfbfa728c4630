"""The paired test by which a winner is called, against published values, and what it makes of chance."""

import random

import pytest

from gossip.comparison import Verdict, compare, two_sided_p

# Critical values of Student's t for two-sided chances, as tables print them.
TABLE = [
    (0.05, 1, 12.706), (0.05, 2, 4.303), (0.05, 3, 3.182), (0.05, 10, 2.228), (0.05, 30, 2.042), (0.05, 255, 1.969),
    (0.01, 1, 63.657), (0.01, 4, 4.604), (0.01, 15, 2.947), (0.001, 7, 5.408), (0.001, 60, 3.460),
]  # fmt: skip


@pytest.mark.parametrize(("chance", "freedom", "critical"), TABLE)
def test_two_sided_p_is_that_of_the_tables(chance, freedom, critical):
    assert two_sided_p(critical, freedom) == pytest.approx(chance, rel=2e-3)
    assert two_sided_p(-critical, freedom) == two_sided_p(critical, freedom)


@pytest.mark.parametrize("freedom", [1, 2, 7, 255])
def test_two_sided_p_goes_from_one_to_nothing(freedom):
    assert two_sided_p(0.0, freedom) == 1.0
    chances = [two_sided_p(t / 4, freedom) for t in range(20)]
    assert chances == sorted(chances, reverse=True) and 0 <= chances[-1] < 0.15


def drawn(shift, spread, count=16, seed=0):
    dice = random.Random(seed)
    base = [dice.gauss(2.0, 0.4) for _ in range(count)]  # windows differ far more than the ranks do
    return [loss + shift + dice.gauss(0, spread) for loss in base], base


def test_compare_finds_the_fitter_one_behind_the_windows_own_spread():
    worse, better = drawn(0.05, 0.02)
    assert compare(worse, better, 0.05, 0.01, 1).verdict is Verdict.SECOND
    assert compare(better, worse, 0.05, 0.01, 1).verdict is Verdict.FIRST
    assert compare(better, worse, 0.05, 0.01, 1).effect == -compare(worse, better, 0.05, 0.01, 1).effect


def test_compare_calls_nothing_below_the_least_effect():
    worse, better = drawn(0.05, 0.001)
    assert compare(worse, better, 0.05, 0.04, 1).verdict is Verdict.SECOND
    assert compare(worse, better, 0.05, 0.06, 1).verdict is Verdict.UNCLEAR


def test_compare_takes_the_common_beginning_of_the_windows():
    worse, better = drawn(0.05, 0.02)
    whole = compare(worse, better[:9], 0.05, 0.01, 1)
    assert whole == compare(worse[:9], better, 0.05, 0.01, 1) and whole.windows == 9


@pytest.mark.parametrize("losses", [(), (1.0,)])
def test_compare_has_no_evidence_in_fewer_than_two_windows(losses):
    assert compare(losses, [5.0] * len(losses), 1.0, 0.0, 1).verdict is Verdict.UNCLEAR


def test_compare_of_equal_models_is_unclear_and_of_a_constant_difference_certain():
    assert compare([1.0, 2.0], [1.0, 2.0], 0.5, 0.0, 1).verdict is Verdict.UNCLEAR
    assert compare([1.0, 2.0], [1.5, 2.5], 0.05, 0.1, 1).verdict is Verdict.FIRST


def test_compare_never_calls_a_winner_without_significance():
    worse, better = drawn(1.0, 0.001)
    assert compare(worse, better, 0.0, 0.0, 1).verdict is Verdict.UNCLEAR


def test_compare_errs_no_more_often_than_its_significance_however_often_it_looks():
    """Equal models, new windows at each look: the share of sequences in which any of 20 looks called a winner."""
    dice = random.Random(1)
    wrong = 0
    for _ in range(400):
        looks = (
            compare([dice.gauss(2, 0.1) for _ in range(8)], [dice.gauss(2, 0.1) for _ in range(8)], 0.1, 0.0, look)
            for look in range(1, 21)
        )
        wrong += any(comparison.verdict is not Verdict.UNCLEAR for comparison in looks)
    assert 0.04 * 400 < wrong < 0.14 * 400  # 0.1 in expectation, less what later looks leave unspent
