import itertools

from gossip.seeking import FIRST_SECONDS, LONGEST_SECONDS, Seeking
from tests.clock import Clock


def calls(seeking, clock, seconds):
    """When it is due, asked a hundred times a second."""
    due = []
    for _ in range(int(seconds * 100)):
        if seeking.is_due(lambda: True):
            due.append(round(clock.now, 2))
        clock.now += 0.01
    return due


def test_seeking_is_off_until_it_begins_and_once_it_has_ended():
    clock = Clock()
    seeking = Seeking(clock)
    assert calls(seeking, clock, 1) == []
    seeking.begin()
    assert len(calls(seeking, clock, 1)) > 1
    seeking.end()
    assert calls(seeking, clock, 60) == []


def test_seeking_calls_less_and_less_often():
    clock = Clock()
    seeking = Seeking(clock)
    seeking.begin()
    gaps = [later - earlier for earlier, later in itertools.pairwise(calls(seeking, clock, 120))]
    assert abs(gaps[0] - FIRST_SECONDS) < 0.05 and abs(gaps[-1] - LONGEST_SECONDS) < 0.05
    assert all(abs(later / earlier - 2) < 0.1 for earlier, later in itertools.pairwise(gaps[:5]))


def test_seeking_waits_no_longer_for_having_known_nobody():
    clock = Clock()
    seeking = Seeking(clock)
    seeking.begin()
    for _ in range(100):
        assert not seeking.is_due(lambda: False)
        clock.now += 1.0
    assert len(calls(seeking, clock, 1)) > 1
