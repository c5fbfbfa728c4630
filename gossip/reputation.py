"""Whose weights are not taken for a while, because they did harm here."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable

FIRST_SECONDS = 60.0
LONGEST_SECONDS = 3600.0
REMEMBERED = 1024  # processes; the one whose last strike is oldest is forgotten


class Reputation:
    """Strikes by incarnation, a process's nonce: each doubles the time for which it is distrusted. Any thread.

    clock: seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._strikes: OrderedDict[str, tuple[int, float]] = OrderedDict()  # how many, and until when
        self._lock = threading.Lock()

    def strike(self, incarnation: str) -> float:
        """Hold one more harm against `incarnation`; returns for how many seconds from now it is distrusted."""
        with self._lock:
            strikes = self._strikes.pop(incarnation, (0, 0.0))[0] + 1
            seconds = min(FIRST_SECONDS * 2 ** min(strikes - 1, 16), LONGEST_SECONDS)
            self._strikes[incarnation] = (strikes, self._clock() + seconds)
            if len(self._strikes) > REMEMBERED:
                self._strikes.popitem(last=False)
        return seconds

    def distrusts(self, incarnation: str) -> bool:
        """Whether its weights are not to be taken now."""
        with self._lock:
            return incarnation in self._strikes and self._clock() < self._strikes[incarnation][1]
