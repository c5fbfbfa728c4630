"""Whose weights are not taken for a while, because they did harm here."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable

FIRST_SECONDS = 60.0
LONGEST_SECONDS = 3600.0
MOST_STRIKES = 7  # with which the time is the longest
FADE_SECONDS = 3600.0  # of being trusted again, for each of which a strike is forgotten
REMEMBERED = 1024  # processes; the one whose last strike is oldest is forgotten


class Reputation:
    """Strikes by incarnation, a process's nonce: each doubles the time for which it is distrusted, and fades later.
    Any thread.

    clock: seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._strikes: OrderedDict[str, tuple[int, float]] = OrderedDict()  # how many, and until when
        self._lock = threading.Lock()

    def strike(self, incarnation: str) -> float:
        """Hold one more harm against `incarnation`; returns for how many seconds from now it is distrusted."""
        with self._lock:
            now = self._clock()
            strikes, trusted_since = self._strikes.pop(incarnation, (0, now))
            faded = int(max(now - trusted_since, 0.0) / FADE_SECONDS)
            strikes = min(max(strikes - faded, 0) + 1, MOST_STRIKES)
            seconds = min(FIRST_SECONDS * 2 ** (strikes - 1), LONGEST_SECONDS)
            self._strikes[incarnation] = (strikes, now + seconds)
            if len(self._strikes) > REMEMBERED:
                self._strikes.popitem(last=False)
        return seconds

    def distrusts(self, incarnation: str) -> bool:
        """Whether its weights are not to be taken now."""
        with self._lock:
            return incarnation in self._strikes and self._clock() < self._strikes[incarnation][1]
