"""When the process of a rank is started again, and when its rank is given up: decisions only, without processes."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from runtime.errors import UserError

LONGEST_PAUSE = 60.0  # seconds
USER_ERROR = UserError.status  # of a rank's first process: a restart does not help
REPLACED = 4  # the exit status that says: another process is this rank, and a restart would do harm


@dataclass(frozen=True)
class RestartPolicy:
    """max_restarts: tries in a row before a rank is given up; healthy_seconds: a process that ran for so long begins
    a new row; restart_seconds: the first pause of a row, doubled at each further try, 60 s at most, and then
    shortened by dice to no less than half, so that ranks that died together do not start together.
    """

    max_restarts: int = 5
    healthy_seconds: float = 600.0
    restart_seconds: float = 1.0


class Lives:
    """The processes of one rank, one after another: begin, end, and perhaps begin again when `due`. One thread.

    clock: monotonic seconds; dice: uniform in [0, 1).
    """

    def __init__(
        self,
        policy: RestartPolicy,
        clock: Callable[[], float] = time.monotonic,
        dice: Callable[[], float] = random.random,
    ) -> None:
        self._policy = policy
        self._clock = clock
        self._dice = dice
        self._began = 0.0
        self.first_began: float | None = None  # when the first process did, on the clock
        self._in_a_row = 0
        self._pause = policy.restart_seconds  # seconds, of the next restart, before the dice shorten it
        self._stopping = False
        self.restarts = 0  # processes before the one that began last
        self.status = 0  # of the process that ended last, 128 + signal if by one
        self.ended = 0.0  # when it did, on the clock
        self.due: float | None = None  # when to begin again, on the clock; None: not at all

    def begin(self) -> None:
        """The rank's process is being started, for the first time or because it was due."""
        if self.due is not None:
            self.restarts += 1
        self.due = None
        self._began = self._clock()
        if self.first_began is None:
            self.first_began = self._began

    def end(self, status: int) -> str:
        """The process ended with `status` (128 + signal if by one): decides `due`, returns how a report of it goes on.

        Asked to stop, done, replaced, or a user's mistake: that was the last one, whatever the policy.
        """
        self.status = status
        self.ended = self._clock()
        if self._stopping or status == 0 or self.mistaken:
            return ""
        if status == REPLACED:
            return ": not restarted, another process is this rank"
        if self.ended - self._began >= self._policy.healthy_seconds:
            self._in_a_row, self._pause = 0, self._policy.restart_seconds
        if self._policy.max_restarts == 0:
            return ""
        if self._in_a_row == self._policy.max_restarts:
            return f": given up, restart {self._in_a_row} of at most {self._policy.max_restarts} did not help"
        pause = min(LONGEST_PAUSE, self._pause) * (1 - self._dice() / 2)
        self._in_a_row, self._pause = self._in_a_row + 1, min(LONGEST_PAUSE, self._pause * 2)
        self.due = self.ended + pause
        return f": restart {self._in_a_row} of at most {self._policy.max_restarts} in {pause:.1f} s"

    @property
    def mistaken(self) -> bool:
        """The first process ended by a user's mistake. What looks like one later is a disk or a network that fails:
        the same command line served before."""
        return self.status == USER_ERROR and self.restarts == 0

    def stop(self) -> bool:
        """The rank is asked to stop: none begins from now on. True if that cancels a restart that was due."""
        cancels = self.due is not None
        self.due = None
        self._stopping = True
        return cancels
