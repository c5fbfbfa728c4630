"""One conversation between two authenticated peers: compare, decide, stream, verify.

    both        HELLO          or BUSY instead, from who talks to another by now
    both        DECISION       each from both HELLOs; they must agree
    both        sketch, END    where weights travel as remainders: a few samples, which tell how far apart they are
    sender      SNAPSHOT, raw payload, END with the payload's digest
    receiver    RECEIPT        after digest and values were checked

Nothing here touches live weights: what arrives lies in the receive buffer, for the training thread to merge.
"""

import asyncio
import hmac
import math
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Protocol

import torch
from blake3 import blake3
from torch import Tensor

from gossip.decision import Policy, decide
from gossip.faults import Fault, ProtocolError
from gossip.lattice import spacings
from gossip.protocol import (
    Busy,
    Decision,
    End,
    Flow,
    Hello,
    Receipt,
    SnapshotHeader,
)
from gossip.state import Schema, Snapshot, StateBuffer, payload_fault, weight_energy
from gossip.wire import Channel
from gossip.wire_format import RemainderWire, WireFormat, sketch_of

MOST_LEFT_OUT = 0.25  # of a payload: more of it says that the sketches told nothing
PIECE_BYTES = 512 * 1024  # of payload at a time: it stays in the cache from the kernel to the digest and the checks


class Party(Protocol):
    """One end of a conversation, as the exchange sees it. Called on the network thread."""

    schema: Schema
    policy: Policy
    scalar_names: frozenset[str]
    gene_names: frozenset[str]
    receive_buffer: StateBuffer
    wire_dtype: str
    wire_format: WireFormat

    def hello(self, theirs: Hello | None) -> Hello:
        """What is published now, for the peer that said `theirs`; None: for the one that is called."""

    def distrusts(self, theirs: Hello) -> bool:
        """Whether that peer's weights are not to be taken now."""

    def claim(self) -> bool:
        """Whether this end is free to talk; from a True on it is not."""

    async def snapshot(self, generation: int) -> Snapshot:
        """The state at the next step boundary. Raises ProtocolError WEIGHTS_CHANGED if that is another generation."""


@dataclass(frozen=True)
class Outcome:
    """How a conversation ended well. received: the peer's snapshot, whole and checked; own: mine of the same time."""

    mine: Hello
    theirs: Hello
    decision: Decision
    own: Snapshot | None
    received: Snapshot | None

    @property
    def tied(self) -> bool:
        """Nothing travelled."""
        return self.decision.flow is Flow.NONE

    @property
    def won(self) -> bool:
        """This end's weights alone travelled: they were the fitter, or by far the elder ones."""
        return not self.tied and self.received is None


async def converse(channel: Channel, party: Party, initiator: bool) -> Outcome:
    """One whole conversation over an authenticated channel. Raises ProtocolError; the caller bounds its time."""
    mine, theirs = await (_greet_first if initiator else _greet_back)(channel, party)
    decision = decide(*((mine, theirs) if initiator else (theirs, mine)), party.policy)
    await channel.send(decision)
    answer = await channel.receive(Decision)
    if not answer.agrees(decision):
        raise ProtocolError(Fault.DECISION_DIFFERS, f"{decision.flow.value} here, {answer.flow.value} there")

    sends = decision.flow in (Flow.BOTH, Flow.INITIATOR_SENDS if initiator else Flow.RESPONDER_SENDS)
    receives = decision.flow is not Flow.NONE and (decision.flow is Flow.BOTH or not sends)
    if receives and party.distrusts(theirs):  # a caller that did not know whom it would reach
        raise ProtocolError(Fault.DISTRUSTED, f"its weights did harm here lately: {theirs.incarnation}")
    own = received = fault = None
    if sends or (receives and not decision.whole):
        own = await party.snapshot(mine.generation)
    form = party.wire_format
    if party.wire_dtype == "int4" and (sends or receives) and not decision.whole:
        form = await _remainders(channel, own.buffer.bytes, settle=sends and receives)
    if sends and receives:
        _, (received, fault) = await _together(_send(channel, form, own), _receive(channel, party, form, theirs))
    elif sends:
        await _send(channel, form, own)
    elif receives:
        received, fault = await _receive(channel, party, form, theirs)
    if receives:
        await channel.send(Receipt(fault is None, fault))
    if sends:
        # Before a fault of the other direction ends the conversation: the peer's word is on its way.
        receipt = await channel.receive(Receipt)
        if fault is None and not receipt.accepted:
            raise ProtocolError(Fault.REJECTED, receipt.fault.value)
    if fault is not None:
        raise ProtocolError(fault, f"in the snapshot of step {received.step}")
    return Outcome(mine, theirs, decision, own, received)


async def _greet_first(channel: Channel, party: Party) -> tuple[Hello, Hello]:
    await _claim(channel, party)
    mine = party.hello(None)
    await channel.send(mine)
    theirs = await _hear_hello(channel)
    _check_kinship(mine, theirs)
    return mine, theirs


async def _greet_back(channel: Channel, party: Party) -> tuple[Hello, Hello]:
    theirs = await _hear_hello(channel)
    mine = party.hello(theirs)
    try:
        _check_kinship(mine, theirs)
    except ProtocolError:
        await channel.send(mine)  # so that the caller finds the same fault, not a closed connection
        raise
    await _claim(channel, party)
    await channel.send(mine)
    return mine, theirs


async def _claim(channel: Channel, party: Party) -> None:
    if not party.claim():
        await channel.send(Busy())
        raise ProtocolError(Fault.BUSY, "already in another conversation")


async def _hear_hello(channel: Channel) -> Hello:
    message = await channel.receive(Hello, Busy)
    if isinstance(message, Busy):
        raise ProtocolError(Fault.BUSY, "the peer is in another conversation")
    return message


