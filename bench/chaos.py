"""What faults cost a population, and what they may never cost it: `python -m bench.chaos --ranks 16 --minutes 30`.

Two populations of equal make train at the same time on the same cores, so that the machine's noise meets both alike.
One is left alone (calm); to the other (chaos) faults are done at random, by a seeded schedule (bench/faults.py). Both
run under witness (bench/witness.py). Figures, in intervals and over all:

living          ranks that trained a step in an interval, by their registry files, read each second
mixed, merged   ranks that completed a conversation in which weights arrived; and those that took weights in
bytes/CPU-s     bytes trained on over CPU-seconds of the training threads, each process from the first time it was seen
                training to the last: no start-up, and work that a kill undid counts as done
spared          the same of the ranks that no fault killed, and of those of the same numbers in the calm population
goodput         bytes behind the final checkpoints over CPU-seconds of all processes: start-up and lost work count
held-out        loss of the final checkpoints, nats per byte, on the same 64 KiB for all

Exits with 1 if a merge was torn, a checkpoint was lost, or nobody mixed after the last fault.
"""

import argparse
import contextlib
import dataclasses
import itertools
import math
import random
import re
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from bench.evidence import (
    CHANGED,
    RESULTS,
    final_bytes,
    held_out_losses,
    judge_merges,
    mixes,
    spread,
    torn,
    write_result,
)
from bench.faults import PACK, Fault, Injector, deal
from bench.population import TINY, WITNESSED, Population, Watch, check_memory, make_corpus
from runtime.arguments import ArgumentParser, normalise_flags, run_main

SAMPLE_SECONDS = 1.0
FIRST_FAULT = 2.0  # seconds after both populations train
TAIL = 0.15, 60.0  # share of the time, at most so many seconds, that the last fault leaves for others to go on
LIFE = ("--save_every", "100", "--log_every", "20", "--gossip_mixing_rate", "0.02")


@dataclasses.dataclass
class Half:
    """One of the two populations, and what was read of it."""

    population: Population
    watch: Watch
    rows: list[dict] = dataclasses.field(default_factory=list)

    def interval(self, begin: float, end: float) -> dict:
        """Its figures from `begin` to `end` (time.monotonic)."""
        trained, cpu_s = self.watch.trained(begin, end)
        ago = time.time() - time.monotonic()
        living = self.watch.living(begin, end)
        return {
            "living": len(living),
            "mixed": len(mixes(self.rows, begin + ago, end + ago) & living),
            "merged": len(mixes(self.rows, begin + ago, end + ago, CHANGED) & living),
            "bytes": trained,
            "cpu_s": round(cpu_s, 3),
        }


def schedule(count: int, seconds: float, dice: random.Random) -> list[float]:
    """When each fault begins: evenly spaced, and each moved by up to half a space."""
    last = seconds - min(TAIL[0] * seconds, TAIL[1])
    space = (last - FIRST_FAULT) / count
    return [FIRST_FAULT + (place + dice.random()) * space for place in range(count)]


def run(halves: list[Half], options: argparse.Namespace) -> tuple[list[Fault], float]:
    """Wait until both populations train, measure, do the faults; returns them and when the measurement began."""
    for half in halves:
        half.population.wait_until_trained()
    dice = random.Random(options.seed)
    seconds = options.minutes * 60
    count = math.ceil(options.faults_per_hour * options.minutes / 60)
    due = list(zip(schedule(count, seconds, dice), deal(count, dice), strict=True))
    injector = Injector(halves[1].population, options.seed)
    began = time.monotonic()
    print(f"both populations train; {count} faults in {seconds:.0f} s", flush=True)
    printed = began
    while (now := time.monotonic()) < began + seconds:
        while due and began + due[0][0] <= now:
            injector.inject(due.pop(0)[1])
        for half in halves:
            half.watch.look()
            if half.population.ended():
                raise RuntimeError(
                    f"the {half.population.name} population has ended:\n{half.population.output[-4000:]}"
                )
        if now >= printed + options.interval:
            report(halves, printed, now, now - began, injector.faults)
            printed = now
        time.sleep(max(0.0, min(SAMPLE_SECONDS, began + seconds - now)))
    injector.wait()
    if injector.errors:
        raise RuntimeError(f"{len(injector.errors)} faults could not be done") from injector.errors[0]
    return injector.faults, began


