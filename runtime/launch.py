"""Starts the ranks of this host as independent processes, restarts those that die, and tells the truth in the end.

    python -m runtime.launch --ranks 4 -- train.py --data corpus.txt --output run

Each rank is a process in a session of its own: Ctrl-C reaches it once, through the launcher, and nobody else's death
reaches it at all. Rank 0 keeps the terminal; lines of the others come marked, and said once though all say them.

A rank that dies, by its own fault or killed, is started again alone after a pause, but not if its first process ended
with status 2 (a user's mistake), nor if another process took its place, nor once the launcher was asked to stop. One
that dies again and again is given up, and the others go on.

    srun python -m runtime.launch --task -- train.py --data corpus.txt --output run

With --task the launcher keeps the one rank that the environment tells it to be: that of a task of Slurm.

Should the launcher itself be killed, its ranks save and leave: nobody would restart them, nor end them.
"""

import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

from runtime.arguments import ArgumentParser, as_argument, normalise_flags, run_main, whole
from runtime.errors import UserError
from runtime.locality import bound, format_cores, parse_cores
from runtime.ranks import BEGAN, LAUNCHER, Identity, identity_from_environment
from runtime.relay import RepeatFilter, Teller, relay
from runtime.signals import signal_when_parent_dies
from runtime.supervise import LONGEST_PAUSE, USER_ERROR, Lives, RestartPolicy

# What the launcher is sent -> what each rank is sent. A closed terminal asks the ranks to save and leave.
FORWARDED = {
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGUSR2: signal.SIGUSR2,
    signal.SIGHUP: signal.SIGTERM,
}
# Depending on how a cluster tracks processes, Slurm's signals reach the launcher and its rank, or the launcher alone.
# So a task's launcher passes on what a rank takes any number of times; Slurm itself ends who does not leave.
FORWARDED_IN_TASK = {number: signal.SIGUSR1 if number == signal.SIGUSR1 else signal.SIGUSR2 for number in FORWARDED}
DRAIN_SECONDS = 5.0
GATHER_SECONDS = 1.0  # a user's mistake ends all ranks at about one time, and one line tells of them


