"""One conversation over real sockets: who sends, what arrives, and what ends it."""

import asyncio
import contextlib
import dataclasses
import socket

import pytest
import torch

import gossip.comparison
import gossip.exchange
from bench.injection import Injection
from gossip.decision import Policy
from gossip.exchange import PIECE_BYTES, converse
from gossip.faults import Fault, ProtocolError
from gossip.protocol import Flow
from gossip.state import Snapshot, StateBuffer
from gossip.wire import Channel, Wire
from gossip.wire_format import sketch_bytes, wire_format
from tests.gossip_helpers import hello, make_state

KEYS = (bytes(32), bytes(range(32)))
BIG = ((512, 1024),)  # of 2 MiB, three of them: several pieces, and far more than the sockets hold


class Party:
    """An end with a state of its own, all `value`."""

    scalar_names = frozenset({"k"})
    gene_names = frozenset()

    def __init__(
        self, rank, fitness, value, method="recombination", shapes=BIG, busy=False, wire_dtype="fp32", **changes
    ):  # fmt: skip
        live, self.schema = make_state(value, shapes)
        self.said = hello(self.schema, rank, incarnation=f"{rank:032x}", fitness=fitness, **changes)
        self.policy, self.busy, self.asked = Policy(method, "ema"), busy, 0
        self.wire_dtype, self.wire_format = wire_dtype, wire_format(wire_dtype, PIECE_BYTES)
        self.send_buffer, self.receive_buffer = StateBuffer(self.schema), StateBuffer(self.schema)
        self.send_buffer.copy_from(live)

    def hello(self, theirs):
        return self.said

    def distrusts(self, theirs):
        return False

    def claim(self):
        return not self.busy

    async def snapshot(self, generation):
        assert generation == self.said.generation
        self.asked += 1
        return Snapshot(self.send_buffer, self.said.step + 1, generation, self.said.lineage, {"k": 2.0}, {})


@contextlib.contextmanager
def connected(buffer_bytes=None):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        caller = socket.socket()
        if buffer_bytes:
            for each in (listener, caller):  # before connecting, so that the windows are small too
                each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
                each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        caller.connect(listener.getsockname())
        answerer, _ = listener.accept()
    with caller, answerer:
        yield caller, answerer


def talk(caller, answerer, buffer_bytes=None):
    """What comes of it at both ends: outcomes, or the faults that ended it."""

    async def one_end(connection, party, initiator):
        send_key, receive_key = KEYS if initiator else KEYS[::-1]
        channel = Channel(Wire(connection), send_key, receive_key)
        try:
            return await asyncio.wait_for(converse(channel, party, initiator), 20)
        except ProtocolError as error:
            connection.close()
            return error.fault

    async def both():
        return await asyncio.gather(one_end(sockets[0], caller, True), one_end(sockets[1], answerer, False))

    with connected(buffer_bytes) as sockets:
        return asyncio.run(both())


@contextlib.contextmanager
def counting():
    """Yields what tells the bytes that all wires have sent in the block."""
    send, sent = Wire.send, []

    async def count(wire, content):
        sent.append(len(content))
        await send(wire, content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Wire, "send", count)
        yield lambda: sum(sent)


def received(party, value):
    return all(bool((view == value).all()) for view in party.receive_buffer.views.values())


@pytest.mark.parametrize("method", ["clonal", "recombination"])
@pytest.mark.parametrize("winner", ["caller", "answerer"])
def test_converse_brings_the_fitter_ones_state_to_the_other(method, winner):
    parties = [Party(0, 1.0, 11.0, method), Party(1, 2.0, 22.0, method)]
    caller, answerer = parties if winner == "caller" else parties[::-1]
    outcomes = dict(zip((caller, answerer), talk(caller, answerer), strict=True))
    fit, unfit = (outcomes[party] for party in parties)
    assert received(parties[1], 11.0) and received(parties[0], 0.0)
    assert unfit.received.step == 6 and unfit.received.scalars == {"k": 2.0} and fit.received is None
    assert fit.won and not unfit.won and fit.decision == unfit.decision
    assert parties[1].asked == (0 if method == "clonal" else 1) and (unfit.own is None) == (method == "clonal")


def test_converse_goes_on_where_rounding_makes_the_chances_of_a_clear_winner_differ(monkeypatch):
    chance, asked = gossip.comparison.two_sided_p, []

    def rounded(t, freedom):  # as another processor's sine and cosine do
        asked.append(chance(t, freedom) + len(asked) * 1.1e-16)
        return asked[-1]

    monkeypatch.setattr(gossip.comparison, "two_sided_p", rounded)
    losses = [tuple(loss + window / 10 for window in range(64)) for loss in (1.0, 2.0)]
    losses[1] = (*losses[1][:-1], 8.0)
    parties = [Party(rank, 1.0, 11.0 + rank, probe="5a" * 16, losses=losses[rank]) for rank in range(2)]
    for party in parties:
        party.policy = Policy(fitness="probe")
    ours, theirs = talk(*parties)
    assert asked[0] != asked[1] and ours.decision.reason != theirs.decision.reason
    assert ours.won and received(parties[1], 11.0) and theirs.received


