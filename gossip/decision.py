"""Whose weights travel: what two ranks conclude from their HELLOs, each for itself and both alike."""

from gossip.protocol import Decision, Flow, Hello

ADOPTION_SLACK_STEPS = 100  # ranks whose lineages differ by less are told apart by fitness alone


def decide(initiator: Hello, responder: Hello, method: str) -> Decision:
    """Whose weights travel: pure, so that both ends come to the same answer.

    method: one of MERGE_METHODS. Weights of less than half the lineage, and of ADOPTION_SLACK_STEPS less than that, are
    replaced by the elder's, whatever their fitness: a rank that has just been initialised neither wins nor is averaged
    into a trained one. Otherwise lower fitness wins; an unknown one is no tie: nobody may win by it, nor lose. Nothing
    goes to a rank that does not accept it.
    """
    younger, elder = sorted((initiator, responder), key=lambda hello: hello.lineage)
    if 2 * younger.lineage + ADOPTION_SLACK_STEPS < elder.lineage:
        flow = Flow.INITIATOR_SENDS if elder is initiator else Flow.RESPONDER_SENDS
        decision = Decision(flow, f"adopts: lineage {elder.lineage} against {younger.lineage}", whole=True)
    else:
        decision = _by_fitness(initiator.fitness, responder.fitness, method)
    to_initiator = decision.flow in (Flow.RESPONDER_SENDS, Flow.BOTH)
    to_responder = decision.flow in (Flow.INITIATOR_SENDS, Flow.BOTH)
    if (to_initiator and not initiator.accepts) or (to_responder and not responder.accepts):
        return Decision(Flow.NONE, "not accepted")
    return decision


def _by_fitness(initiator: float | None, responder: float | None, method: str) -> Decision:
    if initiator is None or responder is None:
        return Decision(Flow.NONE, "fitness unknown")
    if initiator == responder:
        return Decision(Flow.NONE, "tie")
    reason = f"loss {min(initiator, responder):.6g} against {max(initiator, responder):.6g}"
    if method == "average":
        return Decision(Flow.BOTH, reason)
    flow = Flow.INITIATOR_SENDS if initiator < responder else Flow.RESPONDER_SENDS
    return Decision(flow, reason, whole=method == "clonal")
