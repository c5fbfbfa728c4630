"""Whether other processes hold up this one's threads, which wait for each other at every step of a computation."""

import os
import time

import torch

LEAST_SECONDS = 10.0  # that a judgement takes
LEAST_SHARE = 0.8  # of its threads' time that a process has where it is alone, which spin while they wait


class Contention:
    """Looks at the processor time of a process that computes on a CPU with several threads, and says once where it gets
    little. Where threads wait passively, or a GPU computes, there is nothing to be said.
    """

    def __init__(self, device: torch.device) -> None:
        self._threads = torch.get_num_threads()
        passive = os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive"
        self._watches = device.type == "cpu" and self._threads > 1 and not passive
        self._wall = self._cpu = 0.0
        self.begin()

    def begin(self) -> None:
        """What was before does not count."""
        self._wall, self._cpu = time.monotonic(), time.process_time()

    def complaint(self) -> str | None:
        """What there is to say now; None if nothing, or not yet."""
        wall, cpu = time.monotonic() - self._wall, time.process_time() - self._cpu
        if not self._watches or wall < LEAST_SECONDS:
            return None
        share = cpu / (wall * self._threads)
        if share >= LEAST_SHARE:
            self.begin()
            return None
        self._watches = False
        return (
            f"warning: this rank's {self._threads} threads get {share:.0%} of their time, and each step waits for the "
            "slowest: beside other processes OMP_WAIT_POLICY=passive, or fewer threads by OMP_NUM_THREADS, may be "
            "several times as fast"
        )
