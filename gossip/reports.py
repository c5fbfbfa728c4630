"""Lines about what may happen again and again, few of them."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from gossip.faults import Fault


@dataclass
class _Silence:
    """The time after a line: what would have been said meanwhile, and how often."""

    newest: Callable[[str], None] | None = None
    count: int = 0


class Reports:
    """Lines about what may happen again and again: the first of a kind at once, then the newest each `seconds`.

    A line is a function that writes it, given what to add about the others of its kind. One event loop's thread only.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._silences: dict[Fault | str, _Silence] = {}

    def tell(self, kind: Fault | str, line: Callable[[str], None]) -> None:
        """Say `line` now or, if one of its kind was said lately, count it."""
        silence = self._silences.get(kind)
        if silence is None:
            self._say(kind, line, "")
        else:
            silence.newest = line
            silence.count += 1

    def close(self) -> None:
        """Say what is still to be said."""
        for silence in self._silences.values():
            if silence.newest is not None:
                silence.newest(_others(silence))

    def _say(self, kind: Fault | str, line: Callable[[str], None], others: str) -> None:
        self._silences[kind] = _Silence()
        asyncio.get_running_loop().call_later(self._seconds, self._break_silence, kind)
        line(others)

    def _break_silence(self, kind: Fault | str) -> None:
        silence = self._silences.pop(kind)
        if silence.newest is not None:
            self._say(kind, silence.newest, _others(silence))


def _others(silence: _Silence) -> str:
    return f", and {silence.count - 1} more" if silence.count > 1 else ""
