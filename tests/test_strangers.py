"""Bounds on callers that have not authenticated, over real sockets: how many, how fast, and what is said of them."""

import asyncio
import contextlib
import subprocess
import sys
import threading
import time

import pytest

from bench.injection import Injection
from gossip.faults import Fault
from gossip.protocol import OPENING_BYTES, Flow, Hello, encode_opening
from gossip.reports import Reports
from gossip.strangers import STRANGERS_LIMIT
from gossip.switchboard import ACCEPT_PAUSE_SECONDS, ACCEPTS_AT_ONCE, REPORT_SECONDS
from gossip.wire import Wire
from tests.gossip_helpers import (
    PATIENCE,
    Rank,
    RawPeer,
    Trainer,
    assert_answers,
    counted,
    hello,
    last_event,
    ranks,
    until,
)


@pytest.fixture(autouse=True)
def close_raw_peers():
    yield
    RawPeer.close_all()


def test_reports_say_the_first_of_a_kind_at_once_and_then_count():
    said = []

    def line(text):
        return lambda others: said.append(text + others)

    async def talk():
        reports = Reports(seconds=0.2)
        for number in range(4):
            reports.tell("flood", line(f"flood {number}"))
        reports.tell("other", line("other"))
        assert said == ["flood 0", "other"]
        deadline = time.monotonic() + PATIENCE
        while len(said) < 3:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
        assert said[2:] == ["flood 3, and 2 more"]
        reports.tell("flood", line("flood 4"))
        reports.close()
        assert said[3:] == ["flood 4"]

    asyncio.run(talk())


def idle(rank, count):
    return [RawPeer.call(rank.where) for _ in range(count)]


def strangers(rank):
    return len(rank.node._switchboard._strangers)


def is_reset(peer):
    """Wait for the other end to close; whether the kernel was made to forget the connection."""
    try:
        while peer.socket.recv(65536):
            pass
    except ConnectionResetError:
        return True
    return False


@pytest.mark.injects(Injection.FLOOD)
def test_strangers_make_room_for_newer_ones_oldest_first(tmp_path):
    with ranks(Rank(tmp_path, 0, exchange_seconds=30.0)) as (rank,):
        waiting = idle(rank, STRANGERS_LIMIT)
        until(lambda: strangers(rank) == STRANGERS_LIMIT)
        newer = idle(rank, 3)
        assert all(is_reset(peer) for peer in waiting[:3])
        until(lambda: counted(rank, failed=3))
        assert rank.events()[0]["message"].startswith(Fault.CLOSING.value)
        assert len(rank.events()) == 1  # the others are counted, and told of later
        assert_answers(rank)  # a peer is let in at once, at the expense of the next oldest
        assert is_reset(waiting[3])
        for peer in (*waiting[4:], *newer):
            assert peer.socket.getpeername() == rank.where  # they are still listened to
        assert strangers(rank) == STRANGERS_LIMIT - 1


FLOOD = """
import contextlib, socket, sys
kept = []
while True:
    with contextlib.suppress(OSError):
        kept.append(socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=1))
        if len(kept) % 2:
            kept[-1].sendall(b"GET / HTTP/1.1\\r\\n" * 40)
        if len(kept) > 100:
            kept.pop(0).close()
"""


@contextlib.contextmanager
def flood(rank):
    """Two processes that connect as fast as they can, say something or nothing, and stay for a while."""
    command = [sys.executable, "-I", "-S", "-c", FLOOD, str(rank.where[1])]
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            stack.callback(stack.enter_context(subprocess.Popen(command)).kill)
        yield


