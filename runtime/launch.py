"""Starts the ranks of this host as independent processes, restarts those that die, and tells the truth in the end.

    python -m runtime.launch --ranks 4 -- train.py --data corpus.txt --output run

Each rank is a process in a session of its own: Ctrl-C reaches it once, through the launcher, and nobody else's death
reaches it at all. Rank 0 keeps the terminal; lines of the others come marked, and said once though all say them.

A rank that dies, by its own fault or killed, is started again alone after a pause, but not after status 2 (a user's
mistake) nor once the launcher was asked to stop. One that dies again and again is given up, and the others go on.
"""

import collections
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import BinaryIO

from runtime.arguments import ArgumentParser, normalise_flags, run_main
from runtime.errors import UserError
from runtime.supervise import LONGEST_PAUSE, Lives, RestartPolicy

# What the launcher is sent -> what each rank is sent. A closed terminal asks the ranks to save and leave.
FORWARDED = {
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGHUP: signal.SIGTERM,
}
LONGEST_LINE = 64 * 1024  # bytes
REMEMBERED_LINES = 4096
DRAIN_SECONDS = 5.0


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


class Launcher:
    """`ranks` processes of one command, watched from the main thread until none runs and none is to start again."""

    def __init__(self, command: list[str], ranks: int, threads_per_rank: int, policy: RestartPolicy) -> None:
        self._command = command
        self._threads_per_rank = threads_per_rank
        self._lives = [Lives(policy) for _ in range(ranks)]
        self._running: dict[int, subprocess.Popen] = {}
        self._relays: list[threading.Thread] = []
        self._errors = RepeatFilter()
        # Signal handlers and waiting threads only put things here; the main thread alone acts on them.
        self._events: queue.SimpleQueue[signal.Signals | int] = queue.SimpleQueue()

    def run(self) -> int:
        """Start all ranks, keep them running until each has ended or was given up, and return the status to exit with.

        0 if every rank's last process exited with 0, 2 if any exited with 2, else that of the first rank to be lost
        (128 + signal).
        """
        for number in FORWARDED:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup
            signal.signal(number, lambda received, _: self._events.put(signal.Signals(received)))
        for rank in range(len(self._lives)):
            self._start(rank)
        while self._running or self._next_start() < math.inf:
            try:
                event = self._events.get(timeout=self._seconds_to_wait())
            except queue.Empty:
                self._start_due()
                continue
            if isinstance(event, signal.Signals):
                self._forward(FORWARDED[event])
            else:
                self._reap(event)
        for relay in self._relays:
            relay.join(DRAIN_SECONDS)  # a process that a rank left behind may hold the pipe for ever
        in_order = sorted(self._lives, key=lambda lives: lives.ended)
        return exit_status([lives.status for lives in in_order if lives.status != 0])

    def _next_start(self) -> float:
        return min((lives.due for lives in self._lives if lives.due is not None), default=math.inf)

    def _seconds_to_wait(self) -> float | None:
        seconds = self._next_start() - time.monotonic()
        return None if seconds == math.inf else max(0.0, seconds)

    def _start_due(self) -> None:
        for rank, lives in enumerate(self._lives):
            if lives.due is not None and lives.due <= time.monotonic():
                self._start(rank)

    def _start(self, rank: int) -> None:
        pipe = None if rank == 0 else subprocess.PIPE
        lives = self._lives[rank]
        lives.begin()
        told = rank_environment(rank, len(self._lives), self._threads_per_rank, lives.restarts)
        try:
            process = subprocess.Popen(
                self._command,
                env={**os.environ, **told},
                stdin=subprocess.DEVNULL,
                stdout=pipe,
                stderr=pipe,
                start_new_session=True,
            )
        except OSError as error:
            self._end(rank, 126, f"could not be started: {error}")
            return
        self._running[rank] = process
        threading.Thread(target=self._wait, args=(rank, process.pid), daemon=True).start()
        self._relays = [relay for relay in self._relays if relay.is_alive()]
        for source, sink, news in ((process.stdout, 1, None), (process.stderr, 2, self._errors)):
            if source is not None:
                relay = threading.Thread(target=_relay, args=(rank, source, sink, news), daemon=True)
                relay.start()
                self._relays.append(relay)

    def _wait(self, rank: int, pid: int) -> None:
        # WNOWAIT leaves the process to be reaped by the main thread, so that no signal goes to a recycled pid.
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        self._events.put(rank)

    def _forward(self, number: signal.Signals) -> None:
        for process in self._running.values():
            os.kill(process.pid, number)
        if number == signal.SIGUSR1:
            return
        for rank, lives in enumerate(self._lives):
            if lives.stop():
                _write(2, b"rank %d: restart cancelled, asked to stop\n" % rank)

    def _reap(self, rank: int) -> None:
        status = self._running.pop(rank).wait()
        if status >= 0:
            self._end(rank, status, f"exited with status {status}")
        else:
            self._end(rank, 128 - status, f"was killed by {_signal_name(-status)}")

    def _end(self, rank: int, status: int, how: str) -> None:
        outlook = self._lives[rank].end(status)
        if status != 0:
            _write(2, f"rank {rank} {how}{outlook}\n".encode())


