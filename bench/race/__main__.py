"""python -m bench.race: our model and its rivals, trained for equal time with equal parameters on equal bytes.

The first nine tenths of the file are trained on, the last is held out (nanoGPT's split), and all of it is measured when
the time is over. Nothing is run twice that has a result under --output, so a race that was killed goes on where it was;
--table shows what there is. Whatever else runs on the machine spoils the race: the column "CPU" says which share of its
threads' time a model got. With --clock cpu and one thread others cost it little but their share of the caches.

Rivals: AdamW, batches of 16 x 256 bytes drawn at random, warm-up and cosine over the time. Ours: train.py's defaults
but for the flags in --ours, on contiguous lanes. Each, ours too unless --ours says otherwise, trains in the faster of
float32 and bfloat16 (autocast), by the quickest of three passes; minGRU-pytorch in float32, since it does not learn in
the other. Of each rate and dropout are tuned by the same rule (bench/race/tuning.py): trained on the first nine tenths
of the training bytes, measured on their last tenth.
"""

import argparse
import functools
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from bench.race import ours, rivals
from bench.race.contestant import Plan, Setting
from bench.race.heat import Heat, read, read_all, run
from bench.race.rivals import RIVALS
from bench.race.tuning import RATES, tune
from runtime.allocator import keep_freed_memory
from runtime.arguments import ArgumentParser, normalise_flags, run_main
from runtime.errors import UserError
from runtime.stderr import say
from training.data import Corpus, Region, find_files

MODELS = ("ours", *RIVALS)
WIDTH = 190  # of a table that goes to a file or a pipe


class Race:
    """The heats of one command line; what has a result is read, not run."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.folder = Path(given.output)
        corpus = Corpus(find_files([given.data]), None)
        training, held_out = corpus.split(0.1)
        cut = training.begin + int(0.9 * len(training))
        self.regions = {
            "held-out": (training, held_out),
            "tuning": (Region(corpus, training.begin, cut), Region(corpus, cut, training.end)),
        }
        self.shared = {"clock": given.clock, "threads": given.threads, "fingerprint": corpus.fingerprint}
        self.flags = ours.parse_flags(given.ours, given.params)

    def run(self) -> None:
        """Every model: tuned unless its setting is given, then raced with each seed."""
        given = Setting(*self.given.setting) if self.given.setting else None
        for model in self.given.models:
            self.plan(model, given or Setting(RATES[0], 0.0))  # mistakes come out before the first heat
        for model in self.given.models:
            setting = given or self.tuned(model)
            if self.given.tune_only:
                continue
            for seed in self.given.seeds:
                self.result(model, setting, self.given.minutes, seed, "held-out")

    def tuned(self, model: str) -> Setting:
        """The setting that the model races with."""
        drops = model == "ours" or RIVALS[model].drops
        setting = tune(functools.partial(self.tuning_loss, model), self.given.minutes, self.given.rate_minutes, drops)
        say(f"{model}: races at rate {setting.rate:g} with dropout {setting.dropout:g}")
        return setting

    def tuning_loss(self, model: str, setting: Setting, minutes: float) -> float:
        """In windows of bytes that are neither trained on nor held out; infinite where it is no number."""
        loss = self.result(model, setting, minutes, self.given.seeds[0], "tuning")["loss"]["windows"]
        return loss if math.isfinite(loss) else math.inf

    def plan(self, model: str, setting: Setting) -> Plan:
        """See Plan."""
        return ours.plan(self.flags, setting) if model == "ours" else rivals.plan(model, self.given.params, setting)

    def result(self, model: str, setting: Setting, minutes: float, seed: int, measured: str) -> dict:
        """The heat's result, run now if it was not before."""
        plan = self.plan(model, setting)
        heat = Heat(model, minutes, seed=seed, measured=measured, options=plan.options, **self.shared)
        if (result := read(heat, self.folder)) is None:
            training, unseen = self.regions[measured]
            contestant = plan.build(training, seed)
            say(f"{model}, {contestant.parameters:,} parameters, {contestant.told}: {minutes:g} minutes")
            curve = self.given.curve if measured == "held-out" else None
            result = run(heat, contestant, unseen, self.folder, curve)
            loss, steps = result["loss"]["windows"], result["steps"]
            say(f"{model}: {loss:.4f} nats per byte of {measured} bytes after {steps} steps")
        return result


def table_of(results: Sequence[dict]) -> Table:
    """One row a result: what was raced, then what was tried to tune, each by time and then the loss."""
    caption = (
        "nats and bits per byte, in windows of 256 that begin with a state of zero, and carried along 16 equal parts, "
        "of held-out bytes, or of those to tune by; bytes/s: trained on"
    )
    table = Table(box=box.SIMPLE_HEAD, caption=caption)
    for name in ("model", "of", "minutes", "seed", "parameters", "shape", "rate", "dropout", "batch", "dtype", "steps",
                 "bytes/s", "windows", "bits", "carried", "bits", "CPU"):  # fmt: skip
        table.add_column(name, justify="left" if name in ("model", "of", "shape") else "right", no_wrap=True)
    for result in sorted(results, key=_order):
        heat, told, loss = result["heat"], result["told"], result["loss"]
        table.add_row(
            heat["model"], heat["measured"], f"{heat['minutes']:g} {heat['clock']}", str(heat["seed"]),
            f"{result['parameters']:,}", told["shape"], f"{told['rate']:g}", f"{told['dropout']:g}", told["batch"],
            told["dtype"], str(result["steps"]), f"{result['bytes_seen'] / heat['minutes'] / 60:.0f}",
            *_nats_and_bits(loss["windows"]), *_nats_and_bits(loss["carried"]),
            f"{result['cpu_s_a_thread'] / result['wall_s']:.0%}",
        )  # fmt: skip
    return table


def _order(result: dict) -> tuple[str, float, float]:
    return result["heat"]["measured"], result["heat"]["minutes"], result["loss"]["windows"]


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
    add("--ours", default="--weight_decay 0.1", metavar="FLAGS", help="train.py's flags for our model, --lr and "
        "--dropout not among them (default: %(default)r, as the rivals have)")  # fmt: skip
    add("--rate_minutes", type=float, help="for which each rate is tried (default: a quarter of --minutes)")
    add("--setting", nargs=2, type=float, metavar=("RATE", "DROPOUT"), help="race with these and tune nothing")
    add("--tune_only", action="store_true", help="tune and stop there")
    add("--curve", type=float, metavar="SECONDS", help="measure about so often in between too, off the clock")
    add("--table", action="store_true", help="run nothing, show the results of the folder")
    given = parser.parse_args(normalise_flags(argv))
    if given.rate_minutes is None:
        given.rate_minutes = given.minutes / 4
    if min(given.minutes, given.rate_minutes, given.threads, given.params, given.curve or 1) <= 0:
        raise UserError("expected times, threads and parameters above 0, got less: raise them")
    if given.setting and not (given.setting[0] > 0 and 0 <= given.setting[1] < 1):
        raise UserError(f"expected for --setting a rate above 0 and dropout in [0, 1), got {given.setting}: correct it")
    if not given.table and not given.data:
        raise UserError("expected --data with a file of bytes, got none: name one")
    return given


def main(argv: Sequence[str]) -> None:
    """Run what was asked for and has no result yet, then show all results of the folder."""
    given = parse(argv)
    torch.set_num_threads(given.threads)
    keep_freed_memory()  # as train.py does; the rivals have it too
    if not given.table:
        Race(given).run()
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    console.print(table_of(read_all(Path(given.output))))


if __name__ == "__main__":
    run_main(main)
