"""The care that every contestant gets alike: what is tried of its rate and its dropout, and what is chosen."""

from collections.abc import Callable

from bench.race.contestant import Setting

RATES = (2e-3, 4e-3, 8e-3)  # tried of every contestant; the grid then grows outward by factors of two
MOST_RATES = 6
DROPOUTS = (0.0, 0.1)


def tune(loss: Callable[[Setting, float], float], minutes: float, rate_minutes: float, drops: bool) -> Setting:
    """The best rate without dropout, in short trials; then, with it, the best dropout, in trials as long as the race.

    Dropout pays only after several passes over the data. loss: of a setting tried for so many minutes; drops: whether
    the contestant has dropout.
    """
    rate = best_rate(lambda rate: loss(Setting(rate, 0.0), rate_minutes))
    settings = [Setting(rate, dropout) for dropout in DROPOUTS]
    return min(settings, key=lambda setting: loss(setting, minutes)) if drops else settings[0]


def best_rate(loss: Callable[[float], float]) -> float:
    """The rate of the lowest loss, on a grid that grows while its best is at an end, up to MOST_RATES."""
    losses = {rate: loss(rate) for rate in RATES}
    while True:
        best = min(losses, key=losses.get)
        outward = 2 * best if best == max(losses) else best / 2
        if best not in (min(losses), max(losses)) or len(losses) == MOST_RATES:
            return best
        losses[outward] = loss(outward)
