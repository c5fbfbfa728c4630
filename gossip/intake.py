"""What becomes of a peer's snapshot: merged, kept or undone, and accounted for; its sender is remembered for harm."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from gossip.faults import Fault, ProtocolError
from gossip.ledger import Ledger
from gossip.merge import Losses, merge_judged, weight_norm
from gossip.protocol import Decision, Flow
from gossip.reputation import Reputation
from gossip.snapshot_desk import Delivery, SnapshotDesk
from gossip.state import Snapshot
from gossip.switchboard import Switchboard
from runtime.exhaustion import as_memory_error

NORM_LIMIT = 10.0  # times the live weights' own norm: what is larger is not merged


@dataclass(frozen=True)
class MergeReport:
    """A merge that was just applied to the live weights.

    peer_lineage: optimizer steps behind the peer's snapshot, own or inherited; peer_scalars: its optimizer's scalars,
    which come along when `clonal`, that is when the snapshot was taken whole; peer_genes: the hyperparameters it was
    trained with; both: the peer took the mean as well; distance: of the two before it, see merge(); judged: the judge
    was asked, last of all about the weights as they are now.
    """

    peer_lineage: int
    peer_scalars: dict[str, float]
    peer_genes: dict[str, float]
    both: bool
    clonal: bool
    distance: float
    judged: bool


class Intake:
    """Applies deliveries to the live weights. All methods are for the training thread.

    live: the training tensors by the schema's names; judge: losses of the live weights, None: no merge is judged;
    known: these losses where they were measured lately; objection: why a peer's snapshot is not to be merged at all,
    None where nothing speaks against it; tolerance: how much worse a merge may make any of the losses; reputation: told
    of peers whose weights did harm, or would have.
    """

    def __init__(
        self,
        desk: SnapshotDesk,
        live: Mapping[str, Tensor],
        method: str,
        alpha: float,
        judge: Callable[[], Losses] | None,
        known: Callable[[], Losses | None],
        objection: Callable[[Snapshot], str | None],
        tolerance: float | None,
        reputation: Reputation,
        ledger: Ledger,
        switchboard: Switchboard,
    ) -> None:
        self._desk = desk
        self._live = live
        self._method = method
        self._alpha = alpha
        self._judge = judge if tolerance is not None else None
        self._known = known
        self._objection = objection
        self._tolerance = tolerance
        self._reputation = reputation
        self._ledger = ledger
        self._switchboard = switchboard

    def apply(self, delivery: Delivery) -> MergeReport | None:
        """Merge a snapshot; None when it was dropped or the merge undone: the weights are then as they were."""
        outcome = delivery.outcome
        method = self._method_of(outcome.decision)
        began = time.perf_counter()
        try:
            with as_memory_error():
                self._check(delivery)
                self._desk.before_write()
                trial = merge_judged(
                    self._live,
                    self._desk.schema,
                    outcome.received.buffer.views,
                    outcome.own.buffer.views if outcome.own is not None else None,
                    method,
                    self._alpha,
                    self._judge,
                    self._tolerance,
                    self._known(),
                )
        except ProtocolError as error:
            self.drop(delivery, error)
            return None
        except MemoryError as error:  # the weights are as they were, and training can go on
            self.drop(delivery, ProtocolError(Fault.OUT_OF_MEMORY, str(error)))
            return None
        seconds = time.perf_counter() - began
        if not trial.kept:
            distrust = self._strike(delivery)
            self._end(delivery, "rolled_back", "rolled_back", f"{trial}, step {outcome.received.step}; {distrust}")
            return None
        self._desk.weights_changed(outcome.received.lineage)
        ending, event = ("averaged", "averaged") if outcome.decision.flow is Flow.BOTH else ("lost", "merged")
        moment = f"step {outcome.received.step}, distance {trial.distance:.3g}, merged in {seconds * 1000:.1f} ms"
        if outcome.received.left_out:
            moment += f", {outcome.received.left_out:.1%} left out"
        self._end(delivery, ending, event, f"{outcome.decision.reason}; {moment}")
        return MergeReport(
            peer_lineage=outcome.received.lineage,
            peer_scalars=outcome.received.scalars,
            peer_genes=outcome.received.genes,
            both=outcome.decision.flow is Flow.BOTH,
            clonal=outcome.decision.whole,
            distance=trial.distance,
            judged=bool(trial.after),
        )

    def _method_of(self, decision: Decision) -> str:
        if decision.whole:
            return "clonal"
        return "average" if decision.flow is Flow.BOTH else self._method

    def drop(self, delivery: Delivery, error: ProtocolError) -> None:
        """Leave a snapshot unmerged, as `error` says."""
        self._end(delivery, "failed", "failed", str(error))

    def _check(self, delivery: Delivery) -> None:
        """Raises ProtocolError: WEIGHTS_CHANGED; EXPLODING_NORM or DIVERGED after a strike against the sender."""
        outcome = delivery.outcome
        if outcome.mine.generation != self._desk.published.generation:
            raise ProtocolError(Fault.WEIGHTS_CHANGED, "before the merge")
        theirs, ours = outcome.received.weight_norm, weight_norm(self._live, self._desk.schema)
        if theirs > NORM_LIMIT * ours:
            distrust = self._strike(delivery)
            raise ProtocolError(Fault.EXPLODING_NORM, f"{theirs:.4g} where {ours:.4g} is here; {distrust}")
        objection = self._objection(outcome.received)
        if objection is not None:
            raise ProtocolError(Fault.DIVERGED, f"{objection}; {self._strike(delivery)}")

    def _strike(self, delivery: Delivery) -> str:
        seconds = self._reputation.strike(delivery.outcome.theirs.incarnation)
        return f"no weights from this process for {seconds:g} s"

    def _end(self, delivery: Delivery, ending: str, event: str, message: str) -> None:
        self._ledger.count_ended(delivery.talk, ending)
        self._switchboard.post(self._ledger.write, delivery.talk, event, message)
        self._switchboard.release()
