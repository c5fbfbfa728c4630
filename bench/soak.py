"""Whether a rank stays as small as it began: `python -m bench.soak --minutes 120`.

A tiny population meets, merges and saves hundreds of times as often as a real one; descriptors, threads and resident
memory of every rank are read four times a second. After a warm-up (the first quarter) each has a slope, by least
squares, and a rise: the least in the last tenth less the least in the first tenth, which leaves out what is there for
the length of a conversation or a save alone. Exits with 1 if a rank's descriptors or threads rose, or its memory by
more than 5 %.

How long that stands for: a rank at train.py's default rates calls a peer at one step in 25 and saves once in 500 steps,
so the events of a rank are counted and divided by these rates; in hours, at one step a second.
"""

import contextlib
import os
import re
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from bench.evidence import RESULTS, write_result
from bench.population import ROOT, TINY, Population, check_memory, make_corpus
from runtime.arguments import ArgumentParser, normalise_flags, run_main
from training.options import PopulationOptions, RunOptions

SAMPLE_SECONDS = 0.25
WARM_UP = 0.25  # share of the time
EDGE = 0.1  # share of the rest, at either end, whose least values are compared
MEMORY_RISE = 0.05
LIFE = ("--gossip_mixing_rate", "0.3", "--gossip_fitness_decay", "0.5", "--save_every", "15", "--log_every", "5",
        "--val_every", "100", "--val_bytes", "2k")  # fmt: skip
QUANTITIES = ("descriptors", "threads", "resident_mb")


@dataclass(frozen=True)
class Size:
    """A process at one moment; seconds: since the soak began."""

    seconds: float
    descriptors: int
    threads: int
    resident_mb: float


def size_of(pid: int, seconds: float) -> Size:
    """Raises OSError for a process that has ended."""
    status = Path(f"/proc/{pid}/status").read_text()
    threads, resident = (int(re.search(rf"^{name}:\s+(\d+)", status, re.MULTILINE)[1]) for name in ("Threads", "VmRSS"))
    return Size(seconds, len(os.listdir(f"/proc/{pid}/fd")), threads, resident / 1024)


def growth(sizes: list[Size], quantity: str) -> dict[str, float]:
    """Of one rank and quantity: the least at the beginning, the rise of that until the end, the most, and the slope."""
    times, values = [size.seconds for size in sizes], [float(getattr(size, quantity)) for size in sizes]
    edge = max(1, int(EDGE * len(values)))
    begin, end = min(values[:edge]), min(values[-edge:])
    slope = statistics.linear_regression(times, values).slope
    return {"begin": begin, "rise": end - begin, "most": max(values), "per_hour": slope * 3600}


def soak(population: Population, seconds: float) -> dict[int, list[Size]]:
    """Sample every rank for so long."""
    pids = {rank: population.process(rank) for rank in range(population.ranks)}
    sizes: dict[int, list[Size]] = {rank: [] for rank in pids}
    began = printed = time.monotonic()
    while (now := time.monotonic()) < began + seconds:
        for rank, pid in pids.items():
            sizes[rank].append(size_of(pid, now - began))
        if now >= printed + 30:
            printed = now
            latest = [own[-1] for own in sizes.values()]
            told = [f"{max(getattr(size, quantity) for size in latest):.6g} {quantity}" for quantity in QUANTITIES]
            print(f"{now - began:6.0f} s  most of a rank: {', '.join(told)}", flush=True)
        time.sleep(SAMPLE_SECONDS)
    return sizes


def stands_for(population: Population) -> dict[str, float]:
    """How much happened, of a rank on average, and how many steps and hours at the default rates make as much."""
    rows = [row for row in population.events() if row["exchange_id"] != "NA"]
    logs = [population.log(rank).read_text(errors="replace") for rank in range(population.ranks)]
    talks = len(rows) / population.ranks
    saves = sum(text.count("  saved checkpoint_") for text in logs) / population.ranks
    # A conversation has two ends: a rank calls, and is called as often.
    steps = min(talks / (2 * PopulationOptions.gossip_mixing_rate), saves * RunOptions.save_every)
    return {"conversations": talks, "saves": saves, "steps": steps, "hours": steps / 3600}


def main(arguments: list[str]) -> int:
    """The command line."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60, help="to train (default: 60)")
    parser.add_argument("--ranks", type=int, default=3, help="of the population (default: 3)")
    parser.add_argument("--output", type=Path, default=RESULTS / "soak.json", help="figures (default: %(default)s)")
    options = parser.parse_args(normalise_flags(arguments))
    check_memory(options.ranks)
    flags = [*TINY, *LIFE, "--data", str(make_corpus()), "--max_minutes", str(options.minutes + 30)]
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak_")))
        population = Population("soak", folder, options.ranks, ROOT / "train.py", flags)
        stack.enter_context(population)
        population.wait_until_trained()
        sizes = soak(population, options.minutes * 60)
        population.ask_to_stop()
        population.stop()
        happened = stands_for(population)
    warm = {rank: own[int(WARM_UP * len(own)) :] for rank, own in sizes.items()}
    shown = {rank: {quantity: growth(own, quantity) for quantity in QUANTITIES} for rank, own in warm.items()}
    print(f"{'rank':>4s}  {'quantity':12s}{'begin':>10s}{'rise':>10s}{'most':>10s}{'per hour':>10s}")
    for rank, own in shown.items():
        for quantity, grown in own.items():
            print(f"{rank:4d}  {quantity:12s}" + "".join(f"{value:10.2f}" for value in grown.values()))
    print(
        "{conversations:.0f} conversations and {saves:.0f} saves of a rank: as in {steps:.0f} steps".format(**happened)
    )
    print("at the default rates, {hours:.1f} hours at a step a second".format(**happened))
    content = {
        "flags": [*TINY, *LIFE],
        "launcher_status": population.status,
        "per_rank_and_as_at_default_rates": happened,
        "ranks": shown,
    }
    write_result(options.output, "soak", content)
    return int(population.status != 0 or any(_grew(own) for own in shown.values()))


def _grew(own: dict[str, dict[str, float]]) -> bool:
    memory = own["resident_mb"]
    return (
        own["descriptors"]["rise"] > 0 or own["threads"]["rise"] > 0 or memory["rise"] > MEMORY_RISE * memory["begin"]
    )


if __name__ == "__main__":
    run_main(main)
