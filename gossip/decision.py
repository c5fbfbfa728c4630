"""Whose weights travel: what two ranks conclude from their HELLOs, each for itself and both alike."""

from dataclasses import dataclass

from gossip.comparison import Verdict, compare
from gossip.protocol import MERGE_METHODS, Decision, Flow, Hello
from runtime.errors import UserError

ADOPTION_SLACK_STEPS = 100  # ranks whose lineages differ by less are told apart by fitness alone
FITNESS_KINDS = ("probe", "ema")
TIES = ("average", "none")


@dataclass(frozen=True)
class Policy:
    """By what ranks decide, the same at both ends.

    method: one of MERGE_METHODS; fitness: "probe", losses on the same bytes compared by a paired test, or "ema", the
    lower of two moving averages wins; of the probe alone: tie, what no clear winner leads to (both take the mean, or
    nothing), and significance and least_effect of compare().
    """

    method: str = "recombination"
    fitness: str = "probe"
    tie: str = "average"
    significance: float = 0.05
    least_effect: float = 0.01

    def __post_init__(self) -> None:
        for name, known in (("method", MERGE_METHODS), ("fitness", FITNESS_KINDS), ("tie", TIES)):
            if getattr(self, name) not in known:
                raise UserError(f"expected {name} {' or '.join(known)}, got {getattr(self, name)!r}: choose one")
        if not 0 <= self.significance <= 1:
            raise UserError(f"expected significance from 0 to 1, got {self.significance}: choose a chance")
        if not self.least_effect >= 0:
            raise UserError(f"expected least_effect from 0, got {self.least_effect}: choose nats per byte")


def decide(initiator: Hello, responder: Hello, policy: Policy) -> Decision:
    """Whose weights travel: pure, so that both ends come to the same answer.

    Where twice the younger's lineage and ADOPTION_SLACK_STEPS more are still less than the elder's, the younger's
    weights are replaced by the elder's, whatever their fitness: a rank that has just been initialised neither wins nor
    is averaged into a trained one.
    Otherwise the fitter one's weights go to the other, or the mean to both; where evidence is missing nobody may win,
    nor lose, and it is no tie either. Nothing goes to a rank that does not accept it.
    """
    younger, elder = sorted((initiator, responder), key=lambda hello: hello.lineage)
    if 2 * younger.lineage + ADOPTION_SLACK_STEPS < elder.lineage:
        flow = Flow.INITIATOR_SENDS if elder is initiator else Flow.RESPONDER_SENDS
        decision = Decision(flow, f"adopts: lineage {elder.lineage} against {younger.lineage}", whole=True)
    elif policy.fitness == "probe":
        decision = _by_probe(initiator, responder, policy)
    else:
        decision = _by_ema(initiator.fitness, responder.fitness, policy.method)
    to_initiator = decision.flow in (Flow.RESPONDER_SENDS, Flow.BOTH)
    to_responder = decision.flow in (Flow.INITIATOR_SENDS, Flow.BOTH)
    if (to_initiator and not initiator.accepts) or (to_responder and not responder.accepts):
        return Decision(Flow.NONE, "not accepted")
    return decision


def _by_probe(initiator: Hello, responder: Hello, policy: Policy) -> Decision:
    if initiator.probe is None or responder.probe is None:
        return Decision(Flow.NONE, "fitness unknown")
    if initiator.probe != responder.probe:
        return Decision(Flow.NONE, "probes of different bytes")
    looks = max(initiator.looks, responder.looks)
    comparison = compare(initiator.losses, responder.losses, policy.significance, policy.least_effect, looks)
    if policy.method == "average":
        return Decision(Flow.BOTH, str(comparison))
    if comparison.verdict is Verdict.UNCLEAR:
        flow = Flow.BOTH if policy.tie == "average" else Flow.NONE
        return Decision(flow, f"no clear winner: {comparison}")
    flow = Flow.INITIATOR_SENDS if comparison.verdict is Verdict.FIRST else Flow.RESPONDER_SENDS
    return Decision(flow, f"clear: {comparison}", whole=policy.method == "clonal")


def _by_ema(initiator: float | None, responder: float | None, method: str) -> Decision:
    if initiator is None or responder is None:
        return Decision(Flow.NONE, "fitness unknown")
    if initiator == responder:
        return Decision(Flow.NONE, "tie")
    reason = f"loss {min(initiator, responder):.6g} against {max(initiator, responder):.6g}"
    if method == "average":
        return Decision(Flow.BOTH, reason)
    flow = Flow.INITIATOR_SENDS if initiator < responder else Flow.RESPONDER_SENDS
    return Decision(flow, reason, whole=method == "clonal")
