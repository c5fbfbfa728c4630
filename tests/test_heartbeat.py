"""The coordinator thread: it beats, reports, gives way to another process of its rank, and never holds up the end."""

import threading
import time

import pytest

from bench.injection import Injection
from gossip.filesystem_coordinator import FilesystemCoordinator, RankReplaced
from gossip.heartbeat import Heartbeat
from gossip.registry import rank_file, read_entry
from tests.gossip_helpers import Rank, ranks, until

BEAT_SECONDS = 0.02


def record():
    return {"address": None, "step": 3, "fitness": None, "pid": 7, "host": "here"}


class Kept:
    """A heartbeat of one rank in `folder`, what it reported, and how often it led."""

    def __init__(self, folder, incarnation="only", duty=None, timeout=5.0):
        self.reports, self.led = [], []
        coordinator = FilesystemCoordinator(folder, 0, 1, incarnation, timeout)
        self.heartbeat = Heartbeat(coordinator, BEAT_SECONDS, record, duty or self.led.append, self.reports.append)
        self.heartbeat.start()

    def __enter__(self):
        return self.heartbeat

    def __exit__(self, *_):
        self.heartbeat.close()


def test_heartbeat_beats_leads_and_leaves(tmp_path):
    with (kept := Kept(tmp_path)) as heartbeat:
        until(lambda: heartbeat.roster and heartbeat.roster.member(0).sequence > 2)
        assert kept.led and kept.led[0].leader == 0
    assert read_entry(0, rank_file(tmp_path, 0))["state"] == "left"
    assert heartbeat.error is None and not heartbeat._thread.is_alive()


def test_heartbeat_reports_a_registry_that_is_gone_and_goes_on_when_it_is_back(tmp_path):
    folder = tmp_path / "population"
    with (kept := Kept(folder)) as heartbeat:
        until(lambda: heartbeat.roster)
        folder.rename(tmp_path / "away")
        until(lambda: kept.reports)
        (tmp_path / "away").rename(folder)
        sequence = heartbeat.roster.member(0).sequence
        until(lambda: heartbeat.roster.member(0).sequence > sequence + 1)
        assert "No such file" in kept.reports[0]


def test_heartbeat_that_was_never_started_can_be_closed(tmp_path):
    coordinator = FilesystemCoordinator(tmp_path, 0, 1, "only", 5.0)
    Heartbeat(coordinator, BEAT_SECONDS, record, None, print).close()
    assert list(tmp_path.iterdir()) == []


def test_heartbeat_outlives_memory_that_is_out(tmp_path):
    failures = [MemoryError()]

    def duty(roster):
        if failures:
            raise failures.pop()

    with (kept := Kept(tmp_path, duty=duty)) as heartbeat:
        until(lambda: kept.reports and heartbeat.roster.member(0).sequence > 2)
    assert kept.reports == ["memory is out"] and heartbeat.error is None


@pytest.mark.injects(Injection.RANK_TAKEN_TWICE)
def test_the_older_of_two_processes_ends_without_a_word_in_the_registry(tmp_path, capfd):
    with Kept(tmp_path, "older") as older:
        until(lambda: older.roster)
        with Kept(tmp_path, "newer") as newer:
            until(lambda: older.error)
            assert isinstance(older.error, RankReplaced) and not older._thread.is_alive()
            assert "process 7 on here" in str(older.error) and "\n" not in str(older.error)
            older.close()
            sequence = newer.roster.member(0).sequence
            until(lambda: newer.roster.member(0).sequence > sequence + 1)
            entry = read_entry(0, rank_file(tmp_path, 0))
            assert (entry["incarnation"], entry["state"], newer.error) == ("newer", "running", None)
    assert capfd.readouterr().err == ""  # no thread's traceback


@pytest.mark.injects(Injection.RANK_TAKEN_TWICE)
def test_a_rank_that_is_replaced_says_so_on_the_training_thread(tmp_path):
    config = {"filesystem_coordinator": True, "heartbeat_seconds": BEAT_SECONDS, "liveness_seconds": 5.0}
    with ranks(Rank(tmp_path, 0, **config)) as (older,):
        until(lambda: older.node.roster)
        with Kept(tmp_path / "population", "newer"), pytest.raises(RankReplaced, match=r"expected rank 0 of .* alone"):
            until(lambda: False, older)


def test_close_waits_only_so_long_for_a_beat_that_hangs(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("gossip.heartbeat.CLOSE_SECONDS", 0.3)
    begun, go_on = threading.Event(), threading.Event()

    def duty(roster):
        begun.set()
        go_on.wait()

    kept = Kept(tmp_path, duty=duty)
    assert begun.wait(timeout=20)
    began = time.monotonic()
    kept.heartbeat.close()
    assert 0.3 <= time.monotonic() - began < 3.0
    assert "the registry has not answered for 0.3 s" in capfd.readouterr().err
    go_on.set()
    until(lambda: not kept.heartbeat._thread.is_alive())
    assert read_entry(0, rank_file(tmp_path, 0))["state"] == "left"  # late, but it leaves
