"""Strikes: how long a process is distrusted, when that fades, and how many are remembered."""

import pytest

from gossip.reputation import (
    FADE_SECONDS,
    FIRST_SECONDS,
    LONGEST_SECONDS,
    MOST_STRIKES,
    REMEMBERED,
    Reputation,
)
from tests.clock import Clock


@pytest.fixture
def clock():
    return Clock(1000.0)


@pytest.fixture
def reputation(clock):
    return Reputation(clock)


def test_reputation_trusts_a_process_that_it_does_not_know(reputation):
    assert not reputation.distrusts("a")


def test_reputation_distrusts_after_a_strike_and_trusts_again_in_time(reputation, clock):
    assert reputation.strike("a") == FIRST_SECONDS == 60
    assert reputation.distrusts("a") and not reputation.distrusts("b")
    clock.now += FIRST_SECONDS - 0.001
    assert reputation.distrusts("a")
    clock.now += 0.001
    assert not reputation.distrusts("a")


def test_reputation_doubles_the_time_up_to_an_hour(reputation, clock):
    times = []
    for _ in range(9):
        times.append(reputation.strike("a"))
        clock.now += times[-1]
        assert not reputation.distrusts("a")
    assert times == [60, 120, 240, 480, 960, 1920, 3600, 3600, 3600] and LONGEST_SECONDS == 3600
    assert reputation.strike("b") == 60


def test_reputation_stays_an_hour_after_any_number_of_strikes(reputation):
    assert [reputation.strike("a") for _ in range(3000)][-1] == LONGEST_SECONDS


def test_reputation_forgets_a_strike_for_each_hour_of_trust(reputation, clock):
    for _ in range(3):
        clock.now += reputation.strike("a")
    clock.now += FADE_SECONDS - 0.001
    assert reputation.strike("a") == 480  # not yet
    clock.now += 480 + 2 * FADE_SECONDS
    assert reputation.strike("a") == 240  # two of four are forgotten, and this one is the third
    clock.now += 240 + 100 * FADE_SECONDS
    assert reputation.strike("a") == FIRST_SECONDS


def test_reputation_forgets_nothing_while_it_distrusts(reputation, clock):
    for _ in range(MOST_STRIKES):
        reputation.strike("a")
    clock.now += LONGEST_SECONDS
    assert reputation.strike("a") == LONGEST_SECONDS


def test_reputation_forgets_any_number_of_strikes_in_as_many_hours_as_count(reputation, clock):
    for _ in range(3000):
        reputation.strike("a")
    clock.now += LONGEST_SECONDS + MOST_STRIKES * FADE_SECONDS
    assert reputation.strike("a") == FIRST_SECONDS


def test_reputation_forgets_the_process_whose_last_strike_is_oldest(reputation):
    for number in range(REMEMBERED):
        reputation.strike(f"{number}")
    reputation.strike("0")
    reputation.strike("new")
    assert reputation.distrusts("0") and reputation.distrusts("new") and reputation.distrusts("2")
    assert not reputation.distrusts("1")
    assert reputation.strike("1") == FIRST_SECONDS  # nothing of it was kept
