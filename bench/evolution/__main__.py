"""python -m bench.evolution: what an exchange of weights is worth, arm by arm and seed by seed.

A trial is a whole population in one process. Its result is a file under --output: what is finished is never run again,
and --table shows what there is at any moment.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from bench.evidence import write_result
from bench.evolution.arms import DEFAULT_ARMS, POLICIES
from bench.evolution.laboratory import open_corpus, read_results, run_tasks, tasks_of
from bench.evolution.policy import parse_arm
from bench.evolution.real import flags_of
from bench.evolution.report import by_setting, markdown_of, plot, rows_of, table_of
from bench.evolution.trial import Setting
from mingru.sizing import parameter_count
from runtime.arguments import ArgumentParser, normalise_flags, run_main
from runtime.devices import choose_device
from runtime.errors import UserError
from runtime.stderr import say
from training.data import Corpus
from training.options import OptimizerOptions, PopulationOptions
from training.probe import affordable_windows

WIDTH = 160  # of a table that goes to a file or a pipe


def main(argv: Sequence[str]) -> int:
    """Run what was asked for and has no result yet, then show all results of the folder."""
    given = parse(argv)
    output, failed = Path(given.output), 0
    if given.seeds < 1 or given.jobs < 1:
        raise UserError(f"expected --seeds and --jobs of at least 1, got {given.seeds} and {given.jobs}: raise them")
    if not given.table:
        failed = run(given, output)
    results = read_results(output)
    if given.combined:
        kept = [{name: value for name, value in result.items() if name != "trace"} for result in results]
        write_result(Path(given.combined), "evolution", {"results": kept})
    show(results, given)
    return 1 if failed else 0


def run(given: argparse.Namespace, output: Path) -> int:
    """Run the trials; how many failed."""
    if not given.data:
        raise UserError("expected --data with a file of bytes, got none: name one")
    arms = [parse_arm(text, POLICIES) for text in given.arms]
    corpus = open_corpus(Path(given.data))
    device = choose_device(cuda=given.cuda, rocm=given.rocm, cpu=given.cpu)
    setting = setting_of(given, corpus)
    if given.real and device.type != "cpu":
        raise UserError("expected --cpu beside --real, whose ranks share this machine's cores: give it")
    for arm in arms:
        if given.real:
            flags_of(setting, arm, given.first_seed)  # so that an arm which cannot be is found before any has run
        elif arm.conditions.minutes:
            raise UserError(f"expected minutes=N beside --real alone, got {arm.label}: add --real, or set --steps")
    say(f"{parameter_count(setting.model)} parameters a replica; {setting}")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"expected a writable --output, got {output}: {error.strerror}") from None
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes to come
    tasks = tasks_of(setting, arms, range(given.first_seed, given.first_seed + given.seeds), output, given.real)
    return run_tasks(tasks, Path(given.data), device, given.jobs, say)


def setting_of(given: argparse.Namespace, corpus: Corpus) -> Setting:
    """What all arms share."""
    step_bytes, population = given.batch_size * given.chunk_size, PopulationOptions()
    windows = affordable_windows(step_bytes, population.probe_every, population.probe_budget, averages=True)
    shared = ("val_fraction", "replicas", "steps", "dim", "depth", "ff_mult", "batch_size", "chunk_size", "lr",
              "weight_decay", "warmup_steps")  # fmt: skip
    return Setting(
        fingerprint=corpus.fingerprint, probe_windows=given.probe_windows or windows,
        **{name: getattr(given, name) for name in shared},
    )  # fmt: skip


def show(results: list[dict], given: argparse.Namespace) -> None:
    """A table for each setting, and a plot of the last."""
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    for setting, group in by_setting(results).items():
        rows = rows_of(group, given.against)
        if given.markdown:
            print(f"{setting}\n\n{markdown_of(rows, given.against)}\n")
        else:
            console.print(setting, highlight=False)
            console.print(table_of(rows, given.against))
        if given.plot and (wrong := plot(rows, Path(given.plot))):
            say(wrong)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line. Raises UserError."""
    optimizer = OptimizerOptions()
    parser = ArgumentParser(prog="python -m bench.evolution", description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("--data", help="file of bytes to train and measure on")
    add("--output", default="runs/evolution", help="folder of results (default: %(default)s); with --table, or such a "
        "combined file")  # fmt: skip
    add("--arms", nargs="+", default=DEFAULT_ARMS, metavar="NAME[:OPTION=VALUE,...]",
        help=f"of {', '.join(POLICIES)}; an unknown option is answered with those there are (default: "
        f"{len(DEFAULT_ARMS)} arms, what decides a default first)")  # fmt: skip
    add("--seeds", type=int, default=1, help="how many; every arm's first comes first (default: %(default)s)")
    add("--first_seed", type=int, default=1)
    add("--jobs", type=int, default=1, help="trials at a time, each in a process of one thread (default: %(default)s)")
    add("--replicas", type=int, default=4)
    add("--steps", type=int, default=1200, help="optimizer steps of each rank (default: %(default)s)")
    add("--dim", type=int, default=96)
    add("--depth", type=int, default=3)
    add("--ff_mult", type=float, default=2.0)
    add("--batch_size", type=int, default=16)
    add("--chunk_size", type=int, default=64)
    add("--lr", type=float, default=1e-2, help="which an arm's own lr=FACTOR multiplies (default: %(default)s)")
    add("--weight_decay", type=float, default=optimizer.weight_decay)
    add("--warmup_steps", type=int, default=optimizer.warmup_steps)
    add("--val_fraction", type=float, default=0.1, help="share of the data, at its end, that measures and judges")
    add("--probe_windows", type=int, default=0, help="of 256 bytes (default: what train.py's --probe_budget affords)")
    add("--real", action="store_true", help="as processes of train.py over TCP, on the CPU: solo, pair_mean and ours")
    add("--against", default="solo", help="arm that the others are paired with, by seed (default: %(default)s)")
    add("--table", action="store_true", help="run nothing, show what there is")
    add("--markdown", action="store_true", help="the table for a document")
    add("--combined", help="write all results, without their course over the steps, into this one file")
    add("--plot", help="picture to draw (.svg, .pdf, .png): bytes against loss; needs R with ggplot2")
    for name in ("cuda", "rocm", "cpu"):
        add(f"--{name}", action="store_true")
    return parser.parse_args(normalise_flags(argv))


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_main(main)
