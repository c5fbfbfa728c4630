"""Real nodes, real sockets: mixing, whole snapshots, one conversation at a time, and a clean end."""

import gc
import os
import threading
import time

import pytest
import torch

from bench.injection import Injection
from gossip.faults import Fault
from gossip.filesystem_coordinator import Roster
from gossip.network_utils import listen
from gossip.protocol import Busy, Decision, Flow, Hello, Receipt
from runtime.errors import UserError
from tests.gossip_helpers import (
    Rank,
    RawPeer,
    Trainer,
    counted,
    hello,
    last_event,
    make_state,
    payload_of,
    ranks,
    until,
    values_of,
)


@pytest.fixture(autouse=True)
def close_raw_peers():
    yield
    RawPeer.close_all()


def pair(folder, fit=1.0, unfit=2.0, values=(1.0, 3.0), **config):
    """Two ranks; the second knows the first's address and the first is the fitter one."""
    first = Rank(folder, 0, values[0], **config)
    second = Rank(folder, 1, values[1], peers=(first.node.address,), **config)
    for rank, fitness in ((first, fit), (second, unfit)):
        rank.fitness = fitness
        rank.boundary()
    return first, second


# Mixing


def test_node_merges_the_fitter_peers_weights_as_a_difference(tmp_path):
    with ranks(*pair(tmp_path, recombination_alpha=0.25)) as (fit, unfit):
        fit.step = 17
        unfit.call()
        report = until(unfit.boundary, fit)
        until(lambda: counted(fit, won=1), fit)
    assert values_of(unfit) == {2.5} and values_of(fit) == {1.0}
    assert report.peer_scalars == {"k": 0.0} and not report.clonal and not report.both
    assert counted(unfit, initiated=1, received=0, lost=1, won=0, tied=0, failed=0, busy=0)
    assert counted(fit, initiated=0, received=1, lost=0, won=1, tied=0, failed=0, busy=0)
    sent, merged = last_event(fit), last_event(unfit)
    assert (sent["event"], merged["event"]) == ("sent", "merged")
    assert sent["exchange_id"] == merged["exchange_id"] != "NA" and "step 17" in merged["message"]
    assert (sent["peer"], merged["peer"]) == ("1", "0") and int(sent["bytes"]) > fit.schema.nbytes
    theirs, ours = fit.node.counters, unfit.node.counters
    assert theirs.bytes_sent == ours.bytes_received > fit.schema.nbytes
    assert theirs.bytes_received == ours.bytes_sent > 0


def test_node_keeps_what_was_learned_while_bytes_travelled(tmp_path):
    with ranks(*pair(tmp_path, recombination_alpha=0.5)) as (fit, unfit):
        unfit.call()
        until(lambda: unfit.node._desk._delivery is not None, fit, Server(unfit))
        for tensor in unfit.live.values():
            tensor.add_(10.0)
        assert unfit.boundary()
    weights = {float(tensor.mean()) for name, tensor in unfit.live.items() if not name.endswith("v")}
    moments = {float(tensor.mean()) for name, tensor in unfit.live.items() if name.endswith("v")}
    assert weights == {13.0 + 0.5 * (1.0 - 3.0)} and moments == {(13.0 + 1.0) / 2}


class Server:
    """A rank that serves snapshots but does not come to merge, like one in the middle of a step."""

    def __init__(self, rank):
        self.rank = rank

    def boundary(self):
        self.rank.node._desk.serve()


def test_node_clones_with_the_peers_scalars(tmp_path):
    with ranks(*pair(tmp_path, method="clonal")) as (fit, unfit):
        fit.scalars = {"k": 1234.0}
        unfit.call()
        report = until(unfit.boundary, fit)
    assert values_of(unfit) == {1.0} and report.clonal and report.peer_scalars == {"k": 1234.0}


