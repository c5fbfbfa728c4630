"""Every fault that a hostile or broken peer can cause, over real sockets: each is named and harms no weight."""

import contextlib
import os
import pickle
import socket

import pytest

from bench.injection import Injection
from gossip.faults import Fault
from gossip.protocol import (
    LINEAGE_LIMIT,
    SCALAR_LIMIT,
    Decision,
    End,
    Flow,
    Hello,
    Receipt,
    SnapshotHeader,
    canonical_json,
    encode_frame,
)
from gossip.strangers import STRANGERS_LIMIT
from tests.gossip_helpers import (
    PATIENCE,
    Rank,
    RawPeer,
    Trainer,
    assert_answers,
    counted,
    hello,
    last_event,
    make_state,
    payload_of,
    ranks,
    until,
    values_of,
)

LOADED = []  # a mark for each time that somebody loaded the pickle


class Hostile:
    """What runs a function of the sender's where it is unpickled."""

    def __reduce__(self):
        return mark_loaded, (1,)


def mark_loaded(mark):
    LOADED.append(mark)


PICKLE = pickle.dumps(Hostile())


@pytest.fixture(autouse=True)
def close_raw_peers():
    yield
    RawPeer.close_all()


def numbered(cases):
    """Ids of parametrized (script, fault): the number tells scripts of one fault apart."""
    return [f"{number}-{case.values[1].name}" for number, case in enumerate(cases)]


# Callers: each script has its way with one connection.


def stranger_garbage(peer, rank):
    peer.socket.sendall(os.urandom(4096))


def stranger_leaves(peer, rank):
    peer.socket.sendall(b"grubo")
    peer.socket.shutdown(socket.SHUT_WR)


def stranger_version(peer, rank):
    peer.socket.sendall(b"gruboros\x00\x63" + bytes(32))


def stranger_without_secret(peer, rank):
    peer.openings()
    peer.socket.sendall(bytes(32))


def stranger_drips(peer, rank):
    """Slow-loris: a byte before any single read would time out, past the deadline of the whole handshake."""
    for byte in b"gruboros\x00\x01" + bytes(30):
        try:
            peer.socket.sendall(bytes([byte]))
        except OSError:
            return
        if peer_gone(peer.socket, seconds=0.05):
            return
    raise AssertionError("the deadline moved with every byte")


def peer_gone(connection, seconds):
    connection.settimeout(seconds)
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except ConnectionError:
        return True


def silent_after_handshake(peer, rank):
    peer.handshake()


def leaves_after_handshake(peer, rank):
    peer.handshake().socket.shutdown(socket.SHUT_WR)


def flips(place):
    def script(peer, rank):
        frame = bytearray(peer.handshake().frame(hello(rank.schema)))
        frame[place] ^= 1
        peer.socket.sendall(frame)

    return script


def oversize_length(peer, rank):
    frame = bytearray(peer.handshake().frame(hello(rank.schema)))
    frame[4:8] = b"\xff" * 4
    peer.socket.sendall(frame)


def half_a_frame(peer, rank):
    peer.handshake().socket.sendall(peer.frame(hello(rank.schema))[:50])
    peer.socket.shutdown(socket.SHUT_WR)


def pickle_for_opening(peer, rank):
    peer.socket.sendall(PICKLE)


def pickle_for_proof(peer, rank):
    peer.openings()
    peer.socket.sendall(PICKLE)


def pickle_for_hello(peer, rank):
    peer.handshake().socket.sendall(PICKLE)


def pickle_for_body(peer, rank):
    """A frame that is whole, of a kind that is due and under the right MAC, with a pickle in it."""
    peer.handshake()
    peer.socket.sendall(peer.frame_of(1, PICKLE))


def pickle_for_header(peer, rank):
    winning(peer, rank)
    peer.socket.sendall(PICKLE)


