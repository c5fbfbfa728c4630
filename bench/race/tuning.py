"""The care that every contestant gets alike: what is tried of its rate and its dropout, and what is chosen."""

from collections.abc import Callable

from bench.race.contestant import Setting

RATES = (2e-3, 4e-3, 8e-3)  # tried of every contestant; the grid then grows outward by factors of two
MOST_RATES = 6
DROPOUTS = (0.0, 0.1)  # likewise; the grid then grows upward by as much, to MOST_DROPOUT
MOST_DROPOUT = 0.4


def tune(loss: Callable[[Setting, float], float], minutes: float, rate_minutes: float, drops: bool) -> Setting:
    """The best rate without dropout, in short trials; then, with it, the best dropout, in trials as long as the race.

    Dropout pays only after several passes over the data. loss: of a setting tried for so many minutes; drops: whether
    the contestant has dropout.
    """
    rate = best_rate(lambda rate: loss(Setting(rate, 0.0), rate_minutes))
    if not drops:
        return Setting(rate, 0.0)
    return Setting(rate, best_dropout(lambda dropout: loss(Setting(rate, dropout), minutes)))


def best_dropout(loss: Callable[[float], float]) -> float:
    """The chance of the lowest loss, on a grid that grows while its best is the highest, up to MOST_DROPOUT."""
    losses = {dropout: loss(dropout) for dropout in DROPOUTS}
    while (best := min(losses, key=losses.get)) == max(losses) < MOST_DROPOUT:
        higher = round(best + DROPOUTS[1], 1)
        losses[higher] = loss(higher)
    return best


def best_rate(loss: Callable[[float], float]) -> float:
    """The rate of the lowest loss, on a grid that grows while its best is at an end, up to MOST_RATES."""
    losses = {rate: loss(rate) for rate in RATES}
    while True:
        best = min(losses, key=losses.get)
        outward = 2 * best if best == max(losses) else best / 2
        if best not in (min(losses), max(losses)) or len(losses) == MOST_RATES:
            return best
        losses[outward] = loss(outward)
