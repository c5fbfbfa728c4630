"""A population as its files tell of it: read again and again by somebody who takes no part. Nothing here writes."""

import json
import os
import re
import statistics
import time
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from gossip.registry import rank_file, rank_files, read_entry, read_ranking
from gossip.sightings import Sightings
from training.metrics import MISSING
from training.tail import TableTail

COUNTS = ("won", "lost", "averaged", "rolled_back", "tied", "failed", "busy")
FLOW_MINUTES = 5
FEW = 32  # ranks whose own entries are read at every look; of more the leader's fold is, while it moves
STILL_SECONDS = 10.0  # after which a fold that does not move is not enough
TREND_ROWS = 2000
LOG_TAIL_BYTES = 256 * 1024  # five merges a second in FLOW_MINUTES
_METRICS = re.compile(r"rank_(\d{4,})\.tsv")
_ELITE = re.compile(r"checkpoint_rank_(\d+)_step_(\d+)_loss_([\d.]+|NA)\.pt")


@dataclass(frozen=True)
class Row:
    """What is known of one rank; losses in nats per byte, None where a value is not known.

    loss: the newest moving average; trend: that of the rows read, oldest first; best: its fitness at its best, without
    a registry its newest; beat_seconds: since its last sign of life; counts: by COUNTS.
    """

    rank: int
    state: str
    loss: float | None
    trend: tuple[float, ...]
    best: float | None
    held_out: float | None
    step: int | None
    bytes_per_s: float | None
    beat_seconds: float | None
    counts: tuple[int | None, ...]


@dataclass(frozen=True)
class Elite:
    """A checkpoint among the population's best; loss in nats per byte."""

    rank: int
    step: int
    loss: float | None


@dataclass(frozen=True)
class View:
    """The population at one look. flow: merges by (sender, receiver) in the FLOW_MINUTES before each receiver's newest
    event, of the ranks that are not gone, unless all are; flow_until: the middle one of these events, None without any;
    over: every rank that was seen has left."""

    rows: tuple[Row, ...]
    elites: tuple[Elite, ...]
    flow: dict[tuple[int, int], int]
    flow_until: datetime | None
    over: bool


class Metrics:
    """One rank's metrics as far as they were read."""

    def __init__(self, path: Path) -> None:
        self.tail = TableTail(path)
        self.values: dict[str, float] = {}
        self.trend: deque[float] = deque(maxlen=TREND_ROWS)

    def read(self) -> None:
        """Take in what is new: each column's newest number, and the losses on their way. Raises OSError."""
        rows = self.tail.read()
        if self.tail.is_anew:  # a resumed run's, which holds what was read before
            self.trend.clear()
        for row in rows:
            numbers = {name: number for name, cell in row.items() if (number := _number(cell)) is not None}
            self.values.update(numbers)
            if "ema_loss" in numbers:
                self.trend.append(numbers["ema_loss"])


class Flow:
    """The merges of each rank's last minutes, from the event logs of all, on the clock of who wrote them: hosts' clocks
    may be far apart."""

    def __init__(self) -> None:
        self._until: dict[int, datetime] = {}  # each rank's newest event
        self._merges: list[tuple[datetime, int, int]] = []

    def add(self, rows: Iterable[dict[str, str]]) -> None:
        """Take in rows of one event log."""
        for row in rows:
            try:
                when, rank = datetime.fromisoformat(row["timestamp"].replace("Z", "+00:00")), int(row["rank"])
                self._until[rank] = max(self._until.get(rank, when), when)
                if row["event"] in ("merged", "averaged"):
                    self._merges.append((when, int(row["peer"]), rank))
            except (KeyError, ValueError, TypeError):  # of another version, or torn where a disk was full
                continue

    def until(self, ranks: set[int]) -> datetime | None:
        """The newest event of the rank in the middle of `ranks`; None without any."""
        newest = [when for rank, when in self._until.items() if rank in ranks]
        return statistics.median_low(newest) if newest else None

    def counted(self, ranks: set[int]) -> dict[tuple[int, int], int]:
        """How often weights went from one rank to another of `ranks`."""
        span = timedelta(minutes=FLOW_MINUTES)
        self._merges = [merge for merge in self._merges if merge[0] > self._until[merge[2]] - span]
        return dict(Counter((sender, receiver) for _, sender, receiver in self._merges if receiver in ranks))


