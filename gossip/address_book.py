"""Whom a rank calls: any peer that it knows of, but for a while not where nobody answered, nor itself."""

import random
import time
from collections.abc import Callable, Iterable

FIRST_SECONDS = (
    1.0  # in which an address is not called again where nobody answered, and twice as long each further time
)
LONGEST_SECONDS = 120.0  # a call in vain takes the rank's one place for a conversation for some seconds
OWN_SECONDS = 600.0  # not for ever: whoever is on the path can lead a call back to its caller once, and may be gone


class AddressBook:
    """addresses(): of all peers now, each once; dice: chooses among them; clock: seconds that never go back. known()
    may be called from any thread, all else from one."""

    def __init__(
        self, addresses: Callable[[], Iterable[str]], dice: random.Random, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._addresses = addresses
        self._dice = dice
        self._clock = clock
        self._left_alone: dict[str, tuple[float, float]] = {}  # until when, and for how long that was

    def known(self) -> list[str]:
        """The addresses that may be called now."""
        now = self._clock()
        return [address for address in self._addresses() if self._left_alone.get(address, (now, 0))[0] <= now]

    def choose(self) -> str | None:
        """One of known(), None of none."""
        known = self.known()
        return self._dice.choice(known) if known else None

    def silent(self, address: str) -> None:
        """It was called, and nobody who knows the run's secret answered."""
        now = self._clock()
        _, before = self._left_alone.get(address, (now, 0.0))
        self._leave_alone(address, min(max(FIRST_SECONDS, 2 * before), LONGEST_SECONDS))

    def answered(self, address: str) -> None:
        """It was called, and a peer answered."""
        self._left_alone.pop(address, None)

    def own(self, address: str) -> None:
        """It was called, and led to this rank itself."""
        self._leave_alone(address, OWN_SECONDS)

    def _leave_alone(self, address: str, seconds: float) -> None:
        # What nobody knows of any more, as the address of a rank that came back at another, is forgotten.
        kept = {other: self._left_alone[other] for other in self._addresses() if other in self._left_alone}
        self._left_alone = kept | {address: (self._clock() + seconds, seconds)}
