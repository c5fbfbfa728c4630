"""Is one rank's model better than another's? A paired test over the probe windows that both have measured."""

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass


class Verdict(enum.Enum):
    """Which of two is the fitter one, as far as the evidence goes."""

    FIRST = "first"
    SECOND = "second"
    UNCLEAR = "unclear"


@dataclass(frozen=True)
class Evidence:
    """A probe as one rank has measured it: a digest of its bytes (32 hex digits), the loss of each of its windows."""

    probe: str
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Comparison:
    """What a comparison rests on.

    effect: mean of first - second over `windows` windows, in nats per byte; p_value: chance of an effect at least as
    far from zero if both were equally good; level: what it had to fall below.
    """

    verdict: Verdict
    effect: float
    p_value: float
    level: float
    windows: int

    def __str__(self) -> str:
        return f"{self.effect:+.4f} nats/byte in {self.windows} windows, p {self.p_value:.2g} at {self.level:.2g}"


def compare(
    first: Sequence[float], second: Sequence[float], significance: float, least_effect: float, looks: int
) -> Comparison:
    """Student's paired t-test of two models' losses (nats per byte) on the same windows in the same order.

    Where one has measured more windows than the other, their common beginning counts. significance: chance that any
    of the comparisons since the weights last changed hands calls equals unequal; this one is number `looks` (from 1),
    and may spend 1 / (looks (looks + 1)) of it, which sums to the whole however often one looks. least_effect: nats per
    byte; a smaller difference is never clear. Fewer than two windows are no evidence.
    """
    assert looks >= 1, looks
    differences = [a - b for a, b in zip(first, second, strict=False)]
    count, level = len(differences), significance / (looks * (looks + 1))
    if count < 2:
        return Comparison(Verdict.UNCLEAR, math.fsum(differences), 1.0, level, count)
    mean = math.fsum(differences) / count
    variance = math.fsum((difference - mean) ** 2 for difference in differences) / (count - 1)
    if variance == 0:
        p_value = float(mean == 0)
    else:
        p_value = two_sided_p(mean / math.sqrt(variance / count), count - 1)
    clear = p_value < level and abs(mean) >= least_effect
    verdict = Verdict.UNCLEAR if not clear else Verdict.FIRST if mean < 0 else Verdict.SECOND
    return Comparison(verdict, mean, p_value, level, count)


def two_sided_p(t: float, freedom: int) -> float:
    """Chance that Student's t with `freedom` degrees of freedom (from 1) is at least |t| away from zero.

    The finite series of Abramowitz and Stegun, 26.7.3 and 26.7.4; its error is that of rounding, some 1e-15.
    """
    angle = math.atan(abs(t) / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = 0.0
    for k in range(2 + odd, freedom + 1, 2):  # one term for each two degrees of freedom
        total += term
        term *= cosine**2 * (k - 1) / k
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return min(1.0, max(0.0, 1 - inside))
