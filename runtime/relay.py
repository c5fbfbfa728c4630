"""What the ranks of one launcher say, line by line: marked with the rank, and said once though all say it; and what the
launcher says."""

import collections
import contextlib
import os
import queue
import threading
from typing import BinaryIO

LONGEST_LINE = 64 * 1024  # bytes
REMEMBERED_LINES = 4096
WAITING_LINES = 1000


class RepeatFilter:
    """Decides which lines of many ranks to show: the k-th time that a line comes is news once, whoever says it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._said: collections.OrderedDict[bytes, collections.Counter[int]] = collections.OrderedDict()

    def is_news(self, rank: int, line: bytes) -> bool:
        """True unless another rank already said `line` as often as `rank` has now. Any thread."""
        with self._lock:
            times = self._said.setdefault(line, collections.Counter())
            self._said.move_to_end(line)
            if len(self._said) > REMEMBERED_LINES:
                self._said.popitem(last=False)
            most = max(times.values(), default=0)
            times[rank] += 1
            return times[rank] > most


def relay(rank: int, source: BinaryIO, sink: int, news: RepeatFilter | None) -> None:
    """Copy lines of `source` to the descriptor `sink` until they end; news: drop what another rank has said."""
    with source:
        while line := source.readline(LONGEST_LINE):
            line = line.rstrip(b"\r\n")
            if news is None or news.is_news(rank, line):
                write(sink, b"[rank %d] %s\n" % (rank, line))


class Teller:
    """Writes the launcher's own lines on a thread: a reader that stops reading holds that up, and no rank's restart."""

    def __init__(self, sink: int) -> None:
        self._waiting: queue.Queue[bytes | None] = queue.Queue(WAITING_LINES)
        # A daemon: the launcher's end must not wait for a reader for ever.
        self._thread = threading.Thread(target=self._run, args=(sink,), daemon=True)
        self._thread.start()

    def tell(self, line: str) -> None:
        """Never waits: a line that comes while WAITING_LINES wait already is lost."""
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait(f"{line}\n".encode())

    def close(self, seconds: float) -> None:
        """Wait until all is written, `seconds` at most."""
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait(None)
        self._thread.join(seconds)

    def _run(self, sink: int) -> None:
        while (line := self._waiting.get()) is not None:
            write(sink, line)


def write(sink: int, content: bytes) -> None:
    """Write a line whole, to whoever still reads."""
    # One write a line keeps lines whole. A reader who went away must not stop the draining of the ranks' pipes.
    try:
        os.write(sink, content)
    except OSError:
        return