def nearly(party, value, distance):
    """Root mean square."""
    return all(float((view - value).square().mean().sqrt()) < distance for view in party.receive_buffer.views.values())


@pytest.mark.parametrize("method", ["average", "recombination"])
def test_converse_by_remainders_brings_states_that_are_near(method):
    caller, answerer = (Party(rank, rank + 1.0, 3.0 + rank / 100, method, wire_dtype="int4") for rank in range(2))
    ours, theirs = talk(caller, answerer)
    assert nearly(answerer, 3.0, 0.005) and theirs.own and theirs.received.weight_norm > 0
    if method == "average":
        assert nearly(caller, 3.01, 0.005) and ours.received
    else:
        assert ours.won and received(caller, 0.0)


def test_converse_by_remainders_sends_a_quarter_of_bfloat16s_bytes():
    sent = {}
    for wire_dtype in ("bf16", "int4"):
        parties = [Party(rank, rank + 1.0, 3.0, "average", wire_dtype=wire_dtype) for rank in range(2)]
        with counting() as counted:
            talk(*parties)
        sent[wire_dtype] = counted()
    assert 0.25 < sent["int4"] / sent["bf16"] < 0.28


def test_converse_clones_in_bfloat16_beside_remainders():
    winner, loser = Party(0, 1.0, 1 / 3, "clonal", wire_dtype="int4"), Party(1, 2.0, 3.0, "clonal", wire_dtype="int4")
    talk(winner, loser)
    assert received(loser, float(torch.tensor(1 / 3).bfloat16()))


@pytest.mark.parametrize("strange", [0, 1])
def test_converse_by_remainders_ends_where_one_is_not_finite(strange):
    parties = [Party(rank, rank + 1.0, 3.0, "average", wire_dtype="int4") for rank in range(2)]
    next(iter(parties[strange].send_buffer.views.values())).view(-1)[7] = float("nan")
    assert Fault.NOT_FINITE in talk(*parties)
    assert received(parties[0], 0.0) and received(parties[1], 0.0)


def test_converse_by_remainders_ends_where_a_sketch_is_not_what_was_sent(monkeypatch):
    parties = [Party(rank, rank + 1.0, 3.0, "average", wire_dtype="int4") for rank in range(2)]
    send, spoilt = Wire.send, []

    async def flip(wire, content):
        if not spoilt and len(content) == sketch_bytes(parties[0].schema.nbytes):
            content = bytearray(content)
            content[100] ^= 1
            spoilt.append(wire)
        await send(wire, content)

    monkeypatch.setattr(Wire, "send", flip)
    assert Fault.DIGEST_MISMATCH in talk(*parties) and spoilt
    assert received(parties[0], 0.0) and received(parties[1], 0.0)


def test_converse_by_remainders_ends_where_a_peer_dies_in_its_sketch(monkeypatch):
    parties = [Party(rank, rank + 1.0, 3.0, "average", wire_dtype="int4") for rank in range(2)]
    send = Wire.send

    async def die(wire, content):
        if len(content) == sketch_bytes(parties[0].schema.nbytes):
            await send(wire, content[:100])
            raise ProtocolError(Fault.CLOSED, "it died")
        await send(wire, content)

    monkeypatch.setattr(Wire, "send", die)
    assert talk(*parties) == [Fault.CLOSED, Fault.CLOSED]
    assert received(parties[0], 0.0) and received(parties[1], 0.0)


def test_converse_by_remainders_ends_where_most_is_too_far_apart(monkeypatch):
    parties = [Party(rank, rank + 1.0, 3.0 + rank, "average", wire_dtype="int4") for rank in range(2)]
    monkeypatch.setattr(gossip.exchange, "spacings", lambda mine, theirs: torch.full((len(mine),), 1e-3))
    assert Fault.TOO_FAR in talk(*parties)


def test_converse_lets_both_send_for_the_average():
    caller, answerer = Party(0, 1.0, 11.0, "average"), Party(1, 2.0, 22.0, "average")
    ours, theirs = talk(caller, answerer)
    assert received(caller, 22.0) and received(answerer, 11.0)
    assert ours.decision.flow is Flow.BOTH and ours.own and ours.received and theirs.own and theirs.received
    assert not ours.won and not theirs.won


