"""Show the population of a run as a table, from the files in its folder.

python watch.py runs/local_20260101_120000           # again every 2 s, until all ranks have left or Ctrl-C
python watch.py runs/local_20260101_120000 --once
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table

from gossip.filesystem_coordinator import Sightings
from gossip.registry import rank_files, read_entry, read_ranking
from runtime.arguments import ArgumentParser, normalise_flags, run_main
from runtime.errors import UserError
from training.metrics import MISSING, bits

REFRESH_SECONDS = 2.0
WIDTH_OF_A_FILE = 120  # columns; there is no screen whose edge would cut a long number
TAIL_BYTES = 64 * 1024
CAPTION = "bits, nats: best moving average of the loss, per byte; held-out: newest, in bits; undone: rolled back"
COUNTS = {"won": "won", "lost": "lost", "rolled_back": "undone", "tied": "tied", "failed": "failed", "busy": "busy"}


@dataclass(frozen=True)
class Row:
    """What is known of one rank; losses in nats per byte, None where a value is not known."""

    rank: int
    state: str
    best: float | None
    held_out: float | None
    step: int | None
    bytes_per_s: float | None
    counts: tuple[int | None, ...]


class Onlooker:
    """Reads a run's files again and again, and notices on its own clock which ranks no longer move."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._population = run_dir / "population"
        self._sightings = Sightings(liveness_seconds(run_dir))
        self._began = time.monotonic()

    def look(self) -> list[Row]:
        """The ranks as their files are now, in order."""
        now = time.monotonic()
        for rank, path in rank_files(self._population) if self._population.is_dir() else []:
            try:
                self._sightings.observe(read_entry(rank, path), now)
            except (OSError, ValueError):  # torn, or just replaced: what was seen before stays
                continue
        ranking = self._ranking()
        metrics = {int(path.stem.removeprefix("rank_")): path for path in self.run_dir.glob("metrics/rank_*.tsv")}
        ranks = sorted(metrics.keys() | self._sightings.entries.keys())
        return [
            make_row(
                rank,
                self._state(rank, ranking, now),
                self._sightings.entries.get(rank, {}),
                last_values(metrics[rank]) if rank in metrics else {},
            )
            for rank in ranks
        ]

    def over(self) -> bool:
        """True when every rank that was seen has left."""
        entries = self._sightings.entries
        return bool(entries) and all(self._sightings.left(rank) for rank in entries)

    def _ranking(self) -> dict[str, Any]:
        try:
            return read_ranking(self._population)
        except (OSError, ValueError):
            return {}

    def _state(self, rank: int, ranking: dict[str, Any], now: float) -> str:
        if rank not in self._sightings.entries:
            return "unknown"  # it has metrics alone: no shared registry
        if self._sightings.left(rank):
            return "left"
        still = now - self._began >= self._sightings.timeout_seconds and not self._sightings.live(rank, now)
        if still or (ranking and rank not in ranking["live"]):
            return "silent"
        return "leads" if rank == ranking.get("leader") else "running"


def main(arguments: list[str]) -> None:
    """The command line."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the folder that train.py --output named")
    parser.add_argument("--once", action="store_true", help="print the table once and exit")
    options = parser.parse_args(normalise_flags(arguments))
    if not any((options.run_dir / name).is_dir() for name in ("population", "metrics")):
        raise UserError(
            f"expected a run directory, got {options.run_dir}, without population/ or metrics/: check the path"
        )
    onlooker = Onlooker(options.run_dir)
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, WIDTH_OF_A_FILE)
    table = make_table(options.run_dir, onlooker.look())
    if options.once:
        console.print(table)
        return
    try:
        with Live(table, console=console, auto_refresh=False) as live:
            while not onlooker.over():
                time.sleep(REFRESH_SECONDS)
                live.update(make_table(options.run_dir, onlooker.look()), refresh=True)
    except KeyboardInterrupt:
        return


def make_table(run_dir: Path, rows: list[Row]) -> Table:
    """The table of all ranks; the best loss stands out."""
    table = Table(title=str(run_dir), caption=CAPTION, box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for heading in ("rank", "state", "bits", "nats", "held-out", "step", "kB/s", *COUNTS.values()):
        table.add_column(heading, justify="left" if heading == "state" else "right", no_wrap=True)
    best = min((row.best for row in rows if row.best is not None), default=None)
    for row in rows:
        table.add_row(
            str(row.rank),
            row.state,
            _number(row.best and bits(row.best), ".3f"),
            _number(row.best, ".3f"),
            _number(row.held_out and bits(row.held_out), ".3f"),
            _number(row.step, ","),
            _number(row.bytes_per_s and row.bytes_per_s / 1000, ",.1f"),
            *(_number(count, "d") for count in row.counts),
            style="bold" if row.best is not None and row.best == best else None,
        )
    return table


def make_row(rank: int, state: str, entry: dict[str, Any], metrics: dict[str, float]) -> Row:
    """One rank's row from what it published last, and where it did not, from its metrics."""

    def value(name: str) -> Any:
        found = entry.get(name)
        return found if isinstance(found, int | float) else metrics.get(name)

    best = value("best_fitness")
    counts = tuple(None if value(name) is None else int(value(name)) for name in COUNTS)
    step = value("step")
    return Row(
        rank=rank,
        state=state,
        best=metrics.get("ema_loss") if best is None else best,
        held_out=metrics.get("val_loss"),
        step=None if step is None else int(step),
        bytes_per_s=value("bytes_per_s"),
        counts=counts,
    )


def last_values(path: Path) -> dict[str, float]:
    """Each column's newest number in the last 64 KiB of a metrics file; a row that is not whole is passed over."""
    try:
        with open(path, "rb") as file:
            names = file.readline().decode().rstrip("\n").split("\t")
            start = file.tell()
            file.seek(max(start, file.seek(0, 2) - TAIL_BYTES))
            lines = file.read().decode(errors="replace").split("\n")[:-1]
    except OSError:
        return {}
    values: dict[str, float] = {}
    for line in lines:
        cells = line.split("\t")
        if len(cells) == len(names):
            values.update((name, float(cell)) for name, cell in zip(names, cells, strict=True) if cell != MISSING)
    return values


def liveness_seconds(run_dir: Path) -> float:
    """How long a rank of this run may stand still before it counts as dead."""
    try:
        return float(json.loads((run_dir / "config.json").read_text())["options"]["population"]["gossip_liveness"])
    except (OSError, ValueError, KeyError):  # a run that has only begun
        return 30.0


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


if __name__ == "__main__":
    run_main(main)
