"""Means with confidence intervals over seeds, by Student's t."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gossip.comparison import two_sided_p


@dataclass(frozen=True)
class Interval:
    """A mean over `count` seeds, and half the width of its confidence interval; NaN where one seed is all there is."""

    mean: float
    half: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.4f}" if math.isnan(self.half) else f"{self.mean:.4f} ± {self.half:.4f}"


def t_quantile(freedom: int, confidence: float) -> float:
    """How far from zero Student's t with `freedom` degrees of freedom lies with a chance of 1 - confidence."""
    low, high = 0.0, 1.0
    while two_sided_p(high, freedom) > 1 - confidence:
        low, high = high, 2 * high
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        if two_sided_p(middle, freedom) > 1 - confidence:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The mean of `values`, of at least one seed, and its interval."""
    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return Interval(mean, math.nan, count)
    return Interval(mean, t_quantile(count - 1, confidence) * statistics.stdev(values) / math.sqrt(count), count)


def paired(first: Mapping[int, float], second: Mapping[int, float], confidence: float = 0.95) -> Interval | None:
    """first - second over the seeds that both have; None if there is none."""
    seeds = sorted(first.keys() & second.keys())
    return interval([first[seed] - second[seed] for seed in seeds], confidence) if seeds else None