def main(arguments: list[str]) -> int:
    """The command line; returns the status to exit with."""
    own, command = _split_at_dashes(arguments)
    parser = ArgumentParser(
        prog="python -m runtime.launch",
        usage="%(prog)s --ranks N [OPTION ...] -- SCRIPT.py [ARGUMENT ...]",
        description=__doc__.splitlines()[0],
    )
    parser.add_argument("--ranks", type=int, required=True, metavar="N", help="processes to start on this host")
    parser.add_argument(
        "--threads_per_rank",
        type=int,
        metavar="N",
        help="OMP_NUM_THREADS of each (default: OMP_NUM_THREADS if set, else cores / ranks)",
    )
    parser.add_argument(
        "--max_restarts",
        type=int,
        default=RestartPolicy.max_restarts,
        metavar="N",
        help="restarts in a row of a rank that dies, before it is given up; 0: none (default: %(default)s)",
    )
    parser.add_argument(
        "--healthy_seconds",
        type=float,
        default=RestartPolicy.healthy_seconds,
        metavar="N",
        help="a process that ran for so long is not counted as in a row with those before (default: %(default)g)",
    )
    parser.add_argument(
        "--restart_seconds",
        type=float,
        default=RestartPolicy.restart_seconds,
        metavar="N",
        help=f"longest pause before a first restart, doubled at each up to {LONGEST_PAUSE:g} (default: %(default)g)",
    )
    options = parser.parse_args(normalise_flags(own))
    threads = default_threads(options.ranks) if options.threads_per_rank is None else options.threads_per_rank
    policy = RestartPolicy(options.max_restarts, options.healthy_seconds, options.restart_seconds)
    for name, value, least in (
        ("--ranks", options.ranks, 1),
        ("--threads_per_rank", threads, 1),
        ("--max_restarts", policy.max_restarts, 0),
        ("--healthy_seconds", policy.healthy_seconds, 0),
        ("--restart_seconds", policy.restart_seconds, 0),
    ):
        if not value >= least:  # so that NaN fails too
            raise UserError(f"expected {name} of at least {least}, got {value}: raise it")
    if not command or not Path(command[0]).is_file():
        got = repr(command[0]) if command else "nothing"
        raise UserError(f"expected a Python script after --, got {got}: check the path")
    return Launcher([sys.executable, *command], options.ranks, threads, policy).run()


def _split_at_dashes(arguments: list[str]) -> tuple[list[str], list[str]]:
    middle = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:middle], arguments[middle + 1 :]


def default_threads(ranks: int) -> int:
    """OMP_NUM_THREADS if the user set it to a number, else an equal share of the cores, at least 1."""
    chosen = os.environ.get("OMP_NUM_THREADS", "")
    return int(chosen) if chosen.isdecimal() else max(1, usable_cores() // max(1, ranks))


def usable_cores() -> int:
    """Cores that this process may use: its affinity, and its cgroup's quota where that is less."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except OSError:  # no cgroup v2, or none with a limit
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def rank_environment(rank: int, ranks: int, threads_per_rank: int, restarts: int = 0) -> dict[str, str]:
    """What tells a process who it is, in torchrun's names, when all ranks are on this host.

    restarts: processes of this rank before it.
    """
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "TORCHELASTIC_RESTART_COUNT": str(restarts),
        "OMP_NUM_THREADS": str(threads_per_rank),
    }


def exit_status(failures: list[int]) -> int:
    """One status for all, from those of the lost ranks in the order of their ends."""
    return 2 if 2 in failures else next(iter(failures), 0)


def _relay(rank: int, source: BinaryIO, sink: int, news: RepeatFilter | None) -> None:
    with source:
        while line := source.readline(LONGEST_LINE):
            line = line.rstrip(b"\r\n")
            if news is None or news.is_news(rank, line):
                _write(sink, b"[rank %d] %s\n" % (rank, line))


def _write(sink: int, content: bytes) -> None:
    # One write a line keeps lines whole. A reader who went away must not stop the draining of the ranks' pipes.
    try:
        os.write(sink, content)
    except OSError:
        return


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal has no name of its own
        return f"signal {number}"


if __name__ == "__main__":
    run_main(main)
