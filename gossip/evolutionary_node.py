"""The one object that training talks to: it publishes, serves snapshots and merges at step boundaries, and owns every
gossip thread."""

import functools
import os
import random
import secrets
import socket
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from gossip import lattice, state_native
from gossip.address_book import AddressBook
from gossip.comparison import Evidence
from gossip.config import GossipConfig
from gossip.event_log import EventLog
from gossip.exchange import Outcome
from gossip.faults import Fault, ProtocolError
from gossip.filesystem_coordinator import FilesystemCoordinator, Roster
from gossip.handshake import run_key
from gossip.heartbeat import Heartbeat
from gossip.intake import Intake, MergeReport
from gossip.ledger import Counters, Ledger
from gossip.merge import Losses
from gossip.network_utils import join_address
from gossip.protocol import Hello
from gossip.reputation import Reputation
from gossip.seeking import Seeking
from gossip.snapshot_desk import SnapshotDesk
from gossip.state import Schema, Snapshot
from gossip.switchboard import Switchboard
from runtime.ranks import Identity

POPULATION_FOLDER = "population"


class EvolutionaryNode:
    """One rank's part in the population. All methods are for the training thread, which never waits for the network.

    run_dir: holds the registry (None: only without the filesystem coordinator); listener: see network_utils.listen(),
    closed by close(); live: the training tensors by the schema's names, contiguous and written in place; scalars:
    the optimizer's numbers, genes: the hyperparameters it trains with, both called at step boundaries; leader_duty:
    called on the coordinator thread after a beat when leading; secret: the run's, see run_secret(); judge: losses
    of the live weights on bytes that are the same each time, by which a merge that does harm is known (None: none
    is judged); known: these losses where they were measured lately, None where not; objection: why a peer's
    snapshot is not to be merged at all, None where nothing speaks against it.
    """

    def __init__(
        self,
        identity: Identity,
        run_id: str,
        run_dir: Path | None,
        listener: socket.socket,
        schema: Schema,
        live: Mapping[str, Tensor],
        scalars: Callable[[], dict[str, float]],
        config: GossipConfig,
        event_log: EventLog,
        seed: int,
        leader_duty: Callable[[Roster], None] | None,
        secret: bytes,
        judge: Callable[[], Losses] | None = None,
        known: Callable[[], Losses | None] = lambda: None,
        genes: Callable[[], dict[str, float]] = dict,
        objection: Callable[[Snapshot], str | None] = lambda _: None,
    ) -> None:
        assert not config.filesystem_coordinator or run_dir is not None
        self.incarnation = secrets.token_hex(16)
        self.address = join_address(*listener.getsockname()[:2])
        self._identity = identity
        self._run_id = run_id
        self._run_dir = run_dir
        self._listener = listener
        self._schema = schema
        self._live = live
        self._config = config
        self._leader_duty = leader_duty
        self._judge, self._known, self._objection = judge, known, objection
        self._key = run_key(secret, run_id)
        self._ledger = Ledger(event_log)
        self._desk = SnapshotDesk(schema, live, scalars, genes)
        self._dice = random.Random(f"dice {seed} {identity.rank}")
        self._peers = config.peers
        self._book = AddressBook(self._addresses, random.Random(f"peers {seed} {identity.rank}"))
        self._reputation = Reputation()
        self._seeking = Seeking()
        self._looks = 0, 0  # a generation, and the comparisons that its weights were in; the network thread's
        self._switchboard: Switchboard | None = None
        self._intake: Intake | None = None
        self._heartbeat: Heartbeat | None = None

    def start(self) -> None:
        """Start the threads: from now on this rank answers, and is found in the registry."""
        config, identity = self._config, self._identity
        for native in (state_native, lattice) if config.wire_dtype == "int4" else (state_native,):
            native.kernels()  # built now, when nobody waits for them
        coordinator = None
        if config.filesystem_coordinator:
            folder = self._run_dir / POPULATION_FOLDER
            coordinator = FilesystemCoordinator(
                folder, identity.rank, identity.world_size, self.incarnation, config.liveness_seconds
            )
        self._switchboard = Switchboard(
            listener=self._listener,
            key=self._key,
            desk=self._desk,
            policy=config.policy,
            wire_dtype=config.wire_dtype,
            ledger=self._ledger,
            seconds=config.exchange_seconds,
            say_hello=self._hello,
            distrusts=self._distrusts,
            book=self._book,
            on_end_well=self._concluded,
        )
        self._intake = Intake(
            desk=self._desk,
            live=self._live,
            method=config.policy.method,
            alpha=config.recombination_alpha,
            judge=self._judge,
            known=self._known,
            objection=self._objection,
            tolerance=config.rollback_tolerance,
            reputation=self._reputation,
            ledger=self._ledger,
            switchboard=self._switchboard,
        )
        self._switchboard.start()
        if coordinator is not None:
            report = functools.partial(self._ledger.note, "registry_failed")
            self._heartbeat = Heartbeat(coordinator, config.heartbeat_seconds, self._record, self._leader_duty, report)
            self._heartbeat.start()

    def close(self) -> None:
        """Leave the registry, end every conversation and join every thread; again: nothing. A snapshot that still
        waits to be merged is dropped."""
        switchboard, self._switchboard = self._switchboard, None
        heartbeat, self._heartbeat = self._heartbeat, None
        if heartbeat is not None:
            heartbeat.close()
        if switchboard is not None:
            switchboard.close()
            delivery = self._desk.take_delivery()
            if delivery is not None:
                self._ledger.fail(delivery.talk, ProtocolError(Fault.CLOSING, "before the merge"))
        self._listener.close()

    def step_boundary(
        self, step: int, lineage: int, fitness: float | None, status: dict, evidence: Evidence | None = None
    ) -> MergeReport | None:
        """Between two optimizer steps: publish(), serve a snapshot, merge what has arrived, perhaps call a peer.

        Returns what was merged, if anything was and was kept: the weights are others then, and their fitness is
        unknown. Raises what ended a gossip thread, should that ever happen.
        """
        desk, report = self._desk, None
        self.publish(step, lineage, fitness, status, evidence)
        self._raise_error()
        if desk.waiting:
            desk.serve()
            delivery = desk.take_delivery()
            if delivery is not None:
                report = self._intake.apply(delivery)
        lucky = self._dice.random() < self._config.mixing_rate
        if self._seeking.is_due(lambda: bool(self._book.known())) or lucky:
            self._switchboard.ring()
        return report

    def publish(
        self, step: int, lineage: int, fitness: float | None, status: dict, evidence: Evidence | None = None
    ) -> None:
        """What the others are told from now on, and at the end, by close().

        lineage: optimizer steps behind the live weights, own or inherited; fitness: their loss in nats per byte, None
        while unknown; status: JSON values for the registry; evidence: the probe's losses since the weights last changed
        hands, None while there are none.
        """
        self._desk.publish(step, lineage, fitness, status, evidence)

    def seek(self) -> None:
        """Call peers, less and less often, until a conversation, of either end's calling, has ended well."""
        self._seeking.begin()

    def before_write(self) -> None:
        """Before the weights are written: on a GPU, let the current stream wait for a snapshot's copy in flight."""
        self._desk.before_write()

    def weights_changed(self) -> None:
        """The weights were replaced by training itself: what was asked of, or is to be merged into, the older ones is
        dropped, and the fitness is unknown."""
        self._desk.weights_changed()
        delivery = self._desk.take_delivery()
        if delivery is not None:
            self._intake.drop(delivery, ProtocolError(Fault.WEIGHTS_CHANGED, "before the merge"))

    @property
    def engaged(self) -> bool:
        """In a conversation, or with a snapshot still to be merged: replacing the weights now would spoil it."""
        return self._switchboard is not None and self._switchboard.engaged

    @property
    def counters(self) -> Counters:
        """A copy of the counters."""
        return self._ledger.counters

    @property
    def roster(self) -> Roster | None:
        """The population as of the newest heartbeat; None before the first, or without the coordinator."""
        heartbeat = self._heartbeat  # close() may take it away meanwhile
        return heartbeat.roster if heartbeat is not None else None

    def _raise_error(self) -> None:
        for part in (self._switchboard, self._heartbeat):
            if part is not None and part.error is not None:
                raise part.error

    def _hello(self, address: str, theirs: Hello | None) -> Hello:
        published = self._desk.published
        evidence = published.evidence
        generation, looks = self._looks
        incarnation = theirs.incarnation if theirs is not None else self._registered_at(address)
        return Hello(
            run_id=self._run_id,
            schema_hash=self._schema.hash,
            rank=self._identity.rank,
            incarnation=self.incarnation,
            step=published.step,
            generation=published.generation,
            lineage=published.lineage,
            fitness=published.fitness,
            accepts=incarnation is None or not self._reputation.distrusts(incarnation),
            probe=evidence.probe if evidence is not None else None,
            losses=evidence.losses if evidence is not None else (),
            looks=looks + 1 if generation == published.generation else 1,
        )

    def _registered_at(self, address: str) -> str | None:
        """The process that listens at `address`, as far as the registry knows."""
        roster = self.roster
        members = roster.members if roster is not None else ()
        return next((member.incarnation for member in members if member.live and member.address == address), None)

    def _distrusts(self, theirs: Hello) -> bool:
        return self._reputation.distrusts(theirs.incarnation)

    def _concluded(self, outcome: Outcome) -> None:
        self._seeking.end()
        self._looks = outcome.mine.generation, outcome.mine.looks

    def _record(self) -> dict:
        published = self._desk.published
        return {
            **published.status,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "address": self.address,
            "step": published.step,
            "lineage": published.lineage,
            "fitness": published.fitness,
            "generation": published.generation,
        }

    def _addresses(self) -> list[str]:
        """Of peers that live as far as the registry knows, and of those that the configuration names."""
        roster = self.roster
        registered = [member.address for member in roster.peers(self._identity.rank)] if roster is not None else []
        return list(dict.fromkeys([*registered, *self._peers]))
