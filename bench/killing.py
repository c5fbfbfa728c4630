"""kill -9 in the middle of saves, merges and transfers: `python -m bench.killing --kills 200`.

Real ranks of small populations die again and again, and go on. After each death the newest whole checkpoint of the rank
is found by its digest; the next process must say in its log that it resumed that one.

A process is a fork of a parent that has imported torch (multiprocessing's forkserver), since the imports would take
most of the time; what runs in it is all of train.py, under witness (bench/witness.py), told of its rank and its restart
by the launcher's variables. The moment: after a random number of steps the bench orders a phase, and on entering it the
next time the process draws when to send itself SIGKILL, evenly over as long as that phase lasted the last time. So some
blows fall just behind the phase's end; the table counts those apart, by what shared memory said at the death, and those
for which the phase did not come in time and the bench killed from outside.

Exits with 1 unless every process resumed, and from the newest whole checkpoint.
"""

import argparse
import contextlib
import dataclasses
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.evidence import RESULTS, newest_whole, resumed_from, write_result
from bench.population import ROOT, check_memory, make_corpus
from bench.witness import PHASES, board_of
from bench.witness import main as train_under_witness
from runtime.arguments import ArgumentParser, normalise_flags, run_main
from runtime.launch import rank_environment
from runtime.ranks import Identity

POLL_SECONDS = 0.005
ORDER_SECONDS = 30.0  # to come to the ordered phase; then the process is killed wherever it is
STEPS_BEFORE = (2, 25)  # of a process, before it gets its order
START_SECONDS = 120.0  # for a process to resume
# A state of 10 MB, saved, sent and merged so often that much of the time goes into it; merges are judged, and none is
# undone, since for a minute after that the peers would not listen to each other.
FLAGS = ("--cpu", "--dim", "128", "--depth", "3", "--batch_size", "2", "--chunk_size", "32", "--val_every", "0",
         "--gossip_host", "127.0.0.1", "--gossip_heartbeat", "0.2", "--gossip_liveness", "5",
         "--gossip_fitness_decay", "0.5", "--gossip_mixing_rate", "0.3", "--gossip_rollback", "9",
         "--save_every", "15", "--output", "run", "--max_minutes", "60")  # fmt: skip


@dataclass
class Blow:
    """One kill: the ordered phase, whether that came in time, whether the rank was in it when it died, whether it left
    a half-written checkpoint, and the names of the newest whole checkpoint then and of the one that was resumed."""

    order: str
    came: bool
    hit: bool
    half_written: bool
    expected: str
    resumed: str | None = None


class Victim:
    """One rank, its processes one after another, and the blows that fell on it. Polled by one thread."""

    def __init__(self, cwd: Path, rank: int, ranks: int, corpus: Path, dice: random.Random) -> None:
        self.blows: list[Blow] = []
        self.process: multiprocessing.process.BaseProcess | None = None
        self._cwd, self._rank, self._ranks, self._corpus, self._dice = cwd, rank, ranks, corpus, dice
        self._log = cwd / "logs" / f"train_run_rank_{rank:04d}.log"
        self._board = board_of(cwd, rank)
        self._resumed = False  # the process said what it began from
        self._steps = 0
        self._deadline = 0.0
        self._order: str | None = None

    def start(self) -> None:
        """Start the rank's next process."""
        self._offset = self._log.stat().st_size if self._log.exists() else 0
        self._resumed, self._order = False, None
        self._deadline = time.monotonic() + START_SECONDS
        arguments = (self._cwd, self._rank, self._ranks, len(self.blows), self._corpus)
        self.process = multiprocessing.get_context("forkserver").Process(target=run_rank, args=arguments)
        self.process.start()

    def poll(self, strike: bool) -> None:
        """See how far the process is: it may get its order (where `strike`), or have died of it, and begins again."""
        if self._order is not None and not self.process.is_alive():
            self._record()
            self.start()
        elif not self.process.is_alive():
            said = (self._cwd / f"output_{self._rank}").read_text(errors="replace")[-3000:]
            raise RuntimeError(
                f"rank {self._rank} in {self._cwd} ended by itself with {self.process.exitcode}:\n{said}"
            )
        elif not self._resumed:
            self._see_resumption()
        elif self._order is None and strike and self._board.boundaries >= self._steps and self._has_saved():
            self._order = self._board.order = self._dice.choice(PHASES)
            self._deadline = time.monotonic() + ORDER_SECONDS
        elif self._order is not None and time.monotonic() > self._deadline:
            self._board.order = None
            self.process.kill()

    @property
    def settled(self) -> bool:
        """No order is out, and the process has resumed."""
        return self._order is None and self._resumed

    def stop(self) -> int:
        """Let the process save and leave; returns its status."""
        os.kill(self.process.pid, signal.SIGTERM)
        self.process.join(START_SECONDS)
        return self.process.exitcode

    def _has_saved(self) -> bool:
        return any((self._cwd / "run").glob(f"checkpoint_rank_{self._rank:04d}_*.pt"))

    def _see_resumption(self) -> None:
        resumed = resumed_from(self._log, self._offset) if self._log.exists() else None
        if resumed is None:
            if time.monotonic() > self._deadline:
                raise RuntimeError(f"rank {self._rank} in {self._cwd} has not begun within {START_SECONDS:.0f} s")
            return
        self._resumed = True
        self._steps = self._board.boundaries + self._dice.randint(*STEPS_BEFORE)
        if self.blows:
            self.blows[-1].resumed = resumed

    def _record(self) -> None:
        run_dir = self._cwd / "run"
        half_written = any(run_dir.glob(f".checkpoint_rank_{self._rank:04d}_*.{self.process.pid}.*.tmp"))
        newest = newest_whole(run_dir, self._rank)
        came = self._board.order is not None
        hit = self._order in self._board.phases
        self.blows.append(Blow(self._order, came, hit, half_written, newest.path.name if newest else ""))