class Launcher:
    """A process of one command for each identity, watched from the main thread until none runs and none is to start.

    cores: those of each rank, in turns; empty: those of the launcher. forwarded: what is sent on, by what is received.
    """

    def __init__(
        self,
        command: list[str],
        identities: list[Identity],
        threads_per_rank: int,
        policy: RestartPolicy,
        cores: list[set[int]] | None = None,
        forwarded: dict[signal.Signals, signal.Signals] = FORWARDED,
    ) -> None:
        self._command = command
        self._identities = identities
        self._threads_per_rank = threads_per_rank
        self._cores = cores or [None]
        self._forwarded = forwarded
        self._lives = [Lives(policy) for _ in identities]
        self._running: dict[int, subprocess.Popen] = {}
        self._relays: list[threading.Thread] = []
        self._errors = RepeatFilter()
        self._teller = Teller(2)
        self._mistaken: list[int] = []  # ranks that ended by a user's mistake, of which nothing was said yet
        self._tell_at = math.inf
        # Other threads only put things here; the main thread alone acts on them.
        self._events: queue.SimpleQueue[signal.Signals | int] = queue.SimpleQueue()

    def run(self) -> int:
        """Start all ranks, keep them running until each has ended or was given up, and return the status to exit with.

        0 if every rank's last process exited with 0, 2 if any exited with 2, else that of the first rank to be lost
        (128 + signal).
        """
        self._listen()
        for place in range(len(self._lives)):
            self._start(place)
        while self._running or self._next_start() < math.inf:
            try:
                event = self._events.get(timeout=self._seconds_to_wait())
            except queue.Empty:
                self._start_due()
                if self._tell_at <= time.monotonic():
                    self._tell_of_mistakes()
                continue
            if isinstance(event, signal.Signals):
                self._forward(self._forwarded[event])
            else:
                self._reap(event)
        drained = time.monotonic() + DRAIN_SECONDS
        for thread in self._relays:  # a process that a rank left behind may hold the pipe for ever
            thread.join(max(0.0, drained - time.monotonic()))
        self._tell_of_mistakes()
        self._teller.close(DRAIN_SECONDS)
        in_order = sorted(self._lives, key=lambda lives: lives.ended)
        return exit_status([lives.status for lives in in_order if lives.status != 0])

    def _listen(self) -> None:
        # A handler in Python would run in the main thread: after its next event, if it was just about to wait for one.
        received, told = os.pipe()
        os.set_blocking(told, False)
        signal.set_wakeup_fd(told)
        for number in self._forwarded:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, lambda *_: None)

        def listen() -> None:
            while True:
                self._events.put(signal.Signals(*os.read(received, 1)))

        threading.Thread(target=listen, daemon=True).start()

    def _next_start(self) -> float:
        return min((lives.due for lives in self._lives if lives.due is not None), default=math.inf)

    def _seconds_to_wait(self) -> float | None:
        seconds = min(self._next_start(), self._tell_at) - time.monotonic()
        return None if seconds == math.inf else max(0.0, seconds)

    def _start_due(self) -> None:
        for place, lives in enumerate(self._lives):
            if lives.due is not None and lives.due <= time.monotonic():
                self._start(place)

    def _start(self, place: int) -> None:
        pipe = None if place == 0 else subprocess.PIPE
        rank, lives = self._identities[place].rank, self._lives[place]
        lives.begin()
        identity = replace(
            self._identities[place], restarts=lives.restarts, launcher=os.getpid(), began=lives.first_began
        )
        told = rank_environment(identity, self._threads_per_rank)
        try:
            with bound(self._cores[place % len(self._cores)]):
                process = subprocess.Popen(
                    self._command,
                    env={**os.environ, **told},
                    stdin=subprocess.DEVNULL,
                    stdout=pipe,
                    stderr=pipe,
                    start_new_session=True,
                )
        except OSError as error:
            self._end(place, 126, f"could not be started: {error}")
            return
        self._running[place] = process
        threading.Thread(target=self._wait, args=(place, process.pid), daemon=True).start()
        self._relays = [thread for thread in self._relays if thread.is_alive()]
        for source, sink, news in ((process.stdout, 1, None), (process.stderr, 2, self._errors)):
            if source is not None:
                thread = threading.Thread(target=relay, args=(rank, source, sink, news), daemon=True)
                thread.start()
                self._relays.append(thread)

    def _wait(self, place: int, pid: int) -> None:
        # WNOWAIT leaves the process to be reaped by the main thread, so that no signal goes to a recycled pid.
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        self._events.put(place)

    def _forward(self, number: signal.Signals) -> None:
        for process in self._running.values():
            os.kill(process.pid, number)
        if number == signal.SIGUSR1:
            return
        for identity, lives in zip(self._identities, self._lives, strict=True):
            if lives.stop():
                self._teller.tell(f"rank {identity.rank}: restart cancelled, asked to stop")

    def _reap(self, place: int) -> None:
        status = self._running.pop(place).wait()
        if status >= 0:
            self._end(place, status, f"exited with status {status}")
        else:
            self._end(place, 128 - status, f"was killed by {_signal_name(-status)}")

    def _end(self, place: int, status: int, how: str) -> None:
        outlook = self._lives[place].end(status)
        rank = self._identities[place].rank
        if self._lives[place].mistaken:
            self._mistaken.append(rank)
            self._tell_at = min(self._tell_at, time.monotonic() + GATHER_SECONDS)
        elif status != 0:
            self._teller.tell(f"rank {rank} {how}{outlook}")

    def _tell_of_mistakes(self) -> None:
        if self._mistaken:
            who = f"rank{'s' * (len(self._mistaken) > 1)} {', '.join(map(str, sorted(self._mistaken)))}"
            self._teller.tell(f"{who} exited with status {USER_ERROR}: not restarted, since that would not help")
        self._mistaken, self._tell_at = [], math.inf