def unbounded_snapshot(peer, rank):
    winning(peer, rank)
    header = {"generation": 0, "lineage": 0, "nbytes": 2**64 - 1, "scalars": {"k": 7.0}, "step": 5}
    peer.socket.sendall(peer.frame_of(3, canonical_json(header)))


def wrong_run(peer, rank):
    peer.handshake().send(hello(rank.schema, run_id="another"))


def replayed_frame(peer, rank):
    frame = peer.handshake().frame(hello(rank.schema))
    peer.socket.sendall(frame)
    peer.receive(Hello)
    peer.socket.sendall(frame)


def reflected_frame(peer, rank):
    """A frame as only the node makes it, for the other direction."""
    peer.handshake()
    peer.socket.sendall(encode_frame(hello(rank.schema), 0, peer.session.receive_key))


def unexpected_message(peer, rank):
    peer.handshake().send(Receipt(True))


def other_schema(peer, rank):
    peer.handshake().send(hello(rank.schema, schema_hash="0f" * 32))


def taken_rank(peer, rank):
    peer.handshake().send(hello(rank.schema, rank=0))


def other_decision(peer, rank):
    peer.handshake().send(hello(rank.schema))
    peer.receive(Hello)
    peer.send(Decision(Flow.NONE, "tie"))


def winning(peer, rank):
    """Greet as the fitter one: now a snapshot is due. Its payload is the rank's own shape, of ones."""
    assert peer.handshake().greet(hello(rank.schema))[1].flow is Flow.INITIATOR_SENDS
    return payload_of(make_state(1.0)[0], rank.schema)


def drips_payload(peer, rank):
    payload = winning(peer, rank)
    peer.send(SnapshotHeader(5, 0, 0, rank.schema.nbytes, {"k": 7.0}))
    for byte in payload:
        try:
            peer.socket.sendall(bytes([byte]))
        except OSError:
            return
        if peer_gone(peer.socket, seconds=0.05):
            return


