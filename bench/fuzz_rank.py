"""One rank of train.py as a process: started with a known secret, asked to leave, and watched through its files."""

import asyncio
import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.population import ROOT, TINY
from gossip.network_utils import parse_peer
from gossip.registry import rank_file, read_entry
from gossip.secret import VARIABLE
from runtime.errors import UserError

PATIENCE = 120.0  # seconds for what must happen soon, on a crowded machine
LOOK_SECONDS = 0.002  # between looks at a file that is about to change
TAIL_BYTES = 4096  # of a file: more than a row


@dataclass(frozen=True)
class Sample:
    """A rank at the moment of a new row of its metrics. seconds: time.monotonic; CPU-seconds since its start.

    received: authenticated calls; failed: conversations that ended by a fault, strangers' included.
    """

    seconds: float
    process_cpu: float
    training_cpu: float
    step: int
    received: int
    failed: int


class Rank:
    """A rank in a folder of its own, on one thread. Its run is called "run", as that of any other: so they are one."""

    def __init__(self, cwd: Path, rank: int, world_size: int, secret: str, data: Path, *flags: str) -> None:
        self.cwd = cwd
        self.rank = rank
        cwd.mkdir(parents=True)
        command = [sys.executable, str(ROOT / "train.py"), *TINY, "--data", str(data), "--output", "run", *flags]
        foreign = ("SLURM_", "GRUBOROS_", "TORCHELASTIC_")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        identity = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        own = {VARIABLE: secret, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in identity.items()}}
        with open(cwd / "output", "wb") as output:
            self._process = subprocess.Popen(
                command, cwd=cwd, env={**inherited, **own}, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        self.pid = self._process.pid

    async def stop(self) -> None:
        """Ask it to save and leave, and wait for that. Raises UserError unless it ends with status 0."""
        self._process.send_signal(signal.SIGTERM)
        await self.until(lambda: self._process.poll() is not None, "to leave", ending=True)
        if self._process.returncode:
            raise UserError(f"expected rank {self.rank} to end with 0, got {self._process.returncode}: {self.output}")

    def kill(self) -> None:
        """End it for certain."""
        self._process.kill()
        self._process.wait()

    async def until(self, condition: Callable[[], Any], what: str, ending: bool = False) -> Any:
        """The first true value of `condition()`. Raises UserError if it takes too long or, unless `ending`, it ends."""
        deadline = time.monotonic() + PATIENCE
        while not (value := condition()):
            if time.monotonic() > deadline or (not ending and self._process.poll() is not None):
                raise UserError(f"expected rank {self.rank} {what}, got: {self.output}")
            await asyncio.sleep(LOOK_SECONDS)
        return value

    @property
    def output(self) -> str:
        """The last that it said."""
        return (self.cwd / "output").read_text(errors="replace")[-4000:]

    @property
    def address(self) -> tuple[str, int] | None:
        """Where it listens, once it has said so."""
        try:
            return parse_peer(read_entry(self.rank, rank_file(self.cwd / "run" / "population", self.rank))["address"])
        except FileNotFoundError:
            return None

    def events(self) -> list[dict[str, str]]:
        """The lines of its gossip log."""
        with open(self.cwd / "gossip_logs" / f"run_rank_{self.rank:04d}.tsv", newline="") as file:
            return list(csv.DictReader(file, delimiter="\t"))

    def metrics(self) -> dict[str, str] | None:
        """The newest whole row of its metrics, once there is one."""
        try:
            with open(self.cwd / "run" / "metrics" / f"rank_{self.rank:04d}.tsv", "rb") as file:
                names = file.readline().decode().rstrip("\n").split("\t")
                start = file.tell()
                file.seek(max(start, file.seek(0, os.SEEK_END) - TAIL_BYTES))
                lines = file.read().decode().split("\n")
        except FileNotFoundError:
            return None
        return dict(zip(names, lines[-2].split("\t"), strict=True)) if len(lines) > 1 else None

    def resources(self) -> dict[str, int]:
        """What it holds now: resident bytes, open descriptors, threads."""
        with open(f"/proc/{self.pid}/statm") as file:
            pages = int(file.read().split()[1])
        folders = (os.listdir(f"/proc/{self.pid}/{name}") for name in ("fd", "task"))
        descriptors, threads = map(len, folders)
        return {"rss": pages * os.sysconf("SC_PAGE_SIZE"), "descriptors": descriptors, "threads": threads}

    async def sample(self) -> Sample:
        """What it has done until its next row of metrics."""
        before = self.metrics()
        row = await self.until(lambda: (row := self.metrics()) != before and row, "to go on training")
        # The CPU-time clock of a whole process, dead threads included: clock_getcpuclockid(3).
        process_cpu = time.clock_gettime((~self.pid << 3) | 2)
        counts = (int(row[name]) for name in ("step", "mixes_received", "failed"))
        return Sample(time.monotonic(), process_cpu, float(row["cpu_s"]), *counts)
