"""What company costs a rank: its process's CPU time a byte in a population over that of ranks that train alone.

Both are real processes of train.py with a thread each and, but for the population's size, the same flags. They train at
the same time on the same cores, so that neighbours and caches are the same for both, more ranks than cores or not.
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bench.population import ROOT, Population, check_memory, make_corpus
from bench.speed.stall import QUICK_SIZE, SIZE
from bench.speed.timing import Row, Setting, Spread
from gossip.registry import rank_file, read_entry

SIZES = (1, 2, 4, 8, 16)
FLAGS = ("--cpu", "--gossip_host", "127.0.0.1", "--gossip_heartbeat", "1", "--save_every", "1g", "--val_every", "0")
SETTLING_SECONDS = 5.0  # after the first losses: peers find each other
SECONDS = 20.0  # that one ratio is taken over
RATIOS = 3
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Mark:
    """What a rank said of itself, and what its process had used when that was read."""

    sequence: int
    bytes_seen: int
    cpu_s: float


@dataclass
class Watched:
    """A population's last marks, by rank."""

    population: Population
    pids: dict[int, int] = field(default_factory=dict)
    marks: dict[int, Mark] = field(default_factory=dict)

    def look(self) -> None:
        """Mark each rank that has said something new."""
        for rank, pid in self.pids.items():
            entry = read_entry(rank, rank_file(self.population.registry, rank))
            known = self.marks.get(rank)
            if entry.get("bytes_seen") and (known is None or entry["sequence"] != known.sequence):
                self.marks[rank] = Mark(entry["sequence"], entry["bytes_seen"], process_seconds(pid))


def measure(setting: Setting) -> Iterator[Row]:
    """By the number of ranks; a population of one shows the noise."""
    seconds, sizes = (5.0, (2,)) if setting.quick else (SECONDS, SIZES)
    size = QUICK_SIZE if setting.quick else SIZE
    flags = [*FLAGS, *size, "--data", str(make_corpus())]
    for ranks in sizes:
        check_memory(2 * ranks)
        setting.tell(f"{ranks} ranks together, {ranks} alone")
        costs = compare(ranks, flags, seconds, setting.times(RATIOS))
        together, alone = (sum(each) / len(each) for each in zip(*costs, strict=True))
        ratio = Spread.of([one / other for one, other in costs])
        case = f"{' '.join(size[:4])}: {ranks} rank{'s' * (ranks > 1)}"
        yield Row(case, together * 1e6, "CPU-us a byte", "alone", alone * 1e6, ratio, None, "times the cost")


def compare(ranks: int, flags: list[str], seconds: float, times: int) -> list[tuple[float, float]]:
    """CPU-seconds a byte in a population of `ranks`, and of as many that are each alone, `times` times in turn."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="overhead_")))
        script = ROOT / "train.py"
        populations = [Population("together", folder / "together", ranks, script, flags)]
        populations += [Population("alone", folder / f"alone_{place}", 1, script, flags) for place in range(ranks)]
        together, *alone = (Watched(stack.enter_context(population)) for population in populations)
        for each in (together, *alone):
            each.population.wait_until_trained()
            each.pids = {rank: each.population.process(rank) for rank in range(each.population.ranks)}
        look_for([together, *alone], SETTLING_SECONDS)
        costs = []
        for _ in range(times):
            before = [dict(each.marks) for each in (together, *alone)]
            look_for([together, *alone], seconds)
            spans = [_span(marks, each.marks) for marks, each in zip(before, (together, *alone), strict=True)]
            costs.append((_cost(spans[:1]), _cost(spans[1:])))
        for each in (together, *alone):  # all at once: stopping them one by one would take long
            each.population.ask_to_stop()
    return costs


def look_for(watched: list[Watched], seconds: float) -> None:
    """Look at all of them again and again for that long, and until each rank has said something."""
    end = time.monotonic() + seconds
    while time.monotonic() < end or any(len(each.marks) < len(each.pids) for each in watched):
        for each in watched:
            each.look()
        time.sleep(POLL_SECONDS)


def process_seconds(pid: int) -> float:
    """CPU-seconds of a process, all threads of it, those that ended too."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # user and system


def _span(before: dict[int, Mark], after: dict[int, Mark]) -> tuple[float, int]:
    """CPU-seconds and bytes of all ranks between two marks of each."""
    pairs = [(before[rank], after[rank]) for rank in after]
    return sum(b.cpu_s - a.cpu_s for a, b in pairs), sum(b.bytes_seen - a.bytes_seen for a, b in pairs)


def _cost(spans: list[tuple[float, int]]) -> float:
    cpu_s, trained = map(sum, zip(*spans, strict=True))
    return cpu_s / trained