def test_node_averages_at_both_ends(tmp_path):
    with ranks(*pair(tmp_path, method="average")) as (fit, unfit):
        unfit.call()
        until(lambda: counted(unfit, averaged=1) and counted(fit, averaged=1), fit, unfit)
        until(lambda: last_event(fit)["event"] == last_event(unfit)["event"] == "averaged")
    assert values_of(fit) == values_of(unfit) == {2.0}
    assert counted(fit, won=0, lost=0, failed=0) and counted(unfit, won=0, lost=0, failed=0)


@pytest.mark.parametrize(("fitness", "reason"), [((1.0, 1.0), "tie"), ((None, 1.0), "unknown")])
def test_node_moves_nothing_when_nobody_wins(tmp_path, fitness, reason):
    with ranks(*pair(tmp_path, *fitness)) as (one, other):
        other.call()
        until(lambda: counted(one, tied=1) and counted(other, tied=1), one, other)
        assert last_event(other)["event"] == "tied" and reason in last_event(other)["message"]
    assert values_of(one) == {1.0} and values_of(other) == {3.0}


def test_node_calls_by_the_throw_of_its_dice(tmp_path):
    with ranks(*pair(tmp_path, None, None, mixing_rate=1.0)) as (one, other):
        until(lambda: other.node.counters.tied >= 3, one, other)
        assert counted(one, initiated=0)  # it knows nobody
    with ranks(*pair(tmp_path, None, None, mixing_rate=0.0)) as (one, other):
        for _ in range(1000):
            other.boundary()
        assert counted(other, initiated=0)


def test_node_publishes_no_fitness_for_merged_weights(tmp_path):
    with ranks(*pair(tmp_path)) as (fit, unfit):
        unfit.call()
        until(unfit.boundary, fit)
        said = unfit.node._desk.published
        assert said.fitness is None and said.generation == 1
        unfit.boundary()
        assert unfit.node._desk.published.fitness == 2.0


def test_node_finds_its_peers_in_the_registry(tmp_path):
    led = []
    config = {"filesystem_coordinator": True, "heartbeat_seconds": 0.02, "liveness_seconds": 5.0}
    with ranks(*(Rank(tmp_path, rank, duty=led.append, **config) for rank in range(3))) as population:
        for rank in population:
            rank.fitness = 1.0
        first, _, last = population
        until(lambda: last.node.roster and len(last.node.roster.peers(2)) == 2, *population)
        until(lambda: (last.call(), last.node.counters.tied)[1], *population)
        until(lambda: led)
        assert isinstance(led[0], Roster) and first.node.roster.leader == 0
        last.node.close()
        until(lambda: first.node.roster.member(2).state == "left", first)
        assert last.node.roster is None


@pytest.mark.injects(Injection.VANISHED)
def test_node_survives_a_registry_that_is_gone(tmp_path):
    config = {"filesystem_coordinator": True, "heartbeat_seconds": 0.01, "liveness_seconds": 5.0}
    with ranks(Rank(tmp_path / "run", 0, **config)) as (rank,):
        until(lambda: rank.node.roster)
        (tmp_path / "run" / "population").rename(tmp_path / "elsewhere")
        until(lambda: rank.events() and last_event(rank)["event"] == "registry_failed", rank)
        (tmp_path / "elsewhere").rename(tmp_path / "run" / "population")
        sequence = rank.node.roster.member(0).sequence
        until(lambda: rank.node.roster.member(0).sequence > sequence + 1, rank)


def test_node_raises_on_the_training_thread_what_ended_another(tmp_path):
    broken = threading.Event()

    def duty(roster):
        if broken.is_set():
            raise ZeroDivisionError

    config = {"filesystem_coordinator": True, "heartbeat_seconds": 0.01, "liveness_seconds": 5.0}
    hook, threading.excepthook = threading.excepthook, lambda arguments: None
    try:
        with ranks(Rank(tmp_path, 0, duty=duty, **config)) as (rank,), pytest.raises(ZeroDivisionError):
            broken.set()
            until(lambda: False, rank)
    finally:
        threading.excepthook = hook


# Snapshots are of one step boundary