def main(arguments: list[str]) -> int:
    """The command line; returns the status to exit with."""
    own, command = _split_at_dashes(arguments)
    parser = ArgumentParser(
        prog="python -m runtime.launch",
        usage="%(prog)s (--ranks N | --task) [OPTION ...] -- SCRIPT.py [ARGUMENT ...]",
        description=__doc__.splitlines()[0],
    )
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--ranks", type=as_argument(whole(1)), metavar="N", help="processes to start on this host")
    who.add_argument("--task", action="store_true", help="one process: the rank that the environment tells of")
    parser.add_argument(
        "--cores", nargs="+", action="extend", type=as_argument(parse_cores), metavar="LIST",
        help="cores of each rank, as 0-7 8-15 (default: any)",
    )  # fmt: skip
    parser.add_argument(
        "--threads_per_rank",
        type=as_argument(whole(1)),
        metavar="N",
        help="OMP_NUM_THREADS of each (default: OMP_NUM_THREADS if set, else cores / ranks)",
    )
    parser.add_argument(
        "--max_restarts",
        type=as_argument(whole(0)),
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
    parser.add_argument(
        "--follow",
        type=as_argument(whole(1)),
        metavar="PID",
        help="stop, as by SIGTERM, when this process dies, which started the launcher",
    )
    if not command and any(word.endswith(".py") for word in own):
        raise UserError("expected -- before the script and its flags, got none: write ... -- train.py ...")
    options = parser.parse_args(normalise_flags(own))
    ranks = 1 if options.task else options.ranks
    threads = default_threads(ranks) if options.threads_per_rank is None else options.threads_per_rank
    policy = RestartPolicy(options.max_restarts, options.healthy_seconds, options.restart_seconds)
    for name, value, least in (
        ("--healthy_seconds", policy.healthy_seconds, 0),
        ("--restart_seconds", policy.restart_seconds, 0),
    ):
        if not value >= least:  # so that NaN fails too
            raise UserError(f"expected {name} of at least {least}, got {value}: raise it")
    if not command or not os.path.isfile(command[0]):
        got = repr(command[0]) if command else "nothing"
        raise UserError(f"expected a Python script after --, got {got}: check the path")
    usable = os.sched_getaffinity(0)
    for cores in options.cores or ():
        if not cores & usable:
            raise UserError(
                f"expected --cores among those that this process may use, {format_cores(usable)}, got "
                f"{format_cores(cores)}: correct them"
            )
    if options.follow is not None and not signal_when_parent_dies(signal.SIGTERM, options.follow):
        raise UserError(
            f"expected --follow with the process that started this one, got {options.follow}: start it there"
        )
    if options.task:
        identities, forwarded = [identity_from_environment(os.environ)], FORWARDED_IN_TASK
    else:
        identities, forwarded = [Identity(rank, rank, ranks, ranks, "launcher") for rank in range(ranks)], FORWARDED
    return Launcher([sys.executable, *command], identities, threads, policy, options.cores, forwarded).run()


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


def rank_environment(identity: Identity, threads_per_rank: int) -> dict[str, str]:
    """What tells a process who it is, in torchrun's names and, of its launcher, in some of its own."""
    told = {
        "RANK": str(identity.rank),
        "LOCAL_RANK": str(identity.local_rank),
        "WORLD_SIZE": str(identity.world_size),
        "LOCAL_WORLD_SIZE": str(identity.local_world_size or ""),  # "": not known
        "TORCHELASTIC_RESTART_COUNT": str(identity.restarts),
        "OMP_NUM_THREADS": str(threads_per_rank),
    }
    own = {LAUNCHER: identity.launcher, BEGAN: identity.began}
    return told | {name: str(value) for name, value in own.items() if value is not None}


def exit_status(failures: list[int]) -> int:
    """One status for all, from those of the lost ranks in the order of their ends."""
    return 2 if 2 in failures else next(iter(failures), 0)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal has no name of its own
        return f"signal {number}"


if __name__ == "__main__":
    run_main(main)
