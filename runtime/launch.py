"""Starts the ranks of this host as independent processes, passes signals on, and tells the truth about their ends.

    python -m runtime.launch --ranks 4 -- train.py --data corpus.txt --output run

Each rank is a process in a session of its own: Ctrl-C reaches it once, through the launcher, and nobody else's death
reaches it at all. Rank 0 keeps the terminal; lines of the others come marked, and said once though all say them.
"""

import collections
import os
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import BinaryIO

from runtime.arguments import ArgumentParser, normalise_flags, run_main
from runtime.errors import UserError

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
    """`ranks` processes of one command, watched from the main thread until the last has ended."""

    def __init__(self, command: list[str], ranks: int, threads_per_rank: int) -> None:
        self._command = command
        self._ranks = ranks
        self._threads_per_rank = threads_per_rank
        self._running: dict[int, subprocess.Popen] = {}
        self._relays: list[threading.Thread] = []
        self._errors = RepeatFilter()
        self._statuses: list[int] = []  # of failed ranks, in the order of their ends
        # Signal handlers and waiting threads only put things here; the main thread alone acts on them.
        self._events: queue.SimpleQueue[signal.Signals | int] = queue.SimpleQueue()

    def run(self) -> int:
        """Start all ranks, wait for their ends, and return the status to exit with.

        0 if every rank exited with 0, 2 if any exited with 2, else that of the first to fail (128 + signal).
        """
        for number in FORWARDED:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup
            signal.signal(number, lambda received, _: self._events.put(signal.Signals(received)))
        for rank in range(self._ranks):
            self._start(rank)
        while self._running:
            event = self._events.get()
            if isinstance(event, signal.Signals):
                for process in self._running.values():
                    os.kill(process.pid, FORWARDED[event])
            else:
                self._end(event)
        for relay in self._relays:
            relay.join(DRAIN_SECONDS)  # a process that a rank left behind may hold the pipe for ever
        return exit_status(self._statuses)

    def _start(self, rank: int) -> None:
        pipe = None if rank == 0 else subprocess.PIPE
        try:
            process = subprocess.Popen(
                self._command,
                env={**os.environ, **rank_environment(rank, self._ranks, self._threads_per_rank)},
                stdin=subprocess.DEVNULL,
                stdout=pipe,
                stderr=pipe,
                start_new_session=True,
            )
        except OSError as error:
            self._fail(rank, f"could not be started: {error}", 126)
            return
        self._running[rank] = process
        threading.Thread(target=self._wait, args=(rank, process.pid), daemon=True).start()
        for source, sink, news in ((process.stdout, 1, None), (process.stderr, 2, self._errors)):
            if source is not None:
                relay = threading.Thread(target=_relay, args=(rank, source, sink, news), daemon=True)
                relay.start()
                self._relays.append(relay)

    def _wait(self, rank: int, pid: int) -> None:
        # WNOWAIT leaves the process to be reaped by the main thread, so that no signal goes to a recycled pid.
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        self._events.put(rank)

    def _end(self, rank: int) -> None:
        status = self._running.pop(rank).wait()
        if status > 0:
            self._fail(rank, f"exited with status {status}", status)
        elif status < 0:
            self._fail(rank, f"was killed by {_signal_name(-status)}", 128 - status)

    def _fail(self, rank: int, how: str, status: int) -> None:
        self._statuses.append(status)
        _write(2, f"rank {rank} {how}\n".encode())


def main(arguments: list[str]) -> int:
    """The command line; returns the status to exit with."""
    own, command = _split_at_dashes(arguments)
    parser = ArgumentParser(
        prog="python -m runtime.launch",
        usage="%(prog)s --ranks N [--threads_per_rank N] -- SCRIPT.py [ARGUMENT ...]",
        description=__doc__.splitlines()[0],
    )
    parser.add_argument("--ranks", type=int, required=True, metavar="N", help="processes to start on this host")
    parser.add_argument(
        "--threads_per_rank",
        type=int,
        metavar="N",
        help="OMP_NUM_THREADS of each (default: OMP_NUM_THREADS if set, else cores / ranks)",
    )
    options = parser.parse_args(normalise_flags(own))
    threads = default_threads(options.ranks) if options.threads_per_rank is None else options.threads_per_rank
    for name, value in (("--ranks", options.ranks), ("--threads_per_rank", threads)):
        if value < 1:
            raise UserError(f"expected {name} of at least 1, got {value}: raise it")
    if not command or not Path(command[0]).is_file():
        got = repr(command[0]) if command else "nothing"
        raise UserError(f"expected a Python script after --, got {got}: check the path")
    return Launcher([sys.executable, *command], options.ranks, threads).run()


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


def rank_environment(rank: int, ranks: int, threads_per_rank: int) -> dict[str, str]:
    """What tells a process who it is, in torchrun's names, when all ranks are on this host."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "OMP_NUM_THREADS": str(threads_per_rank),
    }


def exit_status(failures: list[int]) -> int:
    """One status for all, from those of the failed ranks in the order of their ends."""
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