def snapshots(tmp_path, torn, count):
    """The payloads of `count` exchanges with a rank that trains, as sets of the values in them, and their steps."""
    sender = Rank(tmp_path, 0, state=make_state(0.0, shapes=((64, 64),) * 4))
    sender.fitness = 1.0
    with ranks(sender), Trainer(sender, torn):
        until(lambda: sender.step > 2)
        for _ in range(count):
            peer = RawPeer.call(sender.where).handshake()
            theirs, decision = peer.greet(hello(sender.schema, fitness=2.0))
            assert decision.flow is Flow.RESPONDER_SENDS
            header, payload = peer.receive_snapshot()
            assert header.step >= theirs.step
            yield header.step, set(torch.frombuffer(bytearray(payload), dtype=torch.float32).tolist())
            peer.close()
            until(lambda: sender.idle)
    assert counted(sender, won=count, failed=0)


@pytest.mark.injects(Injection.SNAPSHOT_MID_STEP)
def test_node_sends_the_state_of_exactly_one_step(tmp_path):
    steps = []
    for step, values in snapshots(tmp_path, torn=False, count=60):
        assert values == {float(step)}
        steps.append(step)
    assert steps == sorted(set(steps))


def test_a_torn_snapshot_would_be_seen(tmp_path):
    with pytest.raises(AssertionError, match="torn"):
        for step, values in snapshots(tmp_path, torn=True, count=60):
            assert values == {float(step)}, "torn"


# Busy, self, taken


def test_node_tells_a_second_caller_that_it_is_busy(tmp_path):
    with ranks(Rank(tmp_path, 0)) as (rank,):
        rank.fitness = 2.0
        rank.boundary()
        first = RawPeer.call(rank.where).handshake()
        first.greet(hello(rank.schema))
        second = RawPeer.call(rank.where).handshake()
        assert isinstance(second.greet(hello(rank.schema, rank=6, incarnation="cd" * 16))[0], Busy)
        until(lambda: counted(rank, busy=1, failed=0, received=2))
        assert last_event(rank)["event"] == "busy" and last_event(rank)["peer"] == "6"
        first.close()
        until(lambda: counted(rank, failed=1), rank)  # found when the snapshot that it waited for is there


def test_node_is_busy_until_it_has_merged(tmp_path):
    with ranks(*pair(tmp_path, method="clonal")) as (fit, unfit):
        unfit.call()
        until(lambda: unfit.node._desk._delivery is not None, fit)
        peer = RawPeer.call(unfit.where).handshake()
        assert isinstance(peer.greet(hello(unfit.schema))[0], Busy)
        assert unfit.boundary() is not None
        peer = RawPeer.call(unfit.where).handshake()
        assert isinstance(peer.greet(hello(unfit.schema, fitness=None))[0], Hello)
        until(lambda: counted(unfit, tied=1))


@pytest.mark.injects(Injection.CROSSED_CALLS)
def test_nodes_that_call_each_other_at_once_do_not_fail(tmp_path):
    first, second = pair(tmp_path)
    first.node._peers = (second.node.address,)
    with ranks(first, second):
        # Both are in their own call before either hears the other's.
        assert first.node._switchboard._slot.acquire(blocking=False)
        second.call()
        until(lambda: counted(second, busy=1) and second.idle, first, second)
        first.node._switchboard.release()
        gate = threading.Barrier(2)
        boards = [rank.node._switchboard for rank in (first, second)]
        for board in boards:
            board.post(gate.wait)
            board.post(board._begin_call)
        until(lambda: all(sum(vars(r.node.counters)[n] for n in ("busy", "won", "lost")) == 3 for r in (first, second)),
              first, second)  # fmt: skip
        assert counted(first, failed=0) and counted(second, failed=0)
        # Each call is busy at both ends, or a conversation at both.
        mine, theirs = first.node.counters, second.node.counters
        assert mine.busy == theirs.busy >= 1 and (mine.won, mine.lost) == (theirs.lost, theirs.won)
        second.call()
        until(lambda: second.node.counters.lost, first, second)  # and they still mix