def test_converse_does_not_wait_for_the_others_socket_buffer_when_both_send():
    """Two payloads a thousand times the sockets' buffers: whoever only wrote would wait for ever."""
    caller, answerer = Party(0, 1.0, 11.0, "average"), Party(1, 2.0, 22.0, "average")
    assert caller.schema.nbytes > 1000 * 2 * 2304
    talk(caller, answerer, buffer_bytes=2304)
    assert received(caller, 22.0) and received(answerer, 11.0)


@pytest.mark.parametrize("fitness", [(1.0, 1.0), (None, 1.0), (1.0, None), (None, None)])
@pytest.mark.parametrize("method", ["clonal", "recombination", "average"])
def test_converse_moves_nothing_when_nobody_wins(fitness, method):
    caller, answerer = Party(0, fitness[0], 11.0, method), Party(1, fitness[1], 22.0, method)
    for outcome in talk(caller, answerer):
        assert outcome.tied and not outcome.won and outcome.received is None and outcome.own is None
    assert caller.asked == answerer.asked == 0


@pytest.mark.injects(Injection.WRONG_RUN, Injection.RANK_TAKEN_TWICE)
@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"rank": 0}, Fault.RANK_TAKEN),
        ({"incarnation": f"{0:032x}"}, Fault.SELF),
        ({"run_id": "another"}, Fault.WRONG_RUN),
        ({"schema_hash": "0f" * 32}, Fault.SCHEMA_MISMATCH),
        ({"schema_hash": "0f" * 32, "rank": 0, "run_id": "another"}, Fault.SCHEMA_MISMATCH),
    ],
    ids=["rank", "self", "run", "schema", "schema-first"],
)
@pytest.mark.parametrize("busy", [False, True])
def test_converse_tells_both_ends_why_they_may_not_mix(changes, fault, busy):
    caller, answerer = Party(0, 1.0, 11.0), Party(1, 2.0, 22.0, busy=busy)
    answerer.said = dataclasses.replace(answerer.said, **changes)
    assert talk(caller, answerer) == [fault, fault]


def test_converse_names_the_heads_of_both_schemas():
    caller, answerer = Party(0, 1.0, 11.0), Party(1, 2.0, 22.0, shapes=((3, 3),))

    async def both(sockets):
        ends = [(sockets[0], caller, True), (sockets[1], answerer, False)]
        return await asyncio.gather(
            *(converse(Channel(Wire(s), *(KEYS if i else KEYS[::-1])), p, i) for s, p, i in ends),
            return_exceptions=True,
        )

    with connected() as sockets:
        for error in asyncio.run(both(sockets)):
            assert caller.schema.hash[:12] in str(error) and answerer.schema.hash[:12] in str(error)


def test_converse_hears_busy_and_tells_nothing_else():
    caller, answerer = Party(0, 1.0, 11.0), Party(1, 2.0, 22.0, busy=True)
    assert talk(caller, answerer) == [Fault.BUSY, Fault.BUSY]
    assert caller.asked == answerer.asked == 0


def test_converse_ends_when_the_two_decisions_differ():
    caller, answerer = Party(0, 1.0, 11.0, "average"), Party(1, 2.0, 22.0, "clonal")
    answerer.schema = caller.schema
    assert talk(caller, answerer) == [Fault.DECISION_DIFFERS, Fault.DECISION_DIFFERS]


@pytest.mark.injects(Injection.NAN)
def test_converse_applies_an_average_at_neither_end_when_one_is_refused():
    caller, answerer = Party(0, 1.0, 11.0, "average"), Party(1, 2.0, 22.0, "average")
    answerer.send_buffer.views["0.z"][300, 7] = torch.nan
    assert talk(caller, answerer) == [Fault.NOT_FINITE, Fault.REJECTED]


def test_converse_refuses_a_snapshot_of_other_scalars():
    caller, answerer = Party(0, 1.0, 11.0), Party(1, 2.0, 22.0)
    answerer.scalar_names = frozenset({"k", "lr_max"})
    assert talk(caller, answerer)[1] is Fault.BAD_SNAPSHOT


@pytest.mark.injects(Injection.BIT_FLIP)
def test_converse_finds_what_changed_under_way(monkeypatch):
    """The sender's digest is of what it meant to send: a byte that flips after that is found."""
    caller, answerer = Party(0, 1.0, 11.0), Party(1, 2.0, 22.0)
    whole_send = Wire.send

    async def flipping(wire, content):
        if len(content) == PIECE_BYTES:
            content = bytearray(content)
            content[12345] ^= 1
        await whole_send(wire, content)

    monkeypatch.setattr(Wire, "send", flipping)
    assert talk(caller, answerer) == [Fault.REJECTED, Fault.DIGEST_MISMATCH]
