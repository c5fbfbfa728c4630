"""What happened between this rank and its peers, one tab-separated line per event."""

import datetime
import functools
import os
import threading
from collections.abc import Callable
from pathlib import Path

from runtime.scribe import Hand, at_once
from runtime.stderr import say

COLUMNS = (
    "timestamp",
    "rank",
    "event",
    "step",
    "fitness",
    "exchange_id",
    "peer",
    "bytes",
    "milliseconds",
    "message",
)
MISSING = "NA"


class EventLog:
    """Appends events to the TSV file `path`; any thread may write, and a full disk does not stop training.

    The file is made with its folders and a header, or continued where it exists. What cannot be written is reported
    once on standard error and counted in `lost`, and the next event tries again.
    tell: called by write() with each event that has a peer: event, step, peer, bytes, milliseconds, message; hand: who
    does the writing, so that a disk that hangs holds up nobody else.
    """

    def __init__(self, path: Path, rank: int, tell: Callable[..., None] | None = None, hand: Hand = at_once) -> None:
        self.path = Path(path)
        self.rank = rank
        self._tell = tell
        self._hand = hand
        self.lost = 0
        self._lock = threading.Lock()
        self._descriptor: int | None = None
        try:
            self._descriptor = self._open()
        except OSError as error:
            self._lose(str(error))

    def write(
        self,
        event: str,
        step: int | None = None,
        fitness: float | None = None,
        exchange_id: str | None = None,
        peer: int | str | None = None,
        nbytes: int | None = None,
        milliseconds: float | None = None,
        message: str = "",
    ) -> None:
        """Append one line with the time of now; fitness is a loss in nats per byte. Never raises OSError."""
        if self._tell is not None and peer is not None:
            who = peer if isinstance(peer, int) else _text(peer)
            self._tell(event, step, who, nbytes, milliseconds, _text(message) if message else "")
        fields = (
            _timestamp(),
            str(self.rank),
            _text(event),
            _text(step),
            MISSING if fitness is None else f"{fitness:.6f}",
            _text(exchange_id),
            _text(peer),
            _text(nbytes),
            MISSING if milliseconds is None else f"{milliseconds:.1f}",
            _text(message),
        )
        self._hand(functools.partial(self._write, "\t".join(fields) + "\n"))

    def close(self) -> None:
        """Close the file; a later write opens it again."""
        self._hand(self._close)

    def _write(self, line: str) -> None:
        with self._lock:
            try:
                if self._descriptor is None:
                    self._descriptor = self._open()
                _append(self._descriptor, line)
            except OSError as error:
                self._abandon()  # what the failed write left of its line is ended by the next _open
                self._lose(str(error))

    def _close(self) -> None:
        with self._lock:
            self._abandon()

    def _open(self) -> int:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            if size == 0:
                _append(descriptor, "\t".join(COLUMNS) + "\n")
            elif os.pread(descriptor, 1, size - 1) != b"\n":  # a writer died, or the disk was full, within a line
                _append(descriptor, "\n")
        except OSError:
            os.close(descriptor)
            raise
        return descriptor

    def _lose(self, reason: str) -> None:
        self.lost += 1
        if self.lost == 1:
            say(f"gossip events of rank {self.rank} are being lost: {reason}")

    def _abandon(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return
        try:
            os.close(descriptor)
        except OSError as error:  # a network filesystem says here what became of earlier writes
            self._lose(str(error))


def _append(descriptor: int, line: str) -> None:
    content = line.encode()
    while content:
        content = content[os.write(descriptor, content) :]


def _text(value: object) -> str:
    """One field: control characters would break the line or the reader's terminal, so they become spaces."""
    text = "".join(
        character if character.isprintable() else " " for character in str(value if value is not None else "")
    )
    return text.strip() or MISSING


def _timestamp() -> str:
    now = datetime.datetime.now(datetime.timezone.utc)
    return now.isoformat(timespec="milliseconds").replace("+00:00", "Z")
