"""Show the population of a run, from the files in its folder and its gossip_logs/, which it reads only.

python watch.py runs/local_20260101_120000           # again every 2 s, until all ranks have left or Ctrl-C
python watch.py runs/local_20260101_120000 --once
"""

import runtime.packages  # noqa: F401  # isort: skip

import statistics
import threading
import time
from collections import defaultdict
from pathlib import Path

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from runtime.arguments import ArgumentParser, normalise_flags, run_main
from runtime.errors import UserError
from runtime.stdout import writing_to_stdout
from training.metrics import bits
from training.onlooker import COUNTS, FLOW_MINUTES, Onlooker, Row, View, population_seconds, thinned

REFRESH_SECONDS = 2.0
LOOK_SECONDS = 1.0  # that a look may read tables; a slow filesystem is read over several looks
PATIENCE_HEARTBEATS = 3  # that --once gives a rank that seems silent by the time of its file, to show that it lives
SLOW_SECONDS = 10.0  # without an answer from the files, after which that is said
WIDTH_OF_A_FILE = 120  # columns; there is no screen whose edge would cut a long number
WIDE = 100  # columns from which all counts have a place
NARROW_COUNTS = ("won", "lost", "failed")
COUNT_HEADINGS = {"averaged": "mean", "rolled_back": "undone"}
BARS = "▁▂▃▄▅▆▇█"
TREND_PLACES = 10
FLOW_LINES = 6
CAPTION = "bits: moving average of the training loss; best: of the fitness; beat: since the last sign of life"


class Reader(threading.Thread):
    """Looks again and again on a thread of its own, so that files that do not answer hold up nothing on the screen."""

    def __init__(self, onlooker: Onlooker) -> None:
        super().__init__(name="reader", daemon=True)
        self.view: View | None = None
        self.looked = time.monotonic()
        self.error: Exception | None = None
        self._onlooker = onlooker

    def run(self) -> None:
        """Until all ranks have left."""
        try:
            while self.view is None or not self.view.over:
                self.view = self._onlooker.look(LOOK_SECONDS)
                self.looked = time.monotonic()
                time.sleep(REFRESH_SECONDS)
        except Exception as error:
            self.error = error


