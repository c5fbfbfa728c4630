"""Populations of real train.py processes: bringing ranks back to life, and the faults that need more than a signal."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from mingru.minLM import ModelConfig
from tests.ranks import ROOT, World, clean_environment
from training.checkpoint import read_own_checkpoint, save_checkpoint

TALKS = ("merged", "sent", "tied", "averaged")  # how a conversation ends well


class Population(World):
    """Three ranks, of which a test brings the ones that it needs back to life."""

    def gather(self, *ranks: int) -> None:
        """Wait until these live, and run alone: others are killed, and those that do not run are started."""
        for rank in self.processes.keys() - set(ranks):
            self.kill(rank)
        for rank in ranks:
            if rank not in self.processes:
                self.begin(rank)
        self.eventually(lambda: set(ranks) <= set(self.live()))

    def begin(self, rank: int, *flags: str, prefix: tuple[str, ...] = ()) -> subprocess.Popen:
        """Start a rank, again if it was there before, and wait for its first step and its first sign of life."""
        again = self.run.joinpath("metrics", f"rank_{rank:04d}.tsv").exists()
        lines, older = len(self.log(rank)), self.entry(rank).get("pid")
        process = self.start(rank, *flags, prefix=prefix, restarts=int(again))
        self.eventually(lambda: " loss " in self.log(rank)[lines:] and self.pid(rank) != older and rank in self.live())
        for thread in os.listdir(f"/proc/{self.pid(rank)}/task"):
            os.setpriority(os.PRIO_PROCESS, int(thread), 10)  # what is started next shall not have to wait for it
        return process

    def mixes(self, rank: int, times: int = 2, live: list[int] | None = None) -> None:
        """Wait until a rank has had that many more good conversations; live: the ranks that live all the while."""
        goal = len(self.events(rank, *TALKS)) + times

        def done() -> bool:
            assert live is None or self.live() == live
            return len(self.events(rank, *TALKS)) >= goal

        self.eventually(done)

    def adoptions(self, rank: int) -> list[dict[str, str]]:
        """The events by which a rank took an elder's weights whole."""
        return [row for row in self.events(rank, "merged") if "adopts" in row["message"]]


@contextlib.contextmanager
def slowed(world: World, rank: int) -> Iterator[None]:
    """A rank runs a tenth of the time, as long as the block lasts."""
    done = threading.Event()

    def slow() -> None:
        while not done.wait(0.1):
            world.signal(rank, signal.SIGSTOP)
            done.wait(0.9)
            world.signal(rank, signal.SIGCONT)

    thread = threading.Thread(target=slow)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextlib.contextmanager
def poisoned(world: World, good: Path, step: int, change: Callable[[torch.Tensor], object]) -> Iterator[None]:
    """The elite is a copy of `good` with changed weights, named after `step`, as long as the block lasts."""
    content = read_own_checkpoint(good)
    for name, tensor in content["training"]["tensors"].items():
        if not name.startswith("v."):
            change(tensor)
    config = ModelConfig.from_dict(content["model_config"])
    path = save_checkpoint(world.run, 0, step, 0.001, config, content["model_state_dict"], content["training"])
    try:
        world.eventually(lambda: (world.run / "elite_01.pt").resolve() == path)
        yield
    finally:
        path.unlink()


@contextlib.contextmanager
def launched(world: World) -> Iterator[subprocess.Popen]:
    """All ranks of a world under the launcher; none is left after the block."""
    launch = [sys.executable, "-m", "runtime.launch", "--ranks", str(world.size), "--restart_seconds", "0.1", "--"]
    environment = clean_environment() | {"PYTHONPATH": str(ROOT)}
    with open(world.cwd / "errors", "w") as errors:
        launcher = subprocess.Popen(
            [*launch, *world.command, "--output", str(world.run)],
            cwd=world.cwd, env=environment, stdin=subprocess.DEVNULL, stderr=errors,
        )  # fmt: skip
    try:
        yield launcher
    finally:
        launcher.kill()
        launcher.wait()
        for rank in range(world.size):
            with contextlib.suppress(ProcessLookupError):
                os.kill(world.pid(rank), signal.SIGKILL)
