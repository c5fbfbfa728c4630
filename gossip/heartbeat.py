"""The coordinator thread: it beats, keeps the newest roster, and does the leader's duty when leading."""

import threading
from collections.abc import Callable

from gossip.filesystem_coordinator import FilesystemCoordinator, RankReplaced, Roster
from runtime.stderr import say

CLOSE_SECONDS = 5.0  # for a beat that is going on, and the leave; a hung filesystem may hold either for ever


class Heartbeat:
    """Calls coordinator.beat(record()) every `seconds` on a thread of its own, and leaves at the end.

    leader_duty: called after a beat when leading; report: told of an OSError (a filesystem that is gone for a while)
    or of memory that is out, after which the next beat tries again. Any other error ends the thread and is kept in
    `error`: RankReplaced, when another process is this rank, or a mistake in here.
    """

    def __init__(
        self,
        coordinator: FilesystemCoordinator,
        seconds: float,
        record: Callable[[], dict],
        leader_duty: Callable[[Roster], None] | None,
        report: Callable[[str], None],
    ) -> None:
        self.roster: Roster | None = None
        self.error: BaseException | None = None
        self._coordinator = coordinator
        self._seconds = seconds
        self._record = record
        self._leader_duty = leader_duty
        self._report = report
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gossip-coordinator", daemon=True)

    def start(self) -> None:
        """Start beating."""
        self._thread.start()

    def close(self) -> None:
        """Take leave of the registry and join the thread, or leave it behind where the filesystem holds it too long."""
        self._stop.set()
        if self._thread.ident is not None:  # it was started
            self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            say(f"the registry has not answered for {CLOSE_SECONDS:g} s: leaving without a word there")

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._attempt(self._beat)
                self._stop.wait(self._seconds)
            self._attempt(lambda: self._coordinator.leave(self._record()))
        except RankReplaced as error:  # a user's mistake: told where step_boundary() raises it
            self.error = error
        except BaseException as error:
            self.error = error
            raise

    def _beat(self) -> None:
        self.roster = self._coordinator.beat(self._record())
        if self._leader_duty is not None and self._coordinator.is_leader:
            self._leader_duty(self.roster)

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except (OSError, MemoryError) as error:
            self._report(str(error) or "memory is out")
