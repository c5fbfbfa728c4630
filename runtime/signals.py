"""Signals become flags that the training thread reads at an optimizer-step boundary."""

import ctypes
import math
import os
import signal
import time
from types import FrameType

_PR_SET_PDEATHSIG = 1  # Linux, <sys/prctl.h>
AGAIN_SECONDS = 1.0  # what comes sooner may be the same wish: sent to a whole group, and forwarded by the launcher too


def signal_when_parent_dies(number: signal.Signals, parent: int) -> bool:
    """Have this process sent a signal when its parent `parent` dies (Linux: the thread that started it); False if it
    is dead already, and nothing will be sent."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    return os.getppid() == parent  # it may have died just before the kernel was told


class SignalFlags:
    """SIGTERM, SIGINT or SIGHUP: `stop` (save and leave); again, a second or more later: leave now, without saving, by
    status 128 + its number. SIGUSR1: `save` (and go on).

    SIGUSR2: `stop`, however often it comes, and whatever came before: for who cannot know what was sent already.
    Install from the main thread.
    """

    def __init__(self) -> None:
        self.stop = False
        self.save = False
        self._told = math.inf  # when it was first asked to stop, on the monotonic clock

    def install(self) -> "SignalFlags":
        """Take over SIGTERM, SIGINT, SIGHUP (but under nohup), SIGUSR1 and SIGUSR2 of this process."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._on_stop)
        signal.signal(signal.SIGUSR1, self._on_save)
        signal.signal(signal.SIGUSR2, self._on_leave)
        return self

    def follow(self, launcher: int) -> None:
        """Stop, as by SIGUSR2, when the process `launcher` dies, should it be the parent of this one. Installed before.

        A process that was started by another program in between is not followed, unless the launcher is gone already.
        """
        if os.getppid() == launcher:
            self.stop |= not signal_when_parent_dies(signal.SIGUSR2, launcher)
            return
        try:
            os.kill(launcher, 0)
        except (ProcessLookupError, PermissionError):  # gone, or its number is another user's by now
            self.stop = True

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._told >= AGAIN_SECONDS:
            os._exit(128 + number)
        self._told = min(self._told, now)
        self.stop = True

    def _on_leave(self, number: int, frame: FrameType | None) -> None:
        self.stop = True

    def _on_save(self, number: int, frame: FrameType | None) -> None:
        self.save = True

    def take_save(self) -> bool:
        """True once for each time (or burst of times) that a save was asked for."""
        wanted, self.save = self.save, False
        return wanted