def half_a_payload(peer, rank):
    payload = winning(peer, rank)
    peer.send(SnapshotHeader(5, 0, 0, rank.schema.nbytes, {"k": 7.0}))
    peer.socket.sendall(payload[: len(payload) // 2])
    peer.socket.shutdown(socket.SHUT_WR)


def leaves_before_end(peer, rank):
    payload = winning(peer, rank)
    peer.send(SnapshotHeader(5, 0, 0, rank.schema.nbytes, {"k": 7.0}))
    peer.socket.sendall(payload)
    peer.socket.shutdown(socket.SHUT_WR)


def header_with(**changes):
    def script(peer, rank):
        payload = winning(peer, rank)
        with contextlib.suppress(ConnectionError):  # the node may be gone before all is sent
            peer.send_snapshot(rank.schema, payload, **changes)

    return script


def stale_lineage(peer, rank):
    """A HELLO of weights that were trained for longer than the snapshot's."""
    peer.handshake().greet(hello(rank.schema, lineage=50))
    peer.send(SnapshotHeader(5, 0, 49, rank.schema.nbytes, {"k": 7.0}))


def payload_with(name, value):
    def script(peer, rank):
        winning(peer, rank)
        live, _ = make_state(1.0)
        live[name].view(-1)[3] = value
        peer.send_snapshot(rank.schema, payload_of(live, rank.schema))
        assert not peer.receive(Receipt).accepted

    return script


def flipped_payload(peer, rank):
    payload = winning(peer, rank)
    peer.send_snapshot(rank.schema, payload, digest="5a" * 32)
    assert peer.receive(Receipt).fault is Fault.DIGEST_MISMATCH


def pickle_for_payload(peer, rank):
    winning(peer, rank)
    peer.send(SnapshotHeader(5, 0, 0, rank.schema.nbytes, {"k": 7.0}))
    peer.socket.sendall((PICKLE * rank.schema.nbytes)[: rank.schema.nbytes + 100])


CALLERS = [
    pytest.param(stranger_garbage, Fault.BAD_MAGIC),
    pytest.param(stranger_leaves, Fault.CLOSED, marks=pytest.mark.injects(Injection.TRUNCATION)),
    pytest.param(stranger_version, Fault.WRONG_VERSION, marks=pytest.mark.injects(Injection.WRONG_VERSION)),
    pytest.param(stranger_without_secret, Fault.WRONG_SECRET),
    pytest.param(stranger_drips, Fault.DEADLINE, marks=pytest.mark.injects(Injection.SLOW_HANDSHAKE)),
    pytest.param(silent_after_handshake, Fault.DEADLINE),
    pytest.param(leaves_after_handshake, Fault.CLOSED, marks=pytest.mark.injects(Injection.TRUNCATION)),
    pytest.param(flips(-1), Fault.BAD_MAC, marks=pytest.mark.injects(Injection.BIT_FLIP)),
    pytest.param(flips(40), Fault.BAD_MAC, marks=pytest.mark.injects(Injection.BIT_FLIP)),
    pytest.param(flips(1), Fault.MALFORMED, marks=pytest.mark.injects(Injection.BIT_FLIP)),
    pytest.param(oversize_length, Fault.OVERSIZE, marks=pytest.mark.injects(Injection.HUGE_LENGTH)),
    pytest.param(half_a_frame, Fault.CLOSED, marks=pytest.mark.injects(Injection.TRUNCATION)),
    pytest.param(pickle_for_hello, Fault.MALFORMED, marks=pytest.mark.injects(Injection.PICKLE)),
    pytest.param(pickle_for_opening, Fault.BAD_MAGIC, marks=pytest.mark.injects(Injection.PICKLE)),
    pytest.param(pickle_for_proof, Fault.WRONG_SECRET, marks=pytest.mark.injects(Injection.PICKLE)),
    pytest.param(pickle_for_body, Fault.MALFORMED, marks=pytest.mark.injects(Injection.PICKLE)),
    pytest.param(pickle_for_header, Fault.MALFORMED, marks=pytest.mark.injects(Injection.PICKLE)),
    pytest.param(unbounded_snapshot, Fault.MALFORMED, marks=pytest.mark.injects(Injection.HUGE_LENGTH)),
    pytest.param(wrong_run, Fault.WRONG_RUN, marks=pytest.mark.injects(Injection.WRONG_RUN)),
    pytest.param(replayed_frame, Fault.BAD_SEQUENCE, marks=pytest.mark.injects(Injection.REPEATED_MESSAGE)),
    pytest.param(reflected_frame, Fault.BAD_MAC, marks=pytest.mark.injects(Injection.REFLECTED_MESSAGE)),
    pytest.param(unexpected_message, Fault.UNEXPECTED),
    pytest.param(other_schema, Fault.SCHEMA_MISMATCH),
    pytest.param(taken_rank, Fault.RANK_TAKEN, marks=pytest.mark.injects(Injection.RANK_TAKEN_TWICE)),
    pytest.param(other_decision, Fault.DECISION_DIFFERS),
    pytest.param(drips_payload, Fault.DEADLINE, marks=pytest.mark.injects(Injection.SLOW_TRANSFER)),
    pytest.param(half_a_payload, Fault.CLOSED, marks=pytest.mark.injects(Injection.TRUNCATION)),
    pytest.param(leaves_before_end, Fault.CLOSED, marks=pytest.mark.injects(Injection.TRUNCATION)),
    pytest.param(header_with(nbytes=2**63 - 1), Fault.BAD_SNAPSHOT, marks=pytest.mark.injects(Injection.HUGE_LENGTH)),
    pytest.param(header_with(generation=1), Fault.BAD_SNAPSHOT, marks=pytest.mark.injects(Injection.STALE_MESSAGE)),
    pytest.param(header_with(step=4), Fault.BAD_SNAPSHOT, marks=pytest.mark.injects(Injection.STALE_MESSAGE)),
    pytest.param(stale_lineage, Fault.BAD_SNAPSHOT, marks=pytest.mark.injects(Injection.STALE_MESSAGE)),
    pytest.param(header_with(scalars={"other": 1.0}), Fault.BAD_SNAPSHOT),
    pytest.param(payload_with("0.y", float("nan")), Fault.NOT_FINITE, marks=pytest.mark.injects(Injection.NAN)),
    pytest.param(payload_with("1.z", float("inf")), Fault.NOT_FINITE, marks=pytest.mark.injects(Injection.INFINITY)),
    pytest.param(payload_with("1.v", -1e-9), Fault.NEGATIVE_SECOND_MOMENT),
    pytest.param(flipped_payload, Fault.DIGEST_MISMATCH, marks=pytest.mark.injects(Injection.BIT_FLIP)),
    pytest.param(pickle_for_payload, Fault.MALFORMED, marks=pytest.mark.injects(Injection.PICKLE)),
]


@pytest.mark.parametrize(("script", "fault"), CALLERS, ids=numbered(CALLERS))
def test_node_names_the_fault_of_a_hostile_caller_and_goes_on(tmp_path, script, fault):
    with ranks(Rank(tmp_path, 0, 3.0, method="clonal", exchange_seconds=0.6)) as (rank,):
        rank.fitness = 2.0
        rank.boundary()
        peer = RawPeer.call(rank.where)
        script(peer, rank)
        until(lambda: counted(rank, failed=1), rank)
        until(lambda: rank.events())
        assert last_event(rank)["message"].startswith(fault.value)
        assert peer.closed()
        peer.close()
        assert values_of(rank) == {3.0} and counted(rank, lost=0, won=0, busy=0)
        assert not LOADED
        assert_answers(rank)


def test_a_pickle_that_is_loaded_would_be_seen():
    pickle.loads(PICKLE)
    assert LOADED.pop() == 1


# Answerers.


def answers_garbage(peer, rank):
    peer.socket.sendall(os.urandom(4096))


def answers_nothing(peer, rank):
    pass


def hangs_up(peer, rank):
    peer.socket.shutdown(socket.SHUT_RDWR)


def hangs_up_after_opening(peer, rank):
    peer.openings()
    peer.socket.shutdown(socket.SHUT_RDWR)


def answers_version(peer, rank):
    peer.socket.sendall(b"gruboros\x00\x00" + bytes(32))


def answers_without_secret(peer, rank):
    peer.openings()
    peer.read(32)
    peer.socket.sendall(bytes(32))


def answers_with_receipt(peer, rank):
    peer.handshake().receive(Hello)
    peer.send(Receipt(True))


def losing(peer, rank):
    theirs, decision = peer.handshake().greet(hello(rank.schema, fitness=9.0))
    assert theirs.rank == 0 and decision.flow is Flow.INITIATOR_SENDS
    return peer


def hangs_up_on_payload(peer, rank):
    losing(peer, rank).receive(SnapshotHeader)
    peer.socket.shutdown(socket.SHUT_RDWR)


def rejects(peer, rank):
    header = losing(peer, rank).receive(SnapshotHeader)
    peer.read(header.nbytes)
    peer.receive(End)
    peer.send(Receipt(False, Fault.NOT_FINITE))


def never_acknowledges(peer, rank):
    losing(peer, rank).receive(SnapshotHeader)


ANSWERERS = [
    pytest.param(answers_garbage, Fault.BAD_MAGIC),
    pytest.param(answers_nothing, Fault.DEADLINE),
    pytest.param(hangs_up, Fault.REFUSED),
    pytest.param(hangs_up_after_opening, Fault.REFUSED),
    pytest.param(answers_version, Fault.WRONG_VERSION, marks=pytest.mark.injects(Injection.WRONG_VERSION)),
    pytest.param(answers_without_secret, Fault.WRONG_SECRET),
    pytest.param(answers_with_receipt, Fault.UNEXPECTED),
    pytest.param(hangs_up_on_payload, Fault.CLOSED, marks=pytest.mark.injects(Injection.TRUNCATION)),
    pytest.param(rejects, Fault.REJECTED),
    pytest.param(never_acknowledges, Fault.DEADLINE),
]


@pytest.mark.parametrize(("script", "fault"), ANSWERERS, ids=numbered(ANSWERERS))
def test_node_names_the_fault_of_a_hostile_answerer_and_goes_on(tmp_path, script, fault):
    with socket.create_server(("127.0.0.1", 0)) as trap:
        trap.settimeout(PATIENCE)
        host, port = trap.getsockname()
        with ranks(Rank(tmp_path, 0, 3.0, peers=(f"{host}:{port}",), exchange_seconds=0.6)) as (rank,):
            with Trainer(rank):
                rank.fitness = 2.0
                until(lambda: rank.node._desk.published.fitness)
                rank.call()
                peer = RawPeer(trap.accept()[0], initiator=False)
                script(peer, rank)
                until(lambda: counted(rank, failed=1))
                until(lambda: rank.events())
            assert last_event(rank)["message"].startswith(fault.value)
            assert counted(rank, lost=0, won=0, busy=0)
            peer.close()
            assert_answers(rank)


@pytest.mark.injects(Injection.FLOOD)
def test_node_hears_a_peer_past_a_crowd_of_silent_strangers(tmp_path):
    with ranks(Rank(tmp_path, 0, exchange_seconds=30.0)) as (rank,), contextlib.ExitStack() as crowd:
        for _ in range(100):
            crowd.enter_context(socket.create_connection(rank.where, timeout=PATIENCE))
        assert_answers(rank)


def test_node_gives_a_stranger_less_time_than_a_peer(tmp_path, monkeypatch):
    monkeypatch.setattr("gossip.switchboard.HANDSHAKE_SECONDS", 0.1)
    with ranks(Rank(tmp_path, 0, exchange_seconds=100.0)) as (rank,):
        stranger = RawPeer.call(rank.where)
        assert stranger.closed()
        until(lambda: counted(rank, failed=1))
        assert last_event(rank)["message"].startswith(Fault.DEADLINE.value)


def test_node_bounds_the_peers_that_prove_themselves_and_then_say_nothing(tmp_path):
    with ranks(Rank(tmp_path, 0, exchange_seconds=100.0)) as (rank,):
        silent = []
        while len(silent) < STRANGERS_LIMIT + 10:
            together = [RawPeer.call(rank.where) for _ in range(10)]
            silent += [peer.handshake() for peer in together]
        assert all(peer.closed() for peer in silent[:10])
        assert len(rank.node._switchboard._tasks) <= STRANGERS_LIMIT
        assert last_event(rank)["message"].startswith(Fault.CLOSING.value)
        assert_answers(rank)


def test_node_goes_on_talking_after_a_peer_whose_counters_are_as_large_as_they_may_be(tmp_path):
    """What came with its weights grows by training: beyond what other peers would take, were it told as it is."""
    liar, heir = Rank(tmp_path, 0), Rank(tmp_path, 1, 3.0)
    with ranks(liar, heir):
        heir.node._peers = (liar.node.address,)
        liar.lineage, liar.scalars = LINEAGE_LIMIT + 5, {"k": SCALAR_LIMIT + 5}
        liar.boundary()
        heir.call()
        report = until(heir.boundary, liar)
        heir.lineage, heir.scalars = report.peer_lineage + 1, {"k": report.peer_scalars["k"] + 1}
        until(lambda: counted(liar, won=1), liar, heir)
        until(lambda: not heir.node.engaged, heir)
        heir.boundary()
        fresh = RawPeer.call(heir.where).handshake()
        assert fresh.greet(hello(heir.schema))[1].flow is Flow.RESPONDER_SENDS
        until(lambda: heir.node._desk.waiting)
        heir.boundary()
        header, _ = fresh.receive_snapshot()
        assert (header.lineage, header.scalars) == (LINEAGE_LIMIT, {"k": SCALAR_LIMIT})