class Onlooker:
    """Reads a run's files, each byte of growing ones once, and notices on its own clock which ranks move no more."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._population = run_dir / "population"
        self._sightings = Sightings(population_seconds(run_dir, "gossip_liveness", 30.0))
        self._beats: dict[int, tuple[tuple[str, int], float]] = {}  # the newest sign of life, and when it came
        self._ranking: dict[str, Any] = {}
        self._ranking_moved = time.monotonic()
        self._metrics: dict[int, Metrics] = {}
        self._flow = Flow()
        self._logs: dict[Path, TableTail] = {}
        self._next = 0

    def look(self, seconds: float = float("inf")) -> View:
        """The population as its files are now; tables are read for `seconds` at most, and the others at later looks."""
        now = time.monotonic()
        self._read_registry(now)
        for name in _names(self.run_dir / "metrics"):
            if match := _METRICS.fullmatch(name):
                self._metrics.setdefault(int(match[1]), Metrics(self.run_dir / "metrics" / name))
        self._find_logs()
        self._read_tables(now + seconds)
        entries = self._sightings.entries
        rows = tuple(self._row(rank, now) for rank in sorted(self._metrics.keys() | entries.keys()))
        size = world_size(self.run_dir)
        if size is not None:  # a rank that a launch of fewer has left behind is no part of the population any more
            rows = tuple(row for row in rows if row.rank < size or row.state in ("leads", "running"))
        known = [row for row in rows if row.rank in entries]
        over = bool(known) and all(row.state == "left" for row in known)
        ranks = {row.rank for row in rows if row.state not in ("silent", "left")} or {row.rank for row in rows}
        return View(rows, read_elites(self.run_dir), self._flow.counted(ranks), self._flow.until(ranks), over)

    def _read_registry(self, now: float) -> None:
        try:
            ranking = read_ranking(self._population)
        except (OSError, ValueError):
            ranking = {}
        if _stamp(ranking) != _stamp(self._ranking):
            self._ranking_moved = now
        self._ranking = ranking
        for entry in ranking.get("members", ()):
            self._sightings.observe(entry, now)
        first = not self._beats
        if first or len(self._beats) <= FEW or now - self._ranking_moved > STILL_SECONDS:
            try:
                files = rank_files(self._population)
            except OSError:  # there is none, or it may answer at the next look
                files = []
            for rank, path in files:
                try:
                    self._sightings.observe(read_entry(rank, path), now)
                except (OSError, ValueError):  # torn, or just replaced: what was seen before stays
                    continue
        for rank, entry in self._sightings.entries.items():
            sign = entry["incarnation"], entry["sequence"]
            # When the first one came is not known on this clock: the file's time has to do. It may be another clock's,
            # and one in the future then says as little as an old one.
            if rank not in self._beats:
                self._beats[rank] = sign, now - _age(rank_file(self._population, rank))
            elif self._beats[rank][0] != sign:
                self._beats[rank] = sign, now

    def _find_logs(self) -> None:
        wanted = re.compile(re.escape(self.run_dir.resolve().name) + r"_rank_\d{4,}\.tsv")
        if not self._logs:
            folders = [place / "gossip_logs" for place in _log_places(self.run_dir)]
        elif len(self._logs) < len(self._metrics):
            folders = [next(iter(self._logs)).parent]
        else:
            return
        for folder in folders:
            for name in filter(wanted.fullmatch, _names(folder)):
                self._logs.setdefault(folder / name, TableTail(folder / name, LOG_TAIL_BYTES))
            if self._logs:
                return

    def _read_tables(self, deadline: float) -> None:
        tables = [*self._metrics.values(), *self._logs.values()]
        for _ in tables:
            table = tables[self._next % len(tables)]
            self._next += 1
            try:
                table.read() if isinstance(table, Metrics) else self._flow.add(table.read())
            except OSError:  # it may answer at the next look
                continue
            if time.monotonic() > deadline:
                return

    def _row(self, rank: int, now: float) -> Row:
        beat = self._beats.get(rank)
        metrics = self._metrics.get(rank)
        return make_row(
            rank,
            self._state(rank, now),
            self._sightings.entries.get(rank, {}),
            metrics.values if metrics else {},
            tuple(metrics.trend) if metrics else (),
            None if beat is None else max(0.0, now - beat[1]),
        )

    def _state(self, rank: int, now: float) -> str:
        if rank not in self._sightings.entries:
            return "unknown"  # it has metrics alone: no shared registry
        if self._sightings.left(rank):
            return "left"
        # A leader that was killed leaves a ranking in which all live: each one's own sign of life counts too.
        still = now - self._beats[rank][1] >= self._sightings.timeout_seconds
        if still or (self._ranking and rank not in self._ranking["live"]):
            return "silent"
        return "leads" if rank == self._ranking.get("leader") else "running"


def make_row(
    rank: int,
    state: str,
    entry: dict[str, Any],
    metrics: dict[str, float],
    trend: tuple[float, ...] = (),
    beat_seconds: float | None = None,
) -> Row:
    """One rank's row from what it published last, and where it did not, from its metrics."""

    def value(name: str) -> Any:
        found = entry.get(name)
        return found if isinstance(found, int | float) else metrics.get(name)

    best, step = value("best_fitness"), value("step")
    return Row(
        rank=rank,
        state=state,
        loss=metrics.get("ema_loss", value("fitness")),
        trend=trend,
        best=metrics.get("probe_loss", metrics.get("ema_loss")) if best is None else best,
        held_out=metrics.get("val_loss"),
        step=None if step is None else int(step),
        bytes_per_s=value("bytes_per_s"),
        beat_seconds=beat_seconds,
        counts=tuple(None if value(name) is None else int(value(name)) for name in COUNTS),
    )


