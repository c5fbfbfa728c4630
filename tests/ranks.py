"""Ranks as real train.py processes of their own, which a test starts, hurts and watches through their files."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.conftest import TINY
from training.checkpoint import CheckpointFile, list_checkpoints

ROOT = Path(__file__).parents[1]
HEARTBEAT_SECONDS = 0.2
LIVENESS_SECONDS = 2.0
FLAGS = [*TINY, "--gossip_heartbeat", str(HEARTBEAT_SECONDS), "--gossip_liveness", str(LIVENESS_SECONDS),
         "--gossip_host", "127.0.0.1", "--gossip_fitness_decay", "0.5", "--val_every", "0"]  # fmt: skip
PATIENCE = 120.0  # seconds, on a crowded machine, before a test gives up
_STEP = re.compile(r"^\S+ \S+ step +(\d+) ", re.MULTILINE)


def eventually(condition: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """The first true value of `condition()`, asked again and again; an AssertionError after `seconds` without one."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"did not come true within {seconds:g} s"
        time.sleep(0.02)
    return value


def clean_environment() -> dict[str, str]:
    """This process's environment without what would tell a rank who it is."""
    foreign = ("SLURM_", "GRUBOROS_", "TORCHELASTIC_")
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign) and name not in names}
    return {**kept, "OMP_NUM_THREADS": "1"}


class World:
    """One run of `size` ranks in `cwd`, where its logs lie too. `run` is its run directory, an absolute path."""

    def __init__(self, cwd: Path, text: Path, size: int, *flags: str, run: str = "run") -> None:
        self.cwd = cwd
        self.run = cwd / run
        self.size = size
        self.processes: dict[int, subprocess.Popen] = {}
        self._started: list[subprocess.Popen] = []
        self._errors: dict[int, Path] = {}
        self.command = [str(ROOT / "train.py"), *FLAGS, "--data", str(text), *flags]

    def start(
        self, rank: int, *flags: str, prefix: Sequence[str] = (), restarts: int = 0, resume: bool = False
    ) -> subprocess.Popen:
        """Start rank `rank`; prefix: words before the command (strace ...); restarts: as its launcher counts them.

        What it says on standard error is said(process) from then on. An older process of the rank goes on, unnamed.
        """
        who = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.size, "LOCAL_WORLD_SIZE": self.size}
        environment = clean_environment() | {name: str(value) for name, value in who.items()}
        if restarts:
            environment["TORCHELASTIC_RESTART_COUNT"] = str(restarts)
        place = ["--resume" if resume else "--output", str(self.run)]
        with open(self.cwd / f"errors_{rank}_{len(self._started)}", "w") as errors:
            process = subprocess.Popen(
                [*prefix, sys.executable, *self.command, *place, *flags],
                cwd=self.cwd, env=environment, stdin=subprocess.DEVNULL, stderr=errors, start_new_session=True,
            )  # fmt: skip
        self.processes[rank] = process
        self._started.append(process)
        self._errors[process.pid] = Path(errors.name)
        return process

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to a rank, and to whatever was put before it."""
        os.killpg(self.processes[rank].pid, number)

    def kill(self, rank: int) -> None:
        """End a rank with SIGKILL."""
        self.signal(rank, signal.SIGKILL)
        self.processes.pop(rank).wait()

    def stop(self, rank: int) -> None:
        """Ask a rank to save and leave, which it must do with status 0."""
        process = self.processes[rank]
        self.signal(rank, signal.SIGTERM)
        assert self.ended(rank) == 0, self.said(process)

    def ended(self, rank: int, seconds: float = PATIENCE) -> int:
        """Wait for the end of a rank that is about to end by itself; its exit status."""
        return self.processes.pop(rank).wait(timeout=seconds)

    def said(self, process: subprocess.Popen) -> str:
        """What a process said on standard error."""
        return self._errors[process.pid].read_text()

    def close(self) -> None:
        """Kill every process that still runs."""
        for process in self._started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def eventually(self, condition: Callable[[], Any], seconds: float = PATIENCE) -> Any:
        """eventually(), as long as no rank that should be running has ended."""

        def asked() -> Any:
            for rank, process in self.processes.items():
                assert process.poll() is None, f"rank {rank} ended with {process.returncode}: {self.said(process)}"
            return condition()

        return eventually(asked, seconds)

    def save(self, rank: int) -> Path:
        """Ask a rank for a checkpoint; its path, once it is there."""
        before = {file.path for file in self.checkpoints(rank)}
        os.kill(self.pid(rank), signal.SIGUSR1)
        (new,) = self.eventually(lambda: {file.path for file in self.checkpoints(rank)} - before)
        return new

    def pid(self, rank: int) -> int:
        """The process that is a rank, without what was put before it, as it says itself in the registry."""
        return self.entry(rank)["pid"]

    def checkpoints(self, rank: int | None = None) -> list[CheckpointFile]:
        """The run's checkpoints, or a rank's; oldest first."""
        return [file for file in list_checkpoints(self.run) if rank in (None, file.rank)]

    def temporaries(self) -> list[str]:
        """Names of temporary files beside the checkpoints."""
        return sorted(name for name in os.listdir(self.run) if name.endswith(".tmp"))

    def entry(self, rank: int) -> dict[str, Any]:
        """What a rank published last; {} before its first time."""
        path = self.run / "population" / f"rank_{rank:04d}.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def ranking(self) -> dict[str, Any]:
        """The leader's newest fold of all entries; {} before the first."""
        path = self.run / "population" / "ranking.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def live(self) -> list[int]:
        """The ranks that live as the leader knows them."""
        return self.ranking().get("live", [])

    def log(self, rank: int) -> str:
        """A rank's log, of all its processes; "" before its first line."""
        path = self.cwd / "logs" / f"train_{self.run.name}_rank_{rank:04d}.log"
        return path.read_text() if path.exists() else ""

    def step(self, rank: int) -> int:
        """The last step that a rank's log tells of."""
        return int((_STEP.findall(self.log(rank)) or ["0"])[-1])

    def events(self, rank: int, *kinds: str) -> list[dict[str, str]]:
        """A rank's gossip events, of all its processes, oldest first; kinds: only these."""
        return [row for row in _table(self.cwd / "gossip_logs" / f"{self.run.name}_rank_{rank:04d}.tsv")
                if row["event"] in kinds or not kinds]  # fmt: skip

    def lineage(self, rank: int) -> int:
        """Optimizer steps behind a rank's weights, as its metrics tell; 0 before their first row."""
        return int(([row["lineage"] for row in self.metrics(rank)] or ["0"])[-1])

    def metrics(self, rank: int) -> list[dict[str, str]]:
        """The rows of a rank's metrics, oldest first."""
        return _table(self.run / "metrics" / f"rank_{rank:04d}.tsv")

    def goes_on(self, rank: int, steps: int = 20) -> None:
        """Wait until a rank has trained `steps` more."""
        goal = self.step(rank) + steps
        self.eventually(lambda: self.step(rank) >= goal)


def _table(path: Path) -> list[dict[str, str]]:
    """Rows of a TSV file that another process appends to: a line without its end is left for the next time."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]
    return list(csv.DictReader(lines, delimiter="\t"))
