"""Every conversation is counted once and leaves one line, however it ended."""

import dataclasses
import socket
import threading
import time
from dataclasses import dataclass, field

from gossip.event_log import EventLog
from gossip.faults import Fault, ProtocolError
from gossip.protocol import Hello
from gossip.wire import Channel, Wire


@dataclass
class Counters:
    """Conversations so far, by who began them and by how they ended, and all bytes they moved.

    initiated: calls that this rank made; received: authenticated calls that it answered; won: its weights were
    accepted; lost: a peer's were merged here; averaged: both took the mean; rolled_back: a peer's weights did harm
    here, and the merge was undone; tied: both ends left it at that; busy: one end was in another conversation; failed:
    any other fault, strangers' included.
    """

    initiated: int = 0
    received: int = 0
    won: int = 0
    lost: int = 0
    averaged: int = 0
    tied: int = 0
    failed: int = 0
    busy: int = 0
    rolled_back: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0


@dataclass
class Talk:
    """What is known of one conversation while it goes on: whose, since when, and over which connection.

    claimed: it holds its rank's one place for a conversation; delivered: until its snapshot is merged or dropped.
    """

    address: str
    initiator: bool
    began: float = field(default_factory=time.monotonic)
    mine: Hello | None = None
    connection: socket.socket | None = None
    wire: Wire | None = None
    channel: Channel | None = None
    exchange_id: str | None = None
    claimed: bool = False
    delivered: bool = False

    @property
    def seconds(self) -> float:
        """Since its beginning."""
        return time.monotonic() - self.began

    @property
    def peer(self) -> int | str:
        """The peer's rank once it has said so, else its address."""
        theirs = self.channel.peer if self.channel else None
        return self.address if theirs is None else theirs.rank


class Ledger:
    """Counters and the event log of one rank. Any thread may call it."""

    def __init__(self, event_log: EventLog) -> None:
        self._event_log = event_log
        self._counters = Counters()
        self._lock = threading.Lock()

    @property
    def counters(self) -> Counters:
        """A copy of the counters."""
        with self._lock:
            return dataclasses.replace(self._counters)

    def count(self, **changes: int) -> None:
        """Add to the counters named."""
        with self._lock:
            for name, change in changes.items():
                setattr(self._counters, name, getattr(self._counters, name) + change)

    def count_ended(self, talk: Talk, ending: str) -> None:
        """Count a conversation under `ending` (won, lost, averaged, tied, busy, failed, rolled_back), and its bytes."""
        sent, received = (talk.wire.sent, talk.wire.received) if talk.wire else (0, 0)
        self.count(**{ending: 1}, bytes_sent=sent, bytes_received=received)

    def write(self, talk: Talk, event: str, message: str) -> None:
        """The conversation's one line in the event log."""
        mine = talk.mine
        self._event_log.write(
            event,
            step=mine.step if mine else None,
            fitness=mine.fitness if mine else None,
            exchange_id=talk.exchange_id,
            peer=talk.peer,
            nbytes=talk.wire.sent + talk.wire.received if talk.wire else 0,
            milliseconds=talk.seconds * 1000,
            message=message,
        )

    def fail(self, talk: Talk, error: ProtocolError) -> None:
        """Count and write a conversation that a fault ended."""
        ending = "busy" if error.fault is Fault.BUSY else "failed"
        self.write(talk, ending, str(error))
        self.count_ended(talk, ending)

    def note(self, event: str, message: str) -> None:
        """A line about no conversation."""
        self._event_log.write(event, message=message)
