"""Callers that are in no conversation yet: how many there may be, how they prove themselves, what is said of them."""

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable, Generator
from dataclasses import dataclass

from gossip.faults import Fault, ProtocolError
from gossip.handshake import Session, Step, steps
from gossip.ledger import Ledger, Talk
from gossip.reports import Reports
from gossip.wire import Wire

STRANGERS_LIMIT = 64  # at once
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # struct linger


@dataclass
class _Stranger:
    """A caller that has not authenticated. heard: of the message that `step` wants; deadline: of the whole handshake,
    once it is waited for."""

    talk: Talk
    steps: Generator[Step, bytes, None]
    step: Step
    heard: bytes = b""
    deadline: asyncio.TimerHandle | None = None


class Strangers:
    """The connections that have not authenticated yet, or that have and are in no conversation. When full, the oldest
    is closed for the newest.

    A peer authenticates and says HELLO in milliseconds, so the oldest is a slow one, or one that is broken. A stranger
    has no task, and the kernel wakes nobody for less than a whole message of it. Each holds a socket, a timer and at
    most 74 bytes that were read from it, about 2 KB in all (a caller with the secret a task and a frame of HELLO, 64
    KiB), and what the kernel takes in unasked for: the first size of a receive buffer (net.ipv4.tcp_rmem, by default
    128 KiB). Together with those in the listener's queue (network_utils.BACKLOG, 128) that is at most 64 * 2 KB here,
    for strangers, and 192 * 128 KiB in the kernel.

    A stranger is refused by a reset, whatever was wrong: it learns nothing from it, and the kernel keeps nothing of it.

    key: of the run; seconds: to authenticate, in all; welcome(talk, session): begins the conversation of a caller that
    has proved itself, and returns its task. One event loop's thread only.
    """

    def __init__(
        self,
        key: bytes,
        seconds: float,
        ledger: Ledger,
        reports: Reports,
        welcome: Callable[[Talk, Session], asyncio.Task],
    ) -> None:
        self._key = key
        self._seconds = seconds
        self._ledger = ledger
        self._reports = reports
        self._welcome = welcome
        self._held: dict[socket.socket, _Stranger | asyncio.Task] = {}  # oldest first; a task once it has proved itself

    def __len__(self) -> int:
        return len(self._held)

    def admit(self, connection: socket.socket, address: str) -> None:
        """Hear a caller from now on. Raises MemoryError; the connection is closed then."""
        with contextlib.ExitStack() as undoing:
            undoing.callback(_reset, connection)
            if len(self._held) >= STRANGERS_LIMIT:
                self._put_out_oldest("to make room for newer callers")
            talk = Talk(address, initiator=False, connection=connection, wire=Wire(connection))
            handshake = steps(self._key, initiator=False)
            stranger = self._held[connection] = _Stranger(talk, handshake, next(handshake))
            undoing.pop_all()
        self._look(stranger)

    def dismiss(self, connection: socket.socket) -> None:
        """It has its conversation, or ended."""
        self._held.pop(connection, None)

    def close(self) -> None:
        """Put out all that are left."""
        while self._held:
            self._put_out_oldest("")

    def _put_out_oldest(self, why: str) -> None:
        held = self._held.pop(next(iter(self._held)))
        if isinstance(held, _Stranger):
            self._refuse(held, ProtocolError(Fault.CLOSING, why))
        else:
            held.cancel()

    def _look(self, stranger: _Stranger) -> None:
        error: ProtocolError | None = ProtocolError(Fault.INTERNAL)  # what any other exception counts as
        try:
            self._hear(stranger)
            error = None
        except ProtocolError as fault:
            error = fault
        except MemoryError as exhausted:
            error = ProtocolError(Fault.OUT_OF_MEMORY, str(exhausted))
        finally:
            if error is not None:
                self._refuse(stranger, error)

    def _hear(self, stranger: _Stranger) -> None:
        """Take what has come, and answer it once it is a whole message."""
        wire = stranger.talk.wire
        stranger.heard += wire.take(stranger.step.wants - len(stranger.heard))
        if len(stranger.heard) == stranger.step.wants:
            stranger.step, stranger.heard = stranger.steps.send(stranger.heard), b""
            wire.say(stranger.step.say)
        if stranger.step.session is None:
            wire.wake_at(stranger.step.wants - len(stranger.heard))
            self._await(stranger)
        else:
            self._leave_off(stranger)
            wire.wake_at(1)
            self._held[stranger.talk.connection] = self._welcome(stranger.talk, stranger.step.session)

    def _await(self, stranger: _Stranger) -> None:
        if stranger.deadline is None:
            loop = asyncio.get_running_loop()
            stranger.deadline = loop.call_later(self._seconds, self._expire, stranger)
            loop.add_reader(stranger.talk.connection, self._look, stranger)

    def _expire(self, stranger: _Stranger) -> None:
        self._refuse(stranger, ProtocolError(Fault.DEADLINE, f"{self._seconds:g} s for the handshake"))

    def _leave_off(self, stranger: _Stranger) -> None:
        if stranger.deadline is not None:
            stranger.deadline.cancel()
            stranger.deadline = None
            asyncio.get_running_loop().remove_reader(stranger.talk.connection)

    def _refuse(self, stranger: _Stranger, error: ProtocolError) -> None:
        talk = stranger.talk
        self.dismiss(talk.connection)  # first: for what is said after it memory may be out
        self._leave_off(stranger)
        _reset(talk.connection)
        message = str(error)
        self._reports.tell(error.fault, lambda others: self._ledger.write(talk, "failed", message + others))
        self._ledger.count_ended(talk, "failed")


def _reset(connection: socket.socket) -> None:
    if connection.fileno() != -1:  # closed already where memory was out for its conversation
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        connection.close()