def read_elites(run_dir: Path) -> tuple[Elite, ...]:
    """The population's best checkpoints, best first, by the names that the links point to."""
    found = []
    for name in sorted(name for name in _names(run_dir) if re.fullmatch(r"elite_\d+\.pt", name)):
        link = run_dir / name
        try:
            match = _ELITE.fullmatch(link.readlink().name)
        except OSError:  # replaced meanwhile
            continue
        if match:
            found.append(Elite(int(match[1]), int(match[2]), None if match[3] == MISSING else float(match[3])))
    return tuple(found)


def world_size(run_dir: Path) -> int | None:
    """The number of ranks of the run's newest launch, as config.json has it; None where it cannot be read."""
    try:
        return int(json.loads((run_dir / "config.json").read_bytes())["world_size"])
    except (OSError, ValueError, KeyError, TypeError):  # a run that has only begun
        return None


def population_seconds(run_dir: Path, option: str, default: float) -> float:
    """What the run's config.json says of this option of the population."""
    try:
        return float(json.loads((run_dir / "config.json").read_bytes())["options"]["population"][option])
    except (OSError, ValueError, KeyError, TypeError):  # a run that has only begun
        return default


def thinned(values: tuple[float, ...], places: int) -> list[float]:
    """`places` means of equally many neighbours each, or all values where there are fewer."""
    if len(values) <= places:
        return list(values)
    edges = [round(place * len(values) / places) for place in range(places + 1)]
    return [statistics.fmean(values[edges[place] : edges[place + 1]]) for place in range(places)]


def _log_places(run_dir: Path) -> list[Path]:
    """Where gossip_logs/ may be: where the run was started; else, as it was moved, beside it or above that."""
    try:
        started = [Path(json.loads((run_dir / "config.json").read_bytes())["working_directory"])]
    except (OSError, ValueError, KeyError, TypeError):  # a run that has only begun
        started = []
    return [*started, *run_dir.resolve().parents[:2]]


def _names(folder: Path) -> list[str]:
    """The names in a folder; none where there is no such folder, or it cannot be read: it may be at the next look."""
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _stamp(ranking: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(ranking.get(name) for name in ("leader", "incarnation", "sequence"))


def _age(path: Path) -> float:
    try:
        return abs(time.time() - path.stat().st_mtime)
    except OSError:
        return 0.0


def _number(cell: str) -> float | None:
    try:
        return None if cell == MISSING else float(cell)
    except ValueError:
        return None
