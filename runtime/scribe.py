"""Small writes on a thread of their own, in order: a disk that hangs holds it up, and nobody else."""

import queue
import threading
from collections.abc import Callable

from runtime.stderr import say

MOST_WAITING = 10_000  # writes, of some hundred bytes each
END_SECONDS = 20.0  # that the last ones may take

Write = Callable[[], None]
Hand = Callable[[Write], None]  # takes a write over, to be done now or soon, in the order in which they came


def at_once(write: Write) -> None:
    """The Hand of whoever has no Scribe."""
    write()


class Scribe:
    """Does what it is handed, which deals with OSError itself. Where MOST_WAITING wait already, or memory is out, a
    write is dropped, counted in `lost` and said once.
    """

    def __init__(self) -> None:
        self.lost = 0
        self._waiting: queue.Queue[Write | None] = queue.Queue(MOST_WAITING)
        # A daemon: an interpreter that ends must not wait for a disk that hangs.
        self._thread = threading.Thread(target=self._run, name="scribe", daemon=True)
        self._thread.start()
        self._closed = False
        self._error: BaseException | None = None

    def hand(self, write: Write) -> None:
        """Any thread; never waits for the disk. Once closed a write is done at once, or lost where the disk still holds
        an earlier one. Raises what an earlier write has raised."""
        if self._error is not None:
            raise self._error
        if self._closed and not self._thread.is_alive():
            write()
            return
        try:
            self._waiting.put_nowait(write)
        except queue.Full:
            self._lose("the disk does not answer")

    def close(self) -> None:
        """Wait until all is written, END_SECONDS at most; what is not then is lost, which is said."""
        if self._closed:
            return
        self._closed = True
        try:
            self._waiting.put(None, timeout=END_SECONDS)
            self._thread.join(END_SECONDS)
        except queue.Full:
            pass
        if self._error is not None:
            raise self._error
        if self._thread.is_alive():
            left = self._waiting.qsize()
            say(f"warning: the last {left} lines of logs and metrics are lost: the disk does not answer")
            return
        while not self._waiting.empty():  # what the last ones have handed over in their turn
            self._do(self._waiting.get())

    def _run(self) -> None:
        try:
            while (write := self._waiting.get()) is not None:
                self._do(write)
        except BaseException as error:
            self._error = error

    def _do(self, write: Write) -> None:
        try:
            write()
        except MemoryError:
            self._lose("memory is out")

    def _lose(self, why: str) -> None:
        self.lost += 1
        if self.lost == 1:
            say(f"warning: lines of logs and metrics are being lost: {why}; training goes on")
