"""python -m bench.race: our model and its rivals, trained for equal time with equal parameters on equal bytes.

The first nine tenths of the file are trained on, the last is held out (nanoGPT's split), and all of it is measured when
the time is over. Nothing is run twice that has a result under --output; --table shows what there is. Whatever else runs
on the machine spoils the race: the column "CPU" says which share of its threads' time a model got. With --clock cpu and
one thread others cost it little but their share of the caches.

Rivals: AdamW, batches of 16 x 256 bytes drawn at random, warm-up and cosine over the time, and the better of two rates,
each tried for --rate_minutes. Ours: train.py's defaults, or the flags in --ours, on contiguous lanes.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from bench.race.heat import MODELS, Heat, build, read, read_all, run
from bench.race.ours import parse_flags
from bench.race.rivals import RIVALS
from runtime.arguments import ArgumentParser, normalise_flags, run_main
from runtime.errors import UserError
from runtime.stderr import say
from training.data import Corpus, find_files

WIDTH = 170  # of a table that goes to a file or a pipe


class Race:
    """The heats of one command line; what has a result is read, not run."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.folder = Path(given.output)
        corpus = Corpus(find_files([given.data]), None)
        self.training, self.held_out = corpus.split(0.1)
        self.shared = {
            "clock": given.clock, "parameters": given.params, "threads": given.threads,
            "fingerprint": corpus.fingerprint,
        }  # fmt: skip
        self.flags = parse_flags(given.ours, given.params)

    def run(self) -> None:
        """Every model, with each seed; the rates that rivals need come first."""
        for model in self.given.models:
            rate = None if model == "ours" else self.best_rate(model)
            if self.given.rates_only:
                continue
            for seed in self.given.seeds:
                flags = self.given.ours if model == "ours" else None
                self.result(Heat(model, self.given.minutes, seed=seed, rate=rate, flags=flags, **self.shared))

    def best_rate(self, model: str) -> float:
        """Of the rates tried for a rival, the one with the lowest loss in windows."""
        losses = {}
        for rate in RIVALS[model].rates:
            heat = Heat(model, self.given.rate_minutes, seed=self.given.seeds[0], rate=rate, **self.shared)
            losses[rate] = self.result(heat)["loss"]["windows"]
        return min(losses, key=losses.get)

    def result(self, heat: Heat) -> dict:
        """The heat's result, run now if it was not before."""
        if (result := read(heat, self.folder)) is None:
            contestant = build(heat, self.flags, self.training)
            say(f"{heat.model}, {contestant.parameters:,} parameters, {contestant.told}: {heat.minutes:g} minutes")
            result = run(heat, contestant, self.held_out, self.folder, self.given.curve)
            say(f"{heat.model}: {result['loss']['windows']:.4f} nats per byte after {result['steps']} steps")
        return result


def table_of(results: Sequence[dict]) -> Table:
    """One row a result, by time and then the loss."""
    caption = (
        "held-out nats and bits per byte, in windows of 256 that begin with a state of zero, and carried along 16 "
        "equal parts; bytes/s: trained on"
    )
    table = Table(box=box.SIMPLE_HEAD, caption=caption)
    for name in ("model", "minutes", "seed", "parameters", "shape", "rate", "batch", "dtype", "steps", "bytes/s",
                 "windows", "bits", "carried", "bits", "CPU"):  # fmt: skip
        table.add_column(name, justify="left" if name in ("model", "shape") else "right", no_wrap=name != "model")
    for result in sorted(results, key=lambda result: (result["heat"]["minutes"], result["loss"]["windows"])):
        heat, told, loss = result["heat"], result["told"], result["loss"]
        table.add_row(
            f"{heat['model']} {heat['flags'] or ''}".strip(), f"{heat['minutes']:g} {heat['clock']}",
            str(heat["seed"]),
            f"{result['parameters']:,}", told["shape"], f"{told['rate']:g}", told["batch"], told["dtype"],
            str(result["steps"]), f"{result['bytes_seen'] / heat['minutes'] / 60:.0f}",
            *_nats_and_bits(loss["windows"]), *_nats_and_bits(loss["carried"]),
            f"{result['cpu_s_a_thread'] / result['wall_s']:.0%}",
        )  # fmt: skip
    return table


def _nats_and_bits(loss: float | None) -> tuple[str, str]:
    return ("", "") if loss is None else (f"{loss:.4f}", f"{loss / math.log(2):.4f}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line. Raises UserError."""
    parser = ArgumentParser(prog="python -m bench.race", description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("--data", help="file of bytes to train and measure on")
    add("--output", default="runs/race", help="folder of results (default: %(default)s)")
    add("--models", nargs="+", default=MODELS, choices=MODELS, help="who races (default: all)")
    add("--minutes", type=float, default=7.0, help="of training, each model (default: %(default)s)")
    add("--seeds", nargs="+", type=int, default=[1], metavar="N", help="of weights and data order (default: 1)")
    add("--params", type=int, default=1_900_000, help="parameters of each, as nearly as it can (default: %(default)s)")
    add("--clock", choices=("wall", "cpu"), default="wall", help="minutes by the wall, or of CPU time over "
        "the threads, which is less unfair where others use the machine (default: %(default)s)")  # fmt: skip
    add("--threads", type=int, default=2, help="of each model (default: %(default)s)")
    add("--ours", default="", metavar="FLAGS", help='train.py\'s flags for our model: --ours="--lr 1e-2 --dim 256"')
    add("--rate_minutes", type=float, default=1.0, help="for which a rival's rates are tried (default: %(default)s)")
    add("--rates_only", action="store_true", help="try the rivals' rates and stop there")
    add("--curve", type=float, metavar="SECONDS", help="measure about so often in between too, off the clock")
    add("--table", action="store_true", help="run nothing, show the results of the folder")
    given = parser.parse_args(normalise_flags(argv))
    if min(given.minutes, given.rate_minutes, given.threads, given.params, given.curve or 1) <= 0:
        raise UserError("expected times, threads and parameters above 0, got less: raise them")
    if not given.table and not given.data:
        raise UserError("expected --data with a file of bytes, got none: name one")
    return given


def main(argv: Sequence[str]) -> None:
    """Run what was asked for and has no result yet, then show all results of the folder."""
    given = parse(argv)
    torch.set_num_threads(given.threads)
    if not given.table:
        Race(given).run()
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    console.print(table_of(read_all(Path(given.output))))


if __name__ == "__main__":
    run_main(main)