def test_node_drops_its_own_address_from_its_peers(tmp_path):
    with listen("127.0.0.1", 0) as held:
        port = held.getsockname()[1]
    with ranks(Rank(tmp_path, 0, port=port, peers=(f"127.0.0.1:{port}",))) as (rank,):
        rank.call()
        until(lambda: counted(rank, failed=1), rank)
        assert last_event(rank)["message"].startswith(Fault.SELF.value) and len(rank.events()) == 1
        until(lambda: not rank.node._switchboard._slot.locked())
        rank.call()
        assert rank.node._book.known() == [] and counted(rank, initiated=1)


def test_node_counts_a_peer_that_it_cannot_reach_and_goes_on(tmp_path):
    with listen("127.0.0.1", 0) as held:
        nobody = f"127.0.0.1:{held.getsockname()[1]}"
    with ranks(Rank(tmp_path, 0, peers=(nobody,))) as (rank,):
        for times in (1, 2):
            until(lambda: rank.idle and rank.node._book.known())
            rank.call()
            until(lambda times=times: counted(rank, failed=times, initiated=times), rank)
            assert rank.node._book.known() == []  # not at once again: it would keep this rank from its other peers
        assert last_event(rank)["message"].startswith(Fault.UNREACHABLE.value)
        assert last_event(rank)["peer"] == nobody


# Weights that training replaces


def test_node_drops_a_merge_for_weights_that_are_gone(tmp_path):
    with ranks(*pair(tmp_path, method="clonal")) as (fit, unfit):
        unfit.call()
        until(lambda: unfit.node._desk._delivery is not None, fit)
        unfit.node.weights_changed()
        assert unfit.boundary() is None and values_of(unfit) == {3.0}
        until(lambda: counted(unfit, failed=1, lost=0) and len(unfit.events()) == 1)
        assert last_event(unfit)["message"].startswith(Fault.WEIGHTS_CHANGED.value)
        unfit.call()
        until(lambda: counted(unfit, lost=1), fit, unfit)


def test_node_refuses_a_snapshot_of_weights_that_are_gone(tmp_path):
    with ranks(Rank(tmp_path, 0)) as (rank,):
        rank.fitness = 1.0
        rank.boundary()
        peer = RawPeer.call(rank.where).handshake()
        peer.greet(hello(rank.schema, fitness=2.0))
        until(lambda: rank.node._desk.waiting)
        rank.node.weights_changed()
        assert peer.closed()
        until(lambda: counted(rank, failed=1))
        assert last_event(rank)["message"].startswith(Fault.WEIGHTS_CHANGED.value)


def test_node_refuses_a_snapshot_when_its_hello_was_of_other_weights(tmp_path):
    with ranks(Rank(tmp_path, 0)) as (rank,):
        rank.fitness = 1.0
        rank.boundary()
        peer = RawPeer.call(rank.where).handshake()
        peer.send(hello(rank.schema, fitness=2.0))
        peer.receive(Hello)
        rank.node.weights_changed()
        peer.send(peer.receive(Decision))
        until(lambda: counted(rank, failed=1), rank)
        assert last_event(rank)["message"].startswith(Fault.WEIGHTS_CHANGED.value)


def test_node_drops_a_delivery_whose_hello_was_of_other_weights(tmp_path):
    with ranks(*pair(tmp_path, method="clonal")) as (fit, unfit):
        unfit.call()
        until(lambda: fit.node._desk.waiting)  # the conversation is on, and waits for the sender
        unfit.node.weights_changed()
        until(lambda: counted(unfit, failed=1), fit, unfit)
        assert values_of(unfit) == {3.0} and counted(unfit, lost=0)


