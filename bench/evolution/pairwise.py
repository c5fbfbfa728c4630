"""Arms in which a replica now and then meets another: the population's own merge and comparison, without a network.

Each step each replica calls, with chance p, another drawn at random, as ranks do. Nothing is stale here and nobody is
busy; what is left out so is measured with --real.
"""

import functools
import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.evolution.policy import Policy, require
from bench.evolution.replica import Replica, weights_only
from gossip import lattice
from gossip.decision import Policy as Decider
from gossip.decision import decide
from gossip.fitness_tracker import FitnessTracker
from gossip.merge import merge_judged
from gossip.protocol import Flow, Hello
from gossip.reputation import Reputation
from gossip.state import StateBuffer
from gossip.wire_format import WIRE_DTYPES, RemainderWire, packed_bytes, sketch_bytes, sketch_of
from training.fitness import Fitness
from training.objections import LIMIT, Objections
from training.options import PAYLOADS, PopulationOptions
from training.probe import Probe


@dataclass
class Meeting(Policy):
    """Two replicas meet, by train.py's defaults where it has them. p: chance a step that a replica calls; payload:
    weights, or full (with second moments); wire: bf16 (rounded to nearest), fp32, or int4 (see gossip.lattice);
    rollback: nats per byte by which a merge may make the receiver worse on its probe (inf: not judged); shun: nobody
    meets so many of the replicas, the last ones (those that corrupt=N corrupts).
    """

    p: float = PopulationOptions.gossip_mixing_rate
    payload: str = PopulationOptions.gossip_payload
    wire: str = PopulationOptions.gossip_wire_dtype
    rollback: float = math.inf
    shun: int = 0

    def __post_init__(self) -> None:
        require(0 <= self.p <= 1, "p", "a chance from 0 to 1", self.p)
        require(self.payload in PAYLOADS, "payload", " or ".join(PAYLOADS), self.payload)
        require(self.wire in WIRE_DTYPES, "wire", " or ".join(WIRE_DTYPES), self.wire)
        require(self.wire != "int4" or self.payload == "weights", "payload", "weights beside wire=int4", self.payload)

    def begin(self, replicas: list[Replica], dice: random.Random) -> None:
        super().begin(replicas, dice)
        self._whole = [StateBuffer(replicas[0].schema) for _ in range(2)]
        self._arrived = [StateBuffer(replicas[0].schema) for _ in range(2)]
        self._sent = replicas[0].schema if self.payload == "full" else weights_only(replicas[0].schema)

    def after_step(self, step: int) -> None:
        for caller in self.replicas:
            if self.dice.random() < self.p and len(self.replicas) > 1:
                called = self.dice.choice([other for other in self.replicas if other is not caller])
                if max(caller.rank, called.rank) < len(self.replicas) - self.shun:
                    self.meet(caller, called)

    def meet(self, caller: Replica, called: Replica) -> None:
        """Decide whose weights travel, and let them."""
        raise NotImplementedError

    def both_average(self, first: Replica, second: Replica) -> None:
        """Each takes the mean of both."""
        for replica, buffer in zip((first, second), self._whole, strict=True):
            self._snapshot(replica, buffer)
        self.leave_out(first, second)
        if self.wire == "int4":
            at_second, at_first = self._as_remainders(both=True)
            self._receive(first, second, at_first, "average", 0.5, own=self._whole[0])
            self._receive(second, first, at_second, "average", 0.5, own=self._whole[1])
        else:
            self._receive(first, second, self._whole[1], "average", 0.5)
            self._receive(second, first, self._whole[0], "average", 0.5)
        self.counts["averaged"] += 1

    def leave_out(self, first: Replica, second: Replica) -> None:
        """Before both take the mean: what is not to travel."""

    def send(self, winner: Replica, loser: Replica, method: str, alpha: float) -> bool:
        """The winner's weights flow into the loser; whether they stayed there."""
        self._snapshot(winner, self._whole[0])
        arrived = self._whole[0]
        if self.wire == "int4":
            self._whole[1].copy_from(loser.live)
            loser.sent += sketch_bytes(self._sent.nbytes)
            arrived, _ = self._as_remainders(both=False)
        kept = self._receive(loser, winner, arrived, method, alpha)
        if kept and method == "clonal":
            loser.weights.load_scalars(self._scalars_for(loser, winner))
        self.counts["won"] += 1
        return kept

    def _scalars_for(self, loser: Replica, winner: Replica) -> dict[str, float]:
        """The winner's counters, but what counts second moments stays with them."""
        scalars, counter = winner.weights.scalars(), loser.weights.moments_counter
        return scalars if self.payload == "full" else scalars | {counter: loser.weights.scalars()[counter]}

    def _snapshot(self, replica: Replica, buffer: StateBuffer) -> None:
        copied = buffer.copy_from(replica.live)
        if copied is not None:
            copied.synchronize()
        if self.wire == "bf16":
            for view in buffer.views.values():
                view.copy_(view.bfloat16())
        replica.sent += self.bytes_sent()

    def _as_remainders(self, both: bool) -> list[StateBuffer]:
        """What arrives of the first at the second, and if both of the second at the first; for both, what is sent
        becomes what it was rounded to, as in a conversation."""
        nbytes = self._sent.nbytes
        mine = [buffer.bytes[:nbytes] for buffer in self._whole]  # second moments come last
        spacing = lattice.spacings(*map(sketch_of, mine))
        ends = [RemainderWire(own, spacing, lattice.blocks_of(nbytes // 4) * lattice.BLOCK * 4, both) for own in mine]
        for sender, arrived in enumerate(self._arrived[: 2 if both else 1]):
            receiver, piece = ends[1 - sender], arrived.bytes[:nbytes]
            receiver.space(piece)[:] = ends[sender].pack(0, mine[sender])
            receiver.unpack(0, piece)
            self.counts["blocks"] += len(spacing)
            self.counts["blocks left out"] += round(receiver.left_out() * len(spacing))
        return self._arrived

    def bytes_sent(self) -> float:
        """By a replica at a meeting at which its weights travel."""
        if self.wire == "int4":
            return packed_bytes(self._sent.nbytes) + sketch_bytes(self._sent.nbytes)
        return self._sent.nbytes / (2 if self.wire == "bf16" else 1)

    def _receive(
        self,
        replica: Replica,
        sender: Replica,
        buffer: StateBuffer,
        method: str,
        alpha: float,
        own: StateBuffer | None = None,
    ) -> bool:
        judge = None if math.isinf(self.rollback) else replica.fitness.judge
        base = None if own is None else own.views
        trial = merge_judged(
            replica.live, self._sent, buffer.views, base, method, alpha, judge, self.rollback, replica.fitness.known
        )
        if trial.kept:
            replica.merges += 1
            replica.replaced(judged=judge is not None)
        else:
            replica.rolled_back += 1
            self.hold_against(replica, sender)
        return trial.kept

    def hold_against(self, receiver: Replica, sender: Replica) -> None:
        """The sender's weights did the receiver harm, and were taken out again."""


@dataclass
class PairMean(Meeting):
    """Both take the mean, whoever is better. share: of the coordinates that travel, drawn anew for each meeting, of y
    and z alike; ranks send them all.
    """

    share: float = 1.0

    def meet(self, caller: Replica, called: Replica) -> None:
        self.both_average(caller, called)

    def bytes_sent(self) -> float:
        return self.share * super().bytes_sent()

    @torch.no_grad()
    def leave_out(self, first: Replica, second: Replica) -> None:
        if self.share == 1:
            return
        generator = torch.Generator().manual_seed(self.dice.getrandbits(63))
        chosen: dict[str, Tensor] = {}
        for spec in self._sent.tensors:
            parameter = spec.name.partition(".")[2]
            if parameter not in chosen:
                chosen[parameter] = torch.rand(spec.shape, generator=generator) < self.share
            for receiver, buffer in zip((second, first), self._whole, strict=True):
                kept, view = receiver.live[spec.name].cpu(), buffer.views[spec.name]
                view.copy_(torch.where(chosen[parameter], view, kept))


@dataclass
class Selection(Meeting):
    """A winner's weights flow into a loser. method: recombination (with alpha), or clonal. evolve: lr, and the loser
    inherits the winner's learning rate, mutated log-normally by mutation_scale; none, and it keeps its own.
    """

    method: str = PopulationOptions.gossip_merge_method
    alpha: float = PopulationOptions.gossip_recombination_alpha
    evolve: str = "none"
    mutation_scale: float = PopulationOptions.mutation_scale

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.method in ("recombination", "clonal"), "method", "recombination or clonal", self.method)
        require(0 <= self.alpha <= 1, "alpha", "a share from 0 to 1", self.alpha)
        require(self.evolve in ("none", "lr"), "evolve", "none or lr", self.evolve)

    def win(self, winner: Replica, loser: Replica) -> None:
        """The winner's weights, and if so wanted its learning rate, go to the loser."""
        kept = self.send(winner, loser, self.method, self.alpha)
        if kept and self.evolve == "lr":
            loser.inherit(winner, self.dice)


@dataclass
class OneWay(Selection):
    """The better one wins, by however little. winner: by the probe, measured on the spot; by the ema of the training
    loss, as the tracker knows it; or at random.
    """

    winner: str = "probe"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.winner in ("probe", "ema", "random"), "winner", "probe, ema or random", self.winner)

    def meet(self, caller: Replica, called: Replica) -> None:
        losses = [self._loss(caller), self._loss(called)]
        if None in losses:
            self.counts["unknown"] += 1
        elif losses[0] < losses[1]:
            self.win(caller, called)
        else:
            self.win(called, caller)

    def _loss(self, replica: Replica) -> float | None:
        if self.winner == "random":
            return self.dice.random()
        return replica.fitness.judge()[0] if self.winner == "probe" else replica.fitness.value


@dataclass
class Ours(Selection):
    """As ranks decide, by gossip.decision: a paired test on the probe, measured every probe_every steps. A clear
    winner's weights flow into the loser; where none is clear, tie: average (both take the mean) or none. Whose rate, or
    the distance of whose base iterate, is over `limit` times the receiver's is not merged (inf: is). Who did harm is
    distrusted for a while, by a clock on which a step takes step_seconds.
    """

    rollback: float = PopulationOptions.gossip_rollback
    significance: float = PopulationOptions.gossip_significance
    least_effect: float = PopulationOptions.gossip_least_effect
    tie: str = PopulationOptions.gossip_tie
    probe_every: int = PopulationOptions.probe_every
    limit: float = LIMIT
    step_seconds: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.probe_every >= 1, "probe_every", "at least 1 step", self.probe_every)
        require(self.limit > 0, "limit", "a factor above 0", self.limit)
        require(self.step_seconds > 0, "step_seconds", "a time above 0", self.step_seconds)
        self._decider = Decider(self.method, "probe", self.tie, self.significance, self.least_effect)

    def fitness_of(self, tracker: FitnessTracker, probe: Probe) -> Fitness:
        return Fitness("probe", tracker, probe, self.probe_every)

    def begin(self, replicas: list[Replica], dice: random.Random) -> None:
        super().begin(replicas, dice)
        self._now = 0.0
        self._reputations = [Reputation(lambda: self._now) for _ in replicas]  # of the others, with each
        self._objections = [
            Objections(each.weights, functools.partial(_genes, each), self.evolve == "lr", self.limit)
            for each in replicas
        ]

    def _receive(
        self, replica: Replica, sender: Replica, buffer: StateBuffer, method: str, alpha: float,
        own: StateBuffer | None = None,
    ) -> bool:  # fmt: skip
        told = sender.weights.scalars(), _genes(sender)
        if self._objections[replica.rank].to(buffer.views, *told) is not None:
            self.counts["diverged"] += 1
            self.hold_against(replica, sender)
            return False
        return super()._receive(replica, sender, buffer, method, alpha, own)

    def hold_against(self, receiver: Replica, sender: Replica) -> None:
        self._reputations[receiver.rank].strike(_incarnation(sender))

    def after_step(self, step: int) -> None:
        self._now = step * self.step_seconds
        for replica in self.replicas:
            replica.fitness.measure_if_due(step)
        super().after_step(step)

    def meet(self, caller: Replica, called: Replica) -> None:
        for replica in (caller, called):
            replica.looks += 1
        decision = decide(self._hello(caller, called), self._hello(called, caller), self._decider)
        if decision.flow is Flow.BOTH:
            self.both_average(caller, called)
        elif decision.flow is Flow.NONE:
            self.counts[decision.reason.partition(":")[0]] += 1
        elif decision.flow is Flow.INITIATOR_SENDS:
            self.win(caller, called)
        else:
            self.win(called, caller)

    def _hello(self, replica: Replica, other: Replica) -> Hello:
        """What a rank would say of itself to the other; all have trained equally long."""
        evidence = replica.fitness.evidence
        return Hello(
            run_id="laboratory", schema_hash="0" * 64, rank=replica.rank, incarnation=_incarnation(replica), step=0,
            generation=0, lineage=0, fitness=None,
            accepts=not self._reputations[replica.rank].distrusts(_incarnation(other)),
            probe=evidence.probe if evidence else None, losses=evidence.losses if evidence else (),
            looks=replica.looks,
        )  # fmt: skip


def _genes(replica: Replica) -> dict[str, float]:
    """What a rank tells of its hyperparameters."""
    return {"lr": replica.lr}


def _incarnation(replica: Replica) -> str:
    return f"{replica.rank:032x}"