def main(arguments: list[str]) -> None:
    """The command line."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the folder that train.py --output named")
    parser.add_argument("--once", action="store_true", help="print the population once and exit")
    options = parser.parse_args(normalise_flags(arguments))
    try:
        found = any((options.run_dir / name).is_dir() for name in ("population", "metrics"))
    except OSError as error:
        raise UserError(
            f"expected a readable run directory, got {options.run_dir} ({error.strerror}): mend it, or try again"
        ) from None
    if not found:
        raise UserError(
            f"expected a run directory, got {options.run_dir}, without population/ or metrics/: check the path"
        )
    onlooker = Onlooker(options.run_dir)
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, WIDTH_OF_A_FILE)
    if options.once:
        population = screen(options.run_dir, look_once(onlooker), console.width)
        with writing_to_stdout():
            console.print(population)
        return
    try:
        follow(options.run_dir, Reader(onlooker), console)
    except KeyboardInterrupt:
        return


def look_once(onlooker: Onlooker) -> View:
    """The population now. A rank that seems silent may have its files' times from another host's clock, and gets the
    time to show that it lives."""
    view = onlooker.look()
    if any(row.state == "silent" for row in view.rows):
        time.sleep(PATIENCE_HEARTBEATS * population_seconds(onlooker.run_dir, "gossip_heartbeat", 2.0))
        view = onlooker.look()
    return view


def follow(run_dir: Path, reader: Reader, console: Console) -> None:
    """Draw what `reader` sees until all ranks have left. Raises what ended the reader."""
    reader.start()
    with writing_to_stdout(), Live(Text(f"reading {run_dir}"), console=console, auto_refresh=False) as live:
        while reader.error is None:
            view, silence = reader.view, time.monotonic() - reader.looked
            if view is not None:
                live.update(screen(run_dir, view, console.width, console.height, silence), refresh=True)
                if view.over:
                    return
            time.sleep(REFRESH_SECONDS / 4)
    raise reader.error


def screen(run_dir: Path, view: View, width: int, height: int | None = None, silence: float = 0.0) -> Group:
    """All there is to see, in `width` columns; where it has a height, of many ranks the best, the silent, the worst."""
    below = [Text(line) for line in (*elite_lines(view), *flow_lines(view))]
    rows = view.rows if height is None else choose(view.rows, max(4, height - len(below) - 8))
    above = [Text(summary(view, len(rows)))]
    if silence > SLOW_SECONDS:
        above.append(Text(f"the files have not answered for {age(silence)}: this is how they were"))
    return Group(*above, make_table(run_dir, rows, width), *below)


def summary(view: View, shown: int) -> str:
    """The population in one line."""
    states: dict[str, int] = defaultdict(int)
    for row in view.rows:
        states["running" if row.state == "leads" else row.state] += 1
    ranks = "1 rank" if len(view.rows) == 1 else f"{len(view.rows)} ranks"
    parts = [f"{ranks} ({', '.join(f'{count} {state}' for state, count in states.items())})"]
    if shown < len(view.rows):
        parts.append(f"{shown} shown")
    leader = next((row.rank for row in view.rows if row.state == "leads"), None)
    if leader is not None:
        parts.append(f"rank {leader} leads")
    known = sorted((row.best, row.rank) for row in view.rows if row.best is not None)
    if known:
        middle = statistics.median(best for best, _ in known)
        parts.append(f"best {bits(known[0][0]):.3f} (rank {known[0][1]}), median {bits(middle):.3f} bits/byte")
    speed = sum(row.bytes_per_s or 0 for row in view.rows if row.state in ("leads", "running"))
    if speed:
        parts.append(f"{speed / 1000:,.1f} kB/s in all")
    return " · ".join(parts)


def choose(rows: tuple[Row, ...], places: int) -> tuple[Row, ...]:
    """All rows where they have a place; else a quarter for the silent, and of the others the best and a few worst, and
    those whose loss is not known yet where there is room."""
    if len(rows) <= places:
        return rows
    silent = [row for row in rows if row.state == "silent"][: places // 4]
    others = sorted((row for row in rows if row not in silent and row.best is not None), key=lambda row: row.best)
    unknown = [row for row in rows if row not in silent and row.best is None]
    left = places - len(silent)
    worst = others[-(left // 4) :] if left // 4 and len(others) > left else []
    chosen = [*others[: left - len(worst)], *worst]
    return (*chosen, *unknown[: left - len(chosen)], *silent)


def make_table(run_dir: Path, rows: tuple[Row, ...], width: int) -> Table:
    """The table of these ranks; the best loss stands out."""
    wide = width >= WIDE
    counts = COUNTS if wide else NARROW_COUNTS
    table = Table(title=Text(str(run_dir)), caption=CAPTION, box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    headings = ["rank", "state", "trend", "bits", *(["best"] if wide else []), "held-out", "step", "kB/s", "beat"]
    for heading in (*headings, *(COUNT_HEADINGS.get(name, name) for name in counts)):
        table.add_column(heading, justify="left" if heading in ("state", "trend") else "right", no_wrap=True)
    best = min((row.best for row in rows if row.best is not None), default=None)
    for row in rows:
        numbers = dict(zip(COUNTS, row.counts, strict=True))
        table.add_row(
            str(row.rank),
            row.state,
            sparkline(row.trend),
            _number(row.loss and bits(row.loss), ".3f"),
            *([_number(row.best and bits(row.best), ".3f")] if wide else []),
            _number(row.held_out and bits(row.held_out), ".3f"),
            _number(row.step, ","),
            _number(row.bytes_per_s and row.bytes_per_s / 1000, ",.1f"),
            "-" if row.beat_seconds is None else age(row.beat_seconds),
            *(_number(numbers[name], "d") for name in counts),
            style="bold" if row.best is not None and row.best == best else None,
        )
    return table


def elite_lines(view: View) -> list[str]:
    """The population's best checkpoints."""
    if not view.elites:
        return []
    names = (
        f"rank {elite.rank} step {elite.step:,}" + ("" if elite.loss is None else f" ({bits(elite.loss):.3f})")
        for elite in view.elites
    )
    return ["elites: " + ", ".join(names)]


def flow_lines(view: View) -> list[str]:
    """Whose weights went to whom in the last minutes, who gave most first."""
    if view.flow_until is None:
        return []
    title = f"weights merged in the {FLOW_MINUTES} minutes to {view.flow_until:%H:%M:%S} UTC"
    if not view.flow:
        return [f"{title}: none"]
    given: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for (sender, receiver), times in view.flow.items():
        given[sender].append((times, receiver))
    senders = sorted(given, key=lambda sender: -sum(times for times, _ in given[sender]))
    lines = [f"{title}: {sum(view.flow.values())}"]
    for sender in senders[:FLOW_LINES]:
        receivers = sorted(given[sender], key=lambda pair: (-pair[0], pair[1]))
        names = [f"{receiver}" + (f" ×{times}" if times > 1 else "") for times, receiver in receivers[:FLOW_LINES]]
        more = len(receivers) - len(names)
        lines.append(f"  {sender:>4} → {', '.join(names)}" + (f" and {more} more" if more else ""))
    if len(senders) > FLOW_LINES:
        lines.append(f"  and from {len(senders) - FLOW_LINES} more ranks")
    return lines


def sparkline(values: tuple[float, ...]) -> str:
    """The way of a loss in TREND_PLACES characters at most, from its lowest to its highest bar."""
    means = thinned(values, TREND_PLACES)
    if not means:
        return "-"
    low, high = min(means), max(means)
    steps = [(mean - low) / (high - low) if high > low else 0.0 for mean in means]
    return "".join(BARS[round(step * (len(BARS) - 1))] for step in steps)


def age(seconds: float) -> str:
    """A time in four characters at most."""
    for size, unit in ((1, "s"), (60, "m"), (3600, "h")):
        if seconds < 100 * size:
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds / 86400:.0f}d"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


if __name__ == "__main__":
    run_main(main)
