"""python -m bench: what every part costs beside what a user would run instead, and beside what the hardware allows.

Ours and the others' forms run in turn in one process; the table has medians, and ratios with their quartiles over the
rounds. Without names everything runs, in some twelve minutes on two CPU cores.
"""

import argparse
import importlib
import json
import os
import resource
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench.provenance import provenance
from bench.speed.timing import Row, Setting
from runtime.allocator import keep_freed_memory
from runtime.arguments import ArgumentParser, normalise_flags, run_main
from runtime.devices import check_triton, choose_device
from runtime.errors import UserError
from runtime.files import atomic_write

CPU_ONLY = ("exchange", "stall", "registry", "overhead")  # nothing in them runs on a GPU
NAMES = ("recurrence", "gru", "training", "chunks", "convolution", "dropout", "optimizer", "decoding", *CPU_ONLY)
RESULTS = Path(__file__).parent / "results" / "speed"
WIDTH = 200  # of a table that goes to a file or a pipe


def main(arguments: list[str]) -> int:
    """Run the benchmarks that were named, one after another, each into a file of its own."""
    given = parse(arguments)
    on_gpu = given.cuda or given.rocm
    device = choose_device(given.cuda, given.rocm, not on_gpu)
    check_triton(device)
    if not on_gpu:
        keep_freed_memory()  # as train.py does; the others' forms have it too
    if given.threads:
        torch.set_num_threads(given.threads)
    names = given.names or [name for name in NAMES if not (on_gpu and name in CPU_ONLY)]
    if on_gpu and (wrong := sorted(set(names) & set(CPU_ONLY))):
        raise UserError(f"expected benchmarks of a GPU beside --cuda or --rocm, got {wrong[0]}: leave it or that out")
    setting = Setting(device, given.rounds, given.quick, tell if sys.stderr.isatty() else lambda text: None)
    folder = given.output or (None if given.quick else RESULTS)
    rows: dict[str, list[Row]] = {}
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        meanwhile, rows[name] = Meanwhile(), []
        for row in importlib.import_module(f"bench.speed.{name}").measure(setting):
            rows[name].append(row)
            write(folder, name, rows[name], setting, meanwhile, whole=False)
            tell(f"{row.case}: {row.ours:.4g} {row.unit}" + ("" if sys.stderr.isatty() else "\n"))
        write(folder, name, rows[name], setting, meanwhile, whole=True)
        elapsed, others = meanwhile.seconds(), meanwhile.cores_used_by_others()
        print(f"\r\033[K{name}: {elapsed:.0f} s; other processes used {others:.2f} cores", file=sys.stderr, flush=True)
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    console.print(table_of(rows))
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line. Raises UserError."""
    parser = ArgumentParser(prog="python -m bench", description=__doc__.split("\n", 1)[1])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)} (default: all)")
    parser.add_argument("--cuda", action="store_true", help="on an NVIDIA GPU (default: the CPU)")
    parser.add_argument("--rocm", action="store_true", help="on an AMD GPU")
    parser.add_argument("--rounds", type=int, default=15, help="of each comparison, at most (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="of torch and the C kernels (default: torch's own number)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and two rounds: shows only that it runs")
    parser.add_argument("--output", type=Path, help=f"folder of the figures (default: {RESULTS}; none with --quick)")
    given = parser.parse_args(normalise_flags(arguments))
    if unknown := sorted(set(given.names) - set(NAMES)):
        raise UserError(f"expected benchmarks among {', '.join(NAMES)}, got {unknown[0]!r}: correct it")
    if given.rounds < 2 or (given.threads is not None and given.threads < 1):
        raise UserError("expected --rounds of at least 2 and --threads of at least 1, got less: raise them")
    return given


def table_of(rows: dict[str, list[Row]]) -> Table:
    """All figures, with the goals of those that have one."""
    table = Table("", "case", "ours", "", "against", "theirs", "ratio (quartiles)", "goal", "met", box=None)
    for name, own in rows.items():
        for place, row in enumerate(own):
            ratio = row.ratio and f"{row.ratio.median:.3g} ({row.ratio.low:.3g} to {row.ratio.high:.3g}) {row.meaning}"
            table.add_row(
                "" if place else name, row.case, f"{row.ours:.4g}", row.unit, row.against,
                "" if row.theirs is None else f"{row.theirs:.4g}", ratio or "",
                "" if row.goal is None else str(row.goal), {None: "", True: "yes", False: "NO"}[row.met],
            )  # fmt: skip
    return table


class Meanwhile:
    """What has happened on this machine since this was made."""

    def __init__(self) -> None:
        self._began, self._machine, self._own = time.monotonic(), machine_seconds(), own_seconds()

    def seconds(self) -> float:
        """That have passed."""
        return time.monotonic() - self._began

    def cores_used_by_others(self) -> float:
        """Kept busy by other processes, on average."""
        others = machine_seconds() - self._machine - (own_seconds() - self._own)
        return max(0.0, others) / self.seconds()


def write(folder: Path | None, name: str, rows: list[Row], setting: Setting, meanwhile: Meanwhile, whole: bool) -> None:
    """One benchmark's figures so far as JSON, if there is a folder for them. whole: there are no more to come."""
    if folder is None:
        return
    content = provenance("bench") | {
        "device": str(setting.device),
        "threads": torch.get_num_threads(),
        "omp_proc_bind": os.environ.get("OMP_PROC_BIND"),
        "rounds": setting.rounds,
        "quick": setting.quick,
        "whole": whole,
        "seconds": round(meanwhile.seconds(), 1),
        "cores_used_by_others": round(meanwhile.cores_used_by_others(), 3),
        "rows": [
            {
                "case": row.case, "ours": row.ours, "unit": row.unit, "against": row.against, "theirs": row.theirs,
                "ratio": row.ratio and row.ratio._asdict(), "meaning": row.ratio and row.meaning,
                "goal": row.goal and str(row.goal), "met": row.met,
            }
            for row in rows
        ],
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    suffix = ("_rocm" if torch.version.hip else "_cuda") if setting.cuda else ""
    atomic_write(folder / f"{name}{suffix}.json", json.dumps(content, indent=2) + "\n")


def tell(text: str) -> None:
    """Progress, on one line of a terminal."""
    print(f"\r\033[K{text}" if sys.stderr.isatty() else text, end="", file=sys.stderr, flush=True)


def machine_seconds() -> float:
    """CPU time that all processes of this machine have used."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")  # without idling and waiting for disks


def own_seconds() -> float:
    """CPU time that this process and those that it waited for have used."""
    uses = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(use.ru_utime + use.ru_stime for use in uses)


if __name__ == "__main__":
    run_main(main)
