"""When a rank that has come back calls, without waiting for luck: it has missed what the others learnt."""

import time
from collections.abc import Callable

FIRST_SECONDS = 0.25  # from its first call to the next, and twice as long each further time
LONGEST_SECONDS = 10.0


class Seeking:
    """Off until begin(); end() may come from any thread, all else from one. clock: seconds that never go back."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._on = False
        self._next = self._pause = 0.0

    def begin(self) -> None:
        """From now on call, less and less often."""
        self._on, self._next, self._pause = True, self._clock(), FIRST_SECONDS

    def end(self) -> None:
        """Somebody was met."""
        self._on = False

    def is_due(self, somebody_known: Callable[[], bool]) -> bool:
        """Whether to call now; to be asked at each step boundary."""
        if not self._on or (now := self._clock()) < self._next or not somebody_known():
            return False
        self._next, self._pause = now + self._pause, min(2 * self._pause, LONGEST_SECONDS)
        return True