def report(halves: list[Half], begin: float, end: float, seconds: float, faults: list[Fault]) -> None:
    """One line of progress."""
    told = []
    for half in halves:
        half.rows = half.population.events()
        figures = half.interval(begin, end)
        rate = figures["bytes"] / figures["cpu_s"] / 1000 if figures["cpu_s"] else 0.0
        told.append(
            f"{half.population.name} {figures['living']:2d} living {figures['mixed']:2d} mixed "
            f"{figures['merged']:2d} merged {rate:6.1f} kB/CPU-s"
        )
    kills = [fault for fault in faults if fault.killed]
    lost = sum(fault.lost for fault in kills)
    print(
        f"{seconds:5.0f} s  {'  |  '.join(told)}  |  {len(faults)} faults, {len(kills)} kills, {lost} lost", flush=True
    )


def figures_of(half: Half, bounds: list[tuple[float, float]], corpus: Path, killed: set[int]) -> dict:
    """All that is known of a population that has ended. killed: ranks that a fault killed, in the one or the other."""
    population = half.population
    half.rows = population.events()
    intervals = [half.interval(*pair) for pair in bounds]
    trained, cpu_s = half.watch.trained(bounds[0][0], bounds[-1][1])
    spared, spared_cpu_s = half.watch.trained(bounds[0][0], bounds[-1][1], without=killed)
    deaths = len(re.findall(r"^rank \d+ (?:exited with status|was killed|could not)", population.output, re.MULTILINE))
    return {
        "bytes_per_cpu_s": trained / cpu_s,
        "bytes_per_cpu_s_spared": spared / spared_cpu_s if spared_cpu_s else 0.0,
        "goodput": final_bytes(population) / population.cpu_seconds,
        "living": statistics.mean(each["living"] for each in intervals),
        "mixed_share": statistics.mean(each["mixed"] / max(each["living"], 1) for each in intervals),
        "merged_share": statistics.mean(each["merged"] / max(each["living"], 1) for each in intervals),
        "held_out": spread(held_out_losses(population, corpus)),
        "longest_without_ranking_s": round(half.watch.ranking_seconds, 1),
        "cpu_s_of_all_processes": round(population.cpu_seconds, 1),
        "deaths": deaths,
        "launcher_status": population.status,
        "integrity": judge_merges(population),
        "intervals": intervals,
    }


def compare(calm: dict, chaos: dict, faults: list[Fault], mixed_after: int) -> dict:
    """What the run shows."""
    shares = [
        (one["mixed"] / max(one["living"], 1), other["mixed"] / max(other["living"], 1))
        for one, other in zip(calm["intervals"], chaos["intervals"], strict=True)
    ]
    kills = [fault for fault in faults if fault.killed]
    return {
        "bytes_per_cpu_s_ratio": chaos["bytes_per_cpu_s"] / calm["bytes_per_cpu_s"],
        "goodput_ratio": chaos["goodput"] / calm["goodput"],
        "mixed_share_ratio": chaos["mixed_share"] / calm["mixed_share"] if calm["mixed_share"] else None,
        "intervals_with_mixed_share_below_90_percent": sum(other < 0.9 * one for one, other in shares),
        "intervals_with_calm_below_90_percent_of_chaos": sum(one < 0.9 * other for one, other in shares),  # by chance
        "held_out_difference": chaos["held_out"]["mean"] - calm["held_out"]["mean"],
        "faults": dict(Counter(fault.injection.name for fault in faults)),
        "kills": len(kills),
        "resumed_from_the_newest_whole": sum(
            fault.expected != "" and fault.resumed == fault.expected for fault in kills
        ),
        "had_no_checkpoint_left": sum(fault.expected == "" for fault in kills),
        "resume_not_seen": sum(fault.resumed is None for fault in kills),
        "lost_checkpoints": sum(fault.lost for fault in kills),
        "median_seconds_down": statistics.median([fault.down for fault in kills if fault.down] or [0.0]),
        "deaths_that_were_no_kill": chaos["deaths"] - len(kills) + calm["deaths"],
        "torn_merges": torn(calm["integrity"]) + torn(chaos["integrity"]),
        "ranks_that_mixed_after_the_last_fault": mixed_after,
    }


