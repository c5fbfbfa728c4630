"""How fit this rank's weights are, and by what evidence: the probe's losses, or a moving average of training's."""

import statistics
import time
from typing import Any

from gossip.comparison import Evidence
from gossip.fitness_tracker import FitnessTracker
from gossip.merge import Losses
from training.probe import Probe

DESCRIPTIONS = {
    "probe": "loss of the averaged weights on the probe's windows, nats per byte",
    "ema": "moving average of the training loss, nats per byte",
}


# Evidence is at most so large a part of a rank's steps old. What a young rank knew of itself a dozen steps ago says
# little: who was measured last would seem the fittest, and any two that were not, equal.
OLDEST_SHARE = 1 / 4


class Fitness:
    """What this rank says of its weights, and when they are measured. All methods are for the training thread.

    kind: of DESCRIPTIONS; every: steps between measurements, at most; a rank's first ones follow each other sooner.
    Weights that have changed hands are measured anew.
    """

    def __init__(self, kind: str, tracker: FitnessTracker, probe: Probe, every: int) -> None:
        self.kind = kind
        self.tracker = tracker
        self.probe = probe
        self.seconds = 0.0  # spent on the probe by this process
        self._every = every
        self._evidence: Evidence | None = None  # of the live weights
        self._known: Losses | None = None  # of the live weights, with their evidence
        self._judged: tuple[Losses, Evidence | None] | None = None  # of those that judge() saw last, live or not
        self._best: float | None = None
        self._step = 0  # now
        self._measured_at = 0  # the evidence's step
        self._aside: tuple[int, Evidence | None] = -1, None  # a step, and what was measured aside at it

    @property
    def evidence(self) -> Evidence | None:
        """The probe's losses of the live weights, not too old; None where moving averages compare."""
        return self._evidence

    @property
    def value(self) -> float | None:
        """The fitness in nats per byte; None while it is not known for these weights."""
        return self.tracker.fitness if self.kind == "ema" else _mean(self.evidence)

    @property
    def value_now(self) -> float | None:
        """The fitness, unless it was measured at an earlier step."""
        return self.tracker.fitness if self.kind == "ema" else _mean(self.evidence_now)

    @property
    def evidence_now(self) -> Evidence | None:
        """The evidence, unless it was measured at an earlier step."""
        step, aside = self._aside
        return self._evidence if self._is_of_now else aside if step == self._step else None

    @property
    def best(self) -> float | None:
        """The lowest fitness known by this measure."""
        return self.tracker.best if self.kind == "ema" else self._best

    def judge(self) -> Losses:
        """The probe's losses of the live weights, averaged and as training holds them, measured now: by them a merge is
        judged. Both, since a peer whose base iterate is far off spoils training long before the average shows it."""
        self._judged = losses, _ = self._measured()
        return losses

    @property
    def known(self) -> Losses | None:
        """What judge() would say of the live weights, as old as their evidence; None where it has to be asked."""
        return self._known

    def measure_if_due(self, step: int) -> None:
        """At each optimizer step `step`: measure the probe, where it counts, and where there is no evidence of these
        weights or it has grown old."""
        self._step = step
        oldest = min(self._every, max(1, int(step * OLDEST_SHARE)))
        if self.kind == "probe" and (self._evidence is None or step - self._measured_at >= oldest):
            self.judge()
            self._take_evidence()

    def measure_aside(self) -> None:
        """What value_now and evidence_now tell, where the evidence is of an earlier step; all else stays as if this had
        not been asked, so that what a run does next depends on none of its saves."""
        if self.kind == "probe" and not self._is_of_now:
            self._aside = self._step, self._measured()[1]

    def replaced(self, judged: bool) -> None:
        """The weights were changed by other means than training; judged: and judge() saw them last as they are now."""
        self.tracker.reset()
        self._evidence = self._known = None
        self._aside = -1, None
        if judged and self.kind == "probe":
            self._take_evidence()

    def _measured(self) -> tuple[Losses, Evidence | None]:
        began = time.perf_counter()
        measured = self.probe.measure()
        self.seconds += time.perf_counter() - began
        return measured

    @property
    def _is_of_now(self) -> bool:
        return self._evidence is not None and self._measured_at == self._step

    def _take_evidence(self) -> None:
        """What judge() saw are the live weights."""
        assert self._judged is not None
        losses, self._evidence = self._judged
        self._measured_at = self._step
        self._known = None if self._evidence is None else losses
        value = self.value
        if value is not None:
            self._best = value if self._best is None else min(self._best, value)

    def state_dict(self) -> dict[str, Any]:
        """What load_state_dict() restores."""
        evidence = None if self._evidence is None else [self._evidence.probe, list(self._evidence.losses)]
        state = {"tracker": self.tracker.state_dict(), "best": self._best}
        known = None if self._known is None else list(self._known)
        return state | {"evidence": evidence, "known": known, "measured_at": self._measured_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where state_dict() was taken. What another probe said, of other bytes or another size, is no measure
        of this one's losses: they are measured again, and the lowest anew."""
        self.tracker.load_state_dict(state["tracker"])
        self._measured_at = state["measured_at"]
        if self.kind == "probe" and state["evidence"] is not None:
            probe, losses = state["evidence"]
            if probe == self.probe.id and len(losses) == self.probe.windows:
                self._best = state["best"]
                self._evidence, self._known = Evidence(probe, tuple(losses)), tuple(state["known"])


def _mean(evidence: Evidence | None) -> float | None:
    return None if evidence is None else statistics.fmean(evidence.losses)
