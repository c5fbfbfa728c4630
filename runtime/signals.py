"""Signals become flags that the training thread reads at an optimizer-step boundary."""

import os
import signal
from types import FrameType


class SignalFlags:
    """SIGTERM or SIGINT once: `stop` (save and leave); twice: leave now. SIGUSR1: `save` (and go on).

    Install from the main thread. The second stop signal exits with 128 + its number without saving.
    """

    def __init__(self) -> None:
        self.stop = False
        self.save = False

    def install(self) -> "SignalFlags":
        """Take over SIGTERM, SIGINT and SIGUSR1 of this process."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_stop)
        signal.signal(signal.SIGUSR1, self._on_save)
        return self

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        if self.stop:
            os._exit(128 + number)
        self.stop = True

    def _on_save(self, number: int, frame: FrameType | None) -> None:
        self.save = True

    def take_save(self) -> bool:
        """True once for each time (or burst of times) that a save was asked for."""
        wanted, self.save = self.save, False
        return wanted
