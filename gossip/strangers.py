"""Callers that are in no conversation yet: how many there may be, how fast they may come, what is said of them."""

import asyncio
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

from gossip.faults import Fault, ProtocolError
from gossip.ledger import Ledger, Talk

STRANGERS_LIMIT = 64  # at once
ACCEPTS_PER_SECOND = 100.0  # sustained: bounds the time that strangers take from training
ACCEPTS_AT_ONCE = 200  # after a calm
ACCEPTS_ON_CREDIT = 10  # in a flood: one by one, each would cost three times as much in wake-ups
REPORT_SECONDS = 10.0  # between two lines about the same kind of failure


class TokenBucket:
    """Lets `rate` events a second pass, and `burst` at once after a calm.

    credit: how many may pass unpaid before one has to wait, for all of them; clock: seconds that never go back.
    """

    def __init__(self, rate: float, burst: int, credit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._burst = burst
        self._credit = credit
        self._clock = clock
        self._tokens = float(burst)
        self._counted_at = clock()

    def take(self) -> float:
        """Take a token; returns the seconds to wait before its event."""
        now = self._clock()
        self._tokens = min(self._burst, self._tokens + (now - self._counted_at) * self._rate) - 1
        self._counted_at = now
        return 0.0 if self._tokens > -self._credit else -self._tokens / self._rate


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


class Strangers:
    """The connections that have not authenticated yet, or that have and are in no conversation. When full, the oldest
    is closed for the newest.

    A peer authenticates and says HELLO in milliseconds, so the oldest is a slow one, or one that is broken. Each holds
    a socket, a task and at most 74 bytes that were read from it (with the secret: a frame of HELLO, 64 KiB), about 10
    KB in all, and what the kernel takes in unasked for: the first size of a receive buffer (net.ipv4.tcp_rmem, by
    default 128 KiB). Together with those in the listener's queue (network_utils.BACKLOG, 128) that is at most 64 * 10
    KB here, for strangers, and 192 * 128 KiB in the kernel.
    """

    def __init__(self, ledger: Ledger, reports: Reports) -> None:
        self._ledger = ledger
        self._reports = reports
        self._tasks: dict[socket.socket, asyncio.Task] = {}  # oldest first

    def __len__(self) -> int:
        return len(self._tasks)

    def admit(self, connection: socket.socket, task: asyncio.Task) -> None:
        """`task` talks over `connection` from now on; it is cancelled should it have to make room."""
        if len(self._tasks) >= STRANGERS_LIMIT:
            oldest = next(iter(self._tasks))
            self._tasks.pop(oldest).cancel()
        self._tasks[connection] = task

    def dismiss(self, connection: socket.socket) -> None:
        """It has its conversation, or ended."""
        self._tasks.pop(connection, None)

    def fail(self, talk: Talk, error: ProtocolError) -> None:
        """Count one that a fault ended, and tell of it."""
        if talk.connection not in self._tasks:
            error = ProtocolError(Fault.CLOSING, "to make room for newer callers")
        self._reports.tell(error.fault, lambda others: self._ledger.write(talk, "failed", f"{error}{others}"))
        self._ledger.count_ended(talk, "failed")