def run_rank(cwd: Path, rank: int, ranks: int, restarts: int, corpus: Path) -> None:
    """The whole life of one process: train.py, as the launcher would have started it."""
    os.setsid()
    os.chdir(cwd)
    # As in any process: the lock that tqdm takes from multiprocessing then leaves nothing behind at a kill.
    multiprocessing.set_start_method("fork", force=True)
    output = os.open(f"output_{rank}", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(rank_environment(Identity(rank, rank, ranks, ranks, "launcher", restarts), 1))
    torch.set_num_threads(1)
    sys.argv = ["train.py", *FLAGS, "--data", str(corpus)]
    run_main(train_under_witness)


def strike(victims: list[Victim], kills: int) -> None:
    """Kill until there are `kills`, and wait until each was gone on from."""
    printed = time.monotonic()
    while True:
        done = sum(len(victim.blows) for victim in victims)
        if done >= kills and all(victim.settled for victim in victims):
            return
        for victim in victims:
            victim.poll(strike=done + sum(not other.settled for other in victims) < kills)
        if time.monotonic() > printed + 30:
            printed = time.monotonic()
            print(f"{done} kills", flush=True)
        time.sleep(POLL_SECONDS)


def table(blows: list[Blow]) -> str:
    """The figures for a person."""
    heads = ("kills", "in it", "just after", "elsewhere", "half-written file", "newest whole", "another", "not resumed")
    lines = [f"{'ordered':10s}" + "".join(f"{head:>18s}" for head in heads)]
    for order in (*PHASES, "all"):
        own = [blow for blow in blows if order in (blow.order, "all")]
        newest = sum(blow.resumed == blow.expected for blow in own)
        unseen = sum(blow.resumed is None for blow in own)
        hit, came = sum(blow.came and blow.hit for blow in own), sum(blow.came for blow in own)
        half = sum(blow.half_written for blow in own)
        counts = (len(own), hit, came - hit, len(own) - came, half, newest, len(own) - newest - unseen, unseen)
        lines.append(f"{order:10s}" + "".join(f"{count:18d}" for count in counts))
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """The command line."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="in all (default: 200)")
    parser.add_argument("--populations", type=int, default=2, help="side by side (default: 2)")
    parser.add_argument("--ranks", type=int, default=3, help="of each population (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="of the steps at which phases are ordered (default: 0)")
    parser.add_argument("--output", type=Path, default=RESULTS / "killing.json", help="figures (default: %(default)s)")
    options = parser.parse_args(normalise_flags(arguments))
    check_memory(options.populations * options.ranks + 1)
    corpus = make_corpus()
    os.environ["PYTHONPATH"] = str(ROOT)  # the forkserver's
    multiprocessing.get_context("forkserver").set_forkserver_preload(["bench.evidence"])
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="killing_") as folder:
        blows, statuses, left = _strike_all(Path(folder), corpus, options)
    print(table(blows))
    resumed = sum(blow.resumed == blow.expected for blow in blows)
    print(f"{resumed} of {len(blows)} resumed from the newest whole checkpoint, in {time.monotonic() - began:.0f} s")
    print(f"{left} half-written files left at the end")
    told = [dataclasses.asdict(blow) for blow in blows]
    shown = {"kills": len(blows), "resumed_from_the_newest_whole": resumed, "half_written_files_left": left}
    write_result(options.output, "killing", {"flags": FLAGS, "shown": shown, "last_statuses": statuses, "log": told})
    return int(resumed < len(blows) or any(statuses) or left > 0)


def _strike_all(folder: Path, corpus: Path, options: argparse.Namespace) -> tuple[list[Blow], list[int], int]:
    """All blows, the statuses of the last processes, and how many half-written files were left."""
    victims = []
    for number in range(options.populations):
        cwd = folder / str(number)
        cwd.mkdir()
        for rank in range(options.ranks):
            dice = random.Random(f"{options.seed} {number} {rank}")
            victims.append(Victim(cwd, rank, options.ranks, corpus, dice))
    try:
        for victim in victims:
            victim.start()
        strike(victims, options.kills)
        statuses = [victim.stop() for victim in victims]
    finally:
        for victim in victims:
            if victim.process is not None:
                with contextlib.suppress(ProcessLookupError):
                    victim.process.kill()
    left = len(list(folder.glob("*/run/.checkpoint_*.tmp")))
    return [blow for victim in victims for blow in victim.blows], statuses, left


if __name__ == "__main__":
    run_main(main)