@pytest.mark.injects(Injection.FLOOD)
def test_flood_of_strangers_is_bounded_in_number_rate_and_lines(tmp_path):
    with ranks(Rank(tmp_path, 0, exchange_seconds=30.0)) as (rank,), Trainer(rank):
        began, most = time.monotonic(), 0
        with flood(rank):
            until(lambda: rank.node.counters.failed > 2 * STRANGERS_LIMIT)
            flooded = time.monotonic()
            while time.monotonic() - flooded < 2.0:
                most = max(most, strangers(rank))
                until(lambda seen=rank.step: rank.step > seen)  # training goes on
        listened_to = rank.node.counters.failed + strangers(rank)
        passed = time.monotonic() - began
        assert most <= STRANGERS_LIMIT
        assert listened_to <= ACCEPTS_AT_ONCE * (1 + passed / ACCEPT_PAUSE_SECONDS)
        assert len(rank.events()) <= 3 * (1 + passed // REPORT_SECONDS)  # one at a time for each kind of failure
        until(lambda: strangers(rank) == 0)
        assert_answers(rank)
        rank.node.close()
        told = [row["message"] for row in rank.events() if row["event"] == "failed"]
        assert any(", and " in message and message.endswith("more") for message in told)


def test_peers_that_come_all_at_once_are_all_heard(tmp_path):
    with ranks(Rank(tmp_path, 0)) as (rank,):
        crowd = idle(rank, 3 * ACCEPTS_AT_ONCE)
        for peer in crowd:
            peer.handshake()
        until(lambda: counted(rank, received=len(crowd)))
        assert counted(rank, failed=0)


@pytest.mark.injects(Injection.SLOW_HANDSHAKE)
def test_slow_strangers_hold_no_peer_up(tmp_path):
    with ranks(Rank(tmp_path, 0, exchange_seconds=30.0)) as (rank,):
        slow = idle(rank, 2 * STRANGERS_LIMIT)
        until(lambda: counted(rank, failed=STRANGERS_LIMIT))  # all are accepted by then
        for byte in b"gruboros\x00":  # all of them at once, a byte at a time
            for peer in slow:
                with contextlib.suppress(OSError):  # closed by then
                    peer.socket.sendall(bytes([byte]))
            began = time.monotonic()
            good = RawPeer.call(rank.where).handshake()
            assert good.greet(hello(rank.schema, fitness=None))[1].flow is Flow.NONE
            assert time.monotonic() - began < 2.0
            good.close()
        until(lambda: rank.node.counters.tied == 9, rank)


class Counted:
    """Stands for Wire.take: how often it was called; gives at most `most` bytes at a time."""

    def __init__(self, monkeypatch, most=100):
        self.times, self.most, self._real = 0, most, Wire.take
        monkeypatch.setattr(Wire, "take", lambda wire, nbytes: self(wire, nbytes))

    def __call__(self, wire, nbytes):
        self.times += 1
        return self._real(wire, min(nbytes, self.most))


def take_turns(rank, times=3):
    """Let the network thread look `times` at what there is to do."""
    for _ in range(times):
        turned = threading.Event()
        rank.node._switchboard.post(turned.set)
        assert turned.wait(PATIENCE)


@pytest.mark.injects(Injection.SLOW_HANDSHAKE)
def test_a_slow_stranger_wakes_nobody_until_its_message_is_whole(tmp_path, monkeypatch):
    looks = Counted(monkeypatch)
    with ranks(Rank(tmp_path, 0, exchange_seconds=30.0)) as (rank,):
        slow = RawPeer.call(rank.where)
        until(lambda: looks.times == 1)
        said = encode_opening(bytes(32)) + bytes(32)
        for length, message in ((1, said[:OPENING_BYTES]), (2, said[OPENING_BYTES:])):
            for byte in message[:-1]:
                slow.socket.sendall(bytes([byte]))
                take_turns(rank)
            assert looks.times == length and strangers(rank) == 1
            slow.socket.sendall(message[-1:])
            until(lambda length=length: looks.times == length + 1)
        assert is_reset(slow)


def test_a_caller_whose_messages_come_in_pieces_is_let_in(tmp_path, monkeypatch):
    looks = Counted(monkeypatch, most=7)
    with ranks(Rank(tmp_path, 0)) as (rank,):
        assert_answers(rank)
        assert looks.times >= 6 + 5


def test_strangers_have_no_task(tmp_path):
    with ranks(Rank(tmp_path, 0, exchange_seconds=30.0)) as (rank,):
        waiting = idle(rank, 5)
        for peer in waiting[:3]:
            peer.openings()
        until(lambda: strangers(rank) == 5)
        assert not rank.node._switchboard._tasks


def garbage(peer):
    peer.socket.sendall(bytes(OPENING_BYTES))


def wrong_version(peer):
    peer.socket.sendall(b"gruboros\xff\xff" + bytes(32))


def wrong_proof(peer):
    peer.openings()
    peer.socket.sendall(bytes(32))


def half_an_opening(peer):
    peer.socket.sendall(b"gruboros\x00")  # until the deadline


def half_a_proof(peer):
    peer.openings()
    peer.socket.sendall(bytes(16))


def nothing(peer):
    pass


def much_too_much(peer):
    peer.socket.sendall(bytes(20000))


REFUSALS = (garbage, wrong_version, wrong_proof, half_an_opening, half_a_proof, nothing, much_too_much)


@pytest.mark.parametrize("refused", REFUSALS, ids=lambda script: script.__name__)
def test_a_refusal_is_the_same_reset_whatever_was_wrong(tmp_path, monkeypatch, refused):
    monkeypatch.setattr("gossip.switchboard.HANDSHAKE_SECONDS", 0.5)
    with ranks(Rank(tmp_path, 0)) as (rank,):
        peer = RawPeer.call(rank.where)
        with contextlib.suppress(ConnectionError):
            refused(peer)
        assert is_reset(peer)
        until(lambda: counted(rank, failed=1))
        assert last_event(rank)["event"] == "failed"  # here, what was wrong is known


def test_a_peer_that_has_proved_itself_is_closed_without_a_reset(tmp_path):
    with ranks(Rank(tmp_path, 0)) as (rank,):
        peer = RawPeer.call(rank.where).handshake()
        peer.send(hello(rank.schema, schema_hash="0f" * 32))
        peer.receive(Hello)  # it is told with whom it cannot mix
        assert not is_reset(peer)