def table(calm: dict, chaos: dict, shown: dict) -> str:
    """The figures for a person."""
    lines = [f"{'':34s}{'calm':>12s}{'chaos':>12s}{'ratio':>9s}"]
    for title, name, form in (
        ("bytes per CPU-s, training threads", "bytes_per_cpu_s", ",.0f"),
        ("... of the ranks that were spared", "bytes_per_cpu_s_spared", ",.0f"),
        ("goodput, bytes per CPU-s in all", "goodput", ",.0f"),
        ("living ranks", "living", ".2f"),
        ("share of them that mixed", "mixed_share", ".3f"),
        ("share of them that merged", "merged_share", ".3f"),
    ):
        ratio = f"{chaos[name] / calm[name]:9.3f}" if calm[name] else ""
        lines.append(f"{title:34s}{calm[name]:>12{form}}{chaos[name]:>12{form}}{ratio}")
    silence = (f"{half['longest_without_ranking_s']:>12.1f}" for half in (calm, chaos))
    lines.append(f"{'longest without a fresh ranking, s':34s}{''.join(silence)}")
    for title, name in (("held-out loss, mean over ranks", "mean"), ("... its standard deviation", "sd")):
        lines.append(f"{title:34s}{calm['held_out'][name]:>12.4f}{chaos['held_out'][name]:>12.4f}")
    for title, name in (
        ("merges seen by witnesses", "merges_witnessed"),
        ("... of a state that nobody held", "merges_of_a_state_nobody_held"),
        ("boundaries looked at", "boundaries_looked_at"),
        ("... changed without a merge", "boundaries_changed_without_a_merge"),
    ):
        lines.append(f"{title:34s}{calm['integrity'][name]:>12,}{chaos['integrity'][name]:>12,}")
    lines += [f"{name.replace('_', ' '):46s}{value}" for name, value in shown.items() if isinstance(value, int)]
    lines.append(", ".join(f"{times} {name}" for name, times in shown["faults"].items()))
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """The command line."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=16, help="of each population (default: 16)")
    parser.add_argument("--minutes", type=float, default=30, help="to measure, from when both train (default: 30)")
    parser.add_argument("--faults_per_hour", type=float, default=125, help="done to one population (default: 125)")
    parser.add_argument("--interval", type=float, default=30, help="seconds of one (default: 30)")
    parser.add_argument("--seed", type=int, default=0, help="of the faults (default: 0)")
    parser.add_argument("--data", type=Path, help="bytes to train on (default: the Python standard library, 4 MiB)")
    parser.add_argument("--workdir", type=Path, help="new folder for both runs, kept (default: a temporary one)")
    parser.add_argument("--output", type=Path, default=RESULTS / "chaos.json", help="figures (default: %(default)s)")
    options = parser.parse_args(normalise_flags(arguments))
    check_memory(2 * options.ranks)
    torch.set_num_threads(1)  # of the bench itself: the cores are the ranks'
    corpus = (options.data or make_corpus()).resolve()
    flags = [*TINY, *LIFE, "--data", str(corpus), "--max_minutes", str(options.minutes + 30)]
    with contextlib.ExitStack() as stack:
        folder = options.workdir or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos_")))
        halves = []
        for name in ("calm", "chaos"):
            population = Population(name, folder.resolve() / name, options.ranks, WITNESSED, flags)
            halves.append(Half(stack.enter_context(population), Watch(population)))
        faults, began = run(halves, options)
        for half in halves:  # both at once: neither trains on while the other leaves
            half.population.ask_to_stop()
        for half in halves:
            half.population.stop()
        ends = [began + options.interval * place for place in range(int(options.minutes * 60 / options.interval) + 1)]
        if len(ends) < 2:
            ends = [began, began + options.minutes * 60]
        killed = {fault.rank for fault in faults if fault.killed}
        calm, chaos = (figures_of(half, list(itertools.pairwise(ends)), corpus, killed) for half in halves)
        last = max((began + fault.seconds for fault in faults), default=began) + time.time() - time.monotonic()
        shown = compare(calm, chaos, faults, len(mixes(halves[1].rows, last, math.inf)))
    print(table(calm, chaos, shown))
    told = [dataclasses.asdict(fault) | {"injection": fault.injection.name} for fault in faults]
    setting = {"flags": [*TINY, *LIFE], "pack": {injection.name: times for injection, times in PACK.items()}}
    write_result(
        options.output, "chaos", {"setting": setting, "shown": shown, "calm": calm, "chaos": chaos, "log": told}
    )
    return int(
        shown["torn_merges"] + shown["lost_checkpoints"] > 0 or not shown["ranks_that_mixed_after_the_last_fault"]
    )


if __name__ == "__main__":
    run_main(main)
