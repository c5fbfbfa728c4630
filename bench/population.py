"""Whole populations for the benches: started under the launcher, watched through their files, and ended for certain."""

import contextlib
import csv
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType

from bench.witness import Board, board_of
from gossip.registry import rank_files, read_entry
from runtime.errors import UserError

ROOT = Path(__file__).parents[1]
CORPUS = ROOT / "corpus" / "bench.txt"
WITNESSED = ROOT / "bench" / "witness.py"  # train.py's flags, and its conduct seen
PROCESS_BYTES = 350 * 10**6  # resident, of a rank with a tiny model
START_SECONDS = 300.0  # for all ranks to begin training, on a crowded machine
STOP_SECONDS = 300.0  # for all ranks to save and leave, on a crowded machine

# The smallest model that still learns, and signs of life that come as often as faults do.
TINY = ("--cpu", "--dim", "32", "--depth", "2", "--batch_size", "4", "--chunk_size", "128", "--val_every", "0",
        "--gossip_host", "127.0.0.1", "--gossip_heartbeat", "1", "--gossip_liveness", "10")  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """What a process said of itself in the registry; seconds: when it was read, on time.monotonic."""

    seconds: float
    sequence: int
    step: int
    bytes_seen: int
    cpu_s: float


class Population:
    """`ranks` processes of a script under the launcher, one thread each, in a folder of their own.

    As a context it is started on entry, and every process has ended on exit. Should this process die, or the thread
    that entered, the ranks save and leave. script: one that takes train.py's flags.
    """

    def __init__(self, name: str, cwd: Path, ranks: int, script: Path, flags: Sequence[str]) -> None:
        self.name = name
        self.cwd = cwd
        self.ranks = ranks
        self.run_dir = cwd / "run"
        self.registry = self.run_dir / "population"
        self.status: int | None = None  # the launcher's, once it has ended
        self.cpu_seconds = 0.0  # of all its processes, once it has ended
        launcher = ["-m", "runtime.launch", "--ranks", str(ranks), "--threads_per_rank", "1", "--max_restarts", "1000",
                    "--follow", str(os.getpid())]  # fmt: skip
        self._command = [sys.executable, *launcher, "--", str(script), *flags, "--output", "run"]
        self._launcher: subprocess.Popen | None = None

    def __enter__(self) -> "Population":
        self.cwd.mkdir(parents=True, exist_ok=True)
        foreign = ("SLURM_", "GRUBOROS_")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        with open(self.cwd / "output", "wb") as output:
            self._launcher = subprocess.Popen(
                self._command, cwd=self.cwd, env={**environment, "PYTHONPATH": str(ROOT)}, stdin=subprocess.DEVNULL,
                stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._launcher is not None and self.status is None:
            self.ask_to_stop()
            self.stop()

    @property
    def output(self) -> str:
        """What the launcher and its ranks said."""
        return (self.cwd / "output").read_text(errors="replace")

    def processes(self) -> dict[int, int]:
        """The process id of each rank that has one now."""
        found = {}
        for task in Path(f"/proc/{self._launcher.pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):  # a thread of the launcher has just ended
                for pid in map(int, task.read_text().split()):
                    rank = _rank_of(pid)
                    if rank is not None:
                        found[rank] = pid
        return found

    def process(self, rank: int) -> int:
        """The process id of a rank, once it has one. Raises UserError if that takes too long."""
        deadline = time.monotonic() + START_SECONDS
        while (pid := self.processes().get(rank)) is None:
            if self.ended() or time.monotonic() > deadline:
                raise UserError(f"expected rank {rank} to run, got:\n{self.output[-4000:]}")
            time.sleep(0.05)
        return pid

    def ended(self) -> bool:
        """True once the launcher has ended, by itself even."""
        return os.waitid(os.P_PID, self._launcher.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def wait_until_trained(self) -> None:
        """Wait until every rank has logged a loss. Raises UserError if that takes too long, or the launcher ends."""
        deadline = time.monotonic() + START_SECONDS
        while not all(self._has_logged_a_loss(rank) for rank in range(self.ranks)):
            if self.ended() or time.monotonic() > deadline:
                raise UserError(f"expected {self.ranks} ranks to train, got:\n{self.output[-4000:]}")
            time.sleep(0.2)

    def _has_logged_a_loss(self, rank: int) -> bool:
        return self.log(rank).exists() and "  loss " in self.log(rank).read_text(errors="replace")

    def board(self, rank: int) -> Board:
        """The rank's board."""
        return board_of(self.cwd, rank)

    def log(self, rank: int) -> Path:
        """The rank's log."""
        return self.cwd / "logs" / f"train_run_rank_{rank:04d}.log"

    def events(self) -> list[dict[str, str]]:
        """Every whole line of every rank's gossip log, `seconds` (Unix time) added."""
        rows = []
        for path in sorted((self.cwd / "gossip_logs").glob("run_rank_*.tsv")):
            with open(path, newline="", errors="replace") as file:
                for row in csv.DictReader(file, delimiter="\t"):
                    if None not in row and None not in row.values():
                        rows.append(row | {"seconds": _unix_time(row["timestamp"])})
        return rows

    def ask_to_stop(self) -> None:
        """Let every rank, a paused one too, save and leave; returns at once."""
        for pid in self.processes().values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        os.kill(self._launcher.pid, signal.SIGTERM)

    def stop(self) -> None:
        """After ask_to_stop(): wait until every rank has left; kill those that do not in time."""
        deadline = time.monotonic() + STOP_SECONDS
        while not self.ended() and time.monotonic() < deadline:
            time.sleep(0.05)
        for pid in () if self.ended() else (self._launcher.pid, *self.processes().values()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _, status, usage = os.wait4(self._launcher.pid, 0)
        self.status = self._launcher.returncode = os.waitstatus_to_exitcode(status)
        self.cpu_seconds = usage.ru_utime + usage.ru_stime


class Watch:
    """Reads a population's registry now and then, and remembers what each process (not: each rank) said of itself."""

    def __init__(self, population: Population) -> None:
        self._population = population
        self.lives: dict[tuple[int, str], list[Sample]] = {}  # by rank and incarnation
        self.ranking_seconds = 0.0  # the longest time that the leader's file has stood still
        self._ranking_from = time.time()

    def look(self) -> None:
        """Take a sample of every rank whose file is whole now."""
        for rank, path in rank_files(self._population.registry):
            try:
                entry = read_entry(rank, path)
            except (OSError, ValueError):  # a fault has written something else there
                continue
            if rank >= self._population.ranks or entry.get("cpu_s") is None:
                continue
            samples = self.lives.setdefault((rank, entry["incarnation"]), [])
            if not samples or entry["sequence"] > samples[-1].sequence:
                numbers = (entry[name] for name in ("sequence", "step", "bytes_seen", "cpu_s"))
                samples.append(Sample(time.monotonic(), *numbers))
        with contextlib.suppress(FileNotFoundError):
            self._ranking_from = max(self._ranking_from, (self._population.registry / "ranking.json").stat().st_mtime)
        self.ranking_seconds = max(self.ranking_seconds, time.time() - self._ranking_from)

    def trained(self, begin: float, end: float, without: Collection[int] = ()) -> tuple[int, float]:
        """Bytes trained on, and CPU-seconds of the training threads, from `begin` to `end`, by all ranks but `without`.

        Of each process the difference between two samples: the last one until `begin`, else its first, and the last
        one until `end`. So what a process does before its first sample (start-up) and after its last is in neither.
        """
        lives = (samples for (rank, _), samples in self.lives.items() if rank not in without)
        spans = [span for samples in lives if (span := _span(samples, begin, end))]
        return sum(b.bytes_seen - a.bytes_seen for a, b in spans), sum(b.cpu_s - a.cpu_s for a, b in spans)

    def living(self, begin: float, end: float) -> set[int]:
        """The ranks that trained a step in that time."""
        spans = ((rank, _span(samples, begin, end)) for (rank, _), samples in self.lives.items())
        return {rank for rank, span in spans if span and span[1].step > span[0].step}


def _span(samples: list[Sample], begin: float, end: float) -> tuple[Sample, Sample] | None:
    until_end = [sample for sample in samples if sample.seconds <= end]
    if not until_end or until_end[-1].seconds <= begin:
        return None
    until_begin = [sample for sample in until_end if sample.seconds <= begin]
    return (until_begin or until_end)[-1 if until_begin else 0], until_end[-1]


def _rank_of(pid: int) -> int | None:
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # it has just ended
        return None
    match = re.search(rb"(?:^|\0)RANK=(\d+)\0", environment)
    return int(match[1]) if match else None


def _unix_time(stamp: str) -> float:
    return datetime.fromisoformat(stamp.replace("Z", "+00:00")).timestamp()


def kill(pid: int) -> None:
    """SIGKILL, and wait until the process is dead."""
    descriptor = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        select.select([descriptor], [], [])
    finally:
        os.close(descriptor)


def make_corpus() -> Path:
    """4 MiB of the Python standard library's sources, made where they are not there yet."""
    if not CORPUS.exists():
        command = [sys.executable, "prepare_data.py", "--python_stdlib", "--max_bytes", "4m", "--output", str(CORPUS)]
        subprocess.run(command, cwd=ROOT, check=True)
    return CORPUS


def check_memory(processes: int) -> None:
    """Raise UserError unless so many ranks fit into what memory is free now."""
    text = Path("/proc/meminfo").read_text()
    free = int(re.search(r"MemAvailable: +(\d+) kB", text)[1]) * 1024
    needed = processes * PROCESS_BYTES
    if needed > free:
        raise UserError(
            f"expected {needed / 1e9:.1f} GB of free memory for {processes} processes, got {free / 1e9:.1f}: "
            "lower --ranks"
        )