def _check_kinship(mine: Hello, theirs: Hello) -> None:
    if not hmac.compare_digest(mine.schema_hash, theirs.schema_hash):
        raise ProtocolError(
            Fault.SCHEMA_MISMATCH,
            f"{mine.schema_hash[:12]} here, {theirs.schema_hash[:12]} there: both need the same model, optimizer, "
            "data, --val_fraction, --seed and merge method",
        )
    if mine.run_id != theirs.run_id:
        raise ProtocolError(Fault.WRONG_RUN, theirs.run_id)
    if mine.incarnation == theirs.incarnation:
        raise ProtocolError(Fault.SELF)
    if mine.rank == theirs.rank:
        raise ProtocolError(
            Fault.RANK_TAKEN, f"another process is rank {mine.rank}, {theirs.incarnation}: give each its own RANK"
        )


async def _remainders(channel: Channel, own: memoryview, settle: bool) -> RemainderWire:
    """The format of a conversation in which both ends have told each other a sketch of their weights, `own` of mine.

    settle: for a mean, which is to be taken of what both are rounded to, so that it keeps the pair's sum.
    """
    sketches = []
    for start in range(0, len(own), PIECE_BYTES):
        sketches.append(sketch_of(own[start : start + PIECE_BYTES]))
        await asyncio.sleep(0)
    mine = torch.cat(sketches)
    _, theirs = await _together(_tell(channel, mine), _hear(channel, torch.empty_like(mine)))
    for sketch, whose in ((mine, "own"), (theirs, "the peer's")):
        if not sketch.isfinite().all():
            raise ProtocolError(Fault.NOT_FINITE, f"in {whose} weights")
    return RemainderWire(own, spacings(mine, theirs), PIECE_BYTES, settle)


async def _tell(channel: Channel, sketch: Tensor) -> None:
    told = memoryview(sketch.view(torch.uint8).numpy()).cast("B")
    await channel.wire.send(told)
    await channel.send(End(blake3(told).hexdigest()))


async def _hear(channel: Channel, sketch: Tensor) -> Tensor:
    heard = memoryview(sketch.view(torch.uint8).numpy()).cast("B")
    await channel.wire.receive_into(heard)
    end = await channel.receive(End)
    if not hmac.compare_digest(end.digest, blake3(heard).hexdigest()):
        raise ProtocolError(Fault.DIGEST_MISMATCH, "in the sketch of the peer's weights")
    return sketch


async def _send(channel: Channel, form: WireFormat, snapshot: Snapshot) -> None:
    payload = snapshot.buffer.bytes
    await channel.send(_header_of(snapshot, form.size(len(payload))))
    digest = blake3()
    for start in range(0, len(payload), PIECE_BYTES):
        travelling = form.pack(start, payload[start : start + PIECE_BYTES])
        digest.update(travelling)
        await channel.wire.send(travelling)
        await asyncio.sleep(0)  # a fast link never makes send() wait, and others have their turn too
    await channel.send(End(digest.hexdigest()))


def _header_of(snapshot: Snapshot, nbytes: int) -> SnapshotHeader:
    return SnapshotHeader(
        snapshot.step, snapshot.generation, snapshot.lineage, nbytes, snapshot.scalars, snapshot.genes
    )


async def _receive(channel: Channel, party: Party, form: WireFormat, theirs: Hello) -> tuple[Snapshot, Fault | None]:
    """The peer's snapshot, read to its end, and what is wrong with its content; other faults are raised."""
    buffer, schema = party.receive_buffer, party.schema
    header = await channel.receive(SnapshotHeader)
    if header.nbytes != form.size(schema.nbytes):
        raise ProtocolError(Fault.BAD_SNAPSHOT, f"expected {form.size(schema.nbytes)} bytes, got {header.nbytes}")
    if header.generation != theirs.generation or header.step < theirs.step or header.lineage < theirs.lineage:
        raise ProtocolError(
            Fault.BAD_SNAPSHOT,
            f"step {header.step}, generation {header.generation}, lineage {header.lineage} after a HELLO of step "
            f"{theirs.step}, generation {theirs.generation}, lineage {theirs.lineage}",
        )
    if header.scalars.keys() != party.scalar_names:
        raise ProtocolError(Fault.BAD_SNAPSHOT, f"scalars {sorted(header.scalars.keys() ^ party.scalar_names)}"[:200])
    if header.genes.keys() != party.gene_names:
        raise ProtocolError(Fault.BAD_SNAPSHOT, f"genes {sorted(header.genes.keys() ^ party.gene_names)}"[:200])
    digest, energy, fault = blake3(), 0.0, None
    for start in range(0, schema.nbytes, PIECE_BYTES):
        piece = buffer.bytes[start : start + PIECE_BYTES]
        travelling = form.space(piece)
        await channel.wire.receive_into(travelling)
        digest.update(travelling)
        form.unpack(start, piece)
        fault = fault or payload_fault(schema, start, piece)
        if fault is None:
            energy += weight_energy(schema, start, piece)
        await asyncio.sleep(0)
    end = await channel.receive(End)
    if not hmac.compare_digest(end.digest, digest.hexdigest()):
        fault = Fault.DIGEST_MISMATCH
    elif form.left_out() > MOST_LEFT_OUT:
        fault = fault or Fault.TOO_FAR
    snapshot = Snapshot(
        buffer, header.step, header.generation, header.lineage, header.scalars, header.genes, math.sqrt(energy),
        form.left_out(),
    )  # fmt: skip
    return snapshot, fault


async def _together(*halves: Coroutine) -> list:
    """The results of all `halves`, run at once; when one fails, the others have ended before its error is raised."""
    tasks = [asyncio.ensure_future(half) for half in halves]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