def test_node_goes_on_when_memory_for_the_merge_is_out(tmp_path, monkeypatch):
    def exhausted(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4 MiB\nand more")

    with ranks(*pair(tmp_path)) as (fit, unfit):
        monkeypatch.setattr("gossip.merge.merge", exhausted)
        unfit.call()
        until(lambda: counted(unfit, failed=1), fit, unfit)
        until(lambda: unfit.events())
        assert last_event(unfit)["message"].startswith(Fault.OUT_OF_MEMORY.value)
        assert unfit.node._desk.published.generation == 0 and values_of(unfit) == {3.0}


# The end


def open_descriptors():
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.injects(Injection.SHUTDOWN_WITH_LIVE_SOCKETS)
@pytest.mark.parametrize(
    "moment", ["idle", "stranger", "handshake", "greeted", "asked", "delivered", "calling", "resolving"]
)
def test_close_leaves_no_thread_and_no_socket(tmp_path, moment):
    with ranks(Rank(tmp_path, 9)):  # whatever is opened once and for all
        pass
    threads, descriptors = set(threading.enumerate()), open_descriptors()
    held = listen("127.0.0.1", 0)  # never accepts
    peers = {"calling": (f"127.0.0.1:{held.getsockname()[1]}",), "resolving": ("localhost:1",)}.get(moment, ())
    rank = Rank(tmp_path, 0, peers=peers, method="clonal", filesystem_coordinator=True)
    rank.fitness = 1.0 if moment == "asked" else 3.0
    rank.boundary()
    peer = RawPeer.call(rank.where) if moment not in ("idle", "calling", "resolving") else None
    if moment == "handshake":
        peer.openings()
    elif moment in ("greeted", "asked", "delivered"):
        peer.handshake().greet(hello(rank.schema, fitness=2.0))
        if moment == "asked":
            until(lambda: rank.node._desk.waiting)
        elif moment == "delivered":
            peer.send_snapshot(rank.schema, payload_of(rank.live, rank.schema))
            assert peer.receive(Receipt).accepted
            until(lambda: rank.node._desk.waiting)
    elif moment in ("calling", "resolving"):
        rank.call()
        until(lambda: counted(rank, initiated=1))
    board = rank.node._switchboard  # kept, so that nothing is closed by being forgotten
    rank.node.close()
    rank.node.close()
    assert not board._slot.locked() or moment == "delivered"
    if moment not in ("idle", "stranger"):
        until(lambda: rank.node.counters.failed == 1)
        assert last_event(rank)["message"].startswith((Fault.CLOSING.value, Fault.UNREACHABLE.value))
    if peer:
        assert peer.closed()
        peer.close()
    held.close()
    rank.log.close()
    assert set(threading.enumerate()) == threads
    assert open_descriptors() == descriptors


@pytest.mark.injects(Injection.PORT_TAKEN)
def test_start_refuses_a_taken_port_and_leaves_nothing(tmp_path):
    threads = set(threading.enumerate())
    with listen("127.0.0.1", 0) as held, pytest.raises(UserError, match="in use"):
        Rank(tmp_path, 0, port=held.getsockname()[1], filesystem_coordinator=True)
    assert set(threading.enumerate()) == threads


def test_node_counts_a_conversation_that_its_own_error_ended(tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise ZeroDivisionError

    with ranks(*pair(tmp_path)) as (one, other):
        with monkeypatch.context() as patch:
            patch.setattr("gossip.exchange.decide", broken)
            other.call()
            until(lambda: counted(one, failed=1) and counted(other, failed=1), one, other)
            until(lambda: other.idle)
        assert last_event(one)["message"] == Fault.INTERNAL.value
        said = []
        until(lambda: said.append(capsys.readouterr().err) or "ZeroDivisionError" in "".join(said))
        other.call()
        until(lambda: counted(other, lost=1), one, other)


def test_step_boundary_does_not_wait_for_a_peer_that_hangs(tmp_path):
    """A thousand steps pass while a peer holds a conversation open and says nothing."""
    with ranks(Rank(tmp_path, 0, exchange_seconds=30.0, mixing_rate=1.0)) as (rank,):
        rank.fitness = 2.0
        rank.boundary()
        peer = RawPeer.call(rank.where).handshake()
        peer.greet(hello(rank.schema))
        began = time.monotonic()
        for _ in range(1000):
            rank.boundary()
        assert time.monotonic() - began < 5.0 and rank.node._switchboard._slot.locked()
        peer.close()
