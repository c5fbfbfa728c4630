"""What a run says of itself: metrics/rank_0000.tsv, logs/train_<run>_rank_0000.log and the progress bar."""

import fcntl
import functools
import math
import os
import sys
import time
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from runtime.errors import UserError
from runtime.files import atomic_writer, set_aside
from runtime.scribe import Hand, at_once
from runtime.stderr import say

COLUMNS = (
    "rank", "step", "time_s", "loss", "ema_loss", "val_loss", "bytes_seen", "bytes_per_s", "lr", "grad_norm",
    "documents", "mixes_initiated", "mixes_received", "won", "lost", "averaged", "tied", "failed", "busy",
    "rolled_back", "lineage", "cpu_s", "bytes_sent", "bytes_received", "probe_loss", "probe_s", "distance", "base_lr",
    "weight_decay", "grad_clip",
)  # fmt: skip
MISSING = "NA"


def bits(nats: float) -> float:
    """Nats per byte as bits per byte."""
    return nats / math.log(2)


class MetricsFile:
    """A rank's metrics as tab-separated values: losses in nats per byte, a missing value is NA."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def create(self) -> None:
        """Make the file, with its header. Raises FileExistsError if there is one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "x") as file:
            file.write(_line(COLUMNS))

    def rewind(self, step: int) -> None:
        """Drop the rows after `step`, which a resumed run is about to write again, and damaged ones; make the file if
        it is missing. Rows of a version with other columns are brought into these. Raises OSError.
        """
        if not self.path.exists():
            self.create()
            return
        with open(self.path, newline="\n", errors="replace") as file, atomic_writer(self.path) as kept:
            kept.write(_line(COLUMNS).encode())
            lines = (line[:-1].split("\t") for line in file if line.endswith("\n"))  # the last one may be cut
            header = next(lines, [])
            for cells in lines:
                row = dict(zip(header, cells, strict=False)) if len(cells) == len(header) else {}
                if row.get("step", "").isdecimal() and int(row["step"]) <= step:
                    kept.write(_line(row.get(name, MISSING) for name in COLUMNS).encode())

    def append(self, row: dict[str, Any]) -> None:
        """Add one row; columns that `row` lacks, or None or not a number in it, are NA. Raises OSError.

        A file that was removed is made again, with its folder, unless the run directory is gone too.
        """
        if not self.path.exists():
            self.path.parent.mkdir(exist_ok=True)
            self.create()
        with open(self.path, "a+b") as file:
            size = file.seek(0, os.SEEK_END)
            cut = size > 0 and os.pread(file.fileno(), 1, size - 1) != b"\n"  # the disk was full within a line
            file.write(("\n" * cut + _line(_cell(row.get(name)) for name in COLUMNS)).encode())


def _line(cells: Iterable[str]) -> str:
    return "\t".join(cells) + "\n"


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return MISSING
    return f"{value:.6g}" if isinstance(value, float) else str(value)


class RunLog:
    """The human's log: plain lines with the time in front, in a file and, where wanted, on standard error.

    Opening raises UserError, also where another living process writes the file; after that a full disk must not stop
    training: a line that cannot be written is counted in `lost` and said on standard error once. hand: who does the
    writing, so that a disk that hangs holds up nobody else.
    """

    def __init__(self, path: Path, echo: bool, hand: Hand = at_once) -> None:
        self._path = path
        self._hand = hand
        self._file = self._open()
        self._echo = echo
        self.lost = 0

    def _open(self) -> BinaryIO:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            file = open(self._path, "ab", buffering=0)
        except OSError as error:
            raise UserError(f"expected to write a log to {self._path}, got {error.strerror}: mend its folder") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise UserError(
                f"expected {self._path} to be free, got a living run of this name that writes it: end that first, give "
                "--output another last name, or start in another folder"
            ) from None
        except OSError:  # a filesystem without locks
            pass
        return file

    def begin_anew(self) -> None:
        """Begin an empty file; what an earlier run of this name has written is kept as <name>.1, <name>.2, ..."""
        set_aside(self._path)  # while it is held
        self._file.close()
        self._file = self._open()

    def line(self, text: str, echo: bool | None = None) -> None:
        """Write one line; `echo` overrides whether standard error gets it too."""
        stamped = f"{datetime.now(timezone.utc).strftime('%Y-%m-%d %H:%M:%S')} {text}"
        self._hand(functools.partial(self._write, stamped, self._echo if echo is None else echo))

    def _write(self, stamped: str, echo: bool) -> None:
        try:
            if self._file.closed:
                self._file = open(self._path, "ab", buffering=0)
            self._file.write(f"{stamped}\n".encode(errors="backslashreplace"))
        except OSError as error:
            self._lose(error)
        if echo:
            say(stamped)

    def _lose(self, error: OSError) -> None:
        self.lost += 1
        if self.lost == 1:
            say(f"warning: the log cannot be written ({error.strerror}); training goes on")

    def mix(self, event: str, *account: Any) -> None:
        """Write the line of a conversation that moved weights or failed, told as to mix_line(); any thread."""
        line = mix_line(event, *account)
        if line is not None:
            self.line(line)

    def close(self) -> None:
        """Close the file, after what was handed over before; a later line opens it again."""
        self._hand(self._close)

    def _close(self) -> None:
        try:
            self._file.close()
        except OSError as error:  # a network filesystem says here what became of earlier writes
            self._lose(error)


def report_line(row: dict[str, Any]) -> str:
    """A row of the metrics for people: fixed columns, losses in bits per byte, a dash for what was not measured."""

    def loss(name: str) -> str:
        value = row.get(name)
        return "      -" if value is None or not math.isfinite(value) else f"{bits(value):7.4f}"

    counts = "  ".join(f"{name} {row[name]:>4}" for name in ("won", "lost", "averaged", "tied", "failed"))
    return (
        f"{_step(row['step'])}  loss {loss('loss')}  ema {loss('ema_loss')}  held-out {loss('val_loss')} bits/byte  "
        f"{row['bytes_per_s'] / 1000:9.1f} kB/s  {counts}"
    )


def mix_line(
    event: str, step: int | None, peer: int | str, nbytes: int | None, milliseconds: float | None, message: str
) -> str | None:
    """A conversation for people: how much in which time, or why not in one phrase; None where nothing was to be moved.

    event, message: as in gossip_logs/; peer: a rank, or an address that never said its rank.
    """
    who = f"rank {peer:>4}" if isinstance(peer, int) else peer
    if event in ("sent", "merged", "averaged"):
        message = f"{(nbytes or 0) / 1e6:9.1f} MB in {(milliseconds or 0) / 1000:8.3f} s"
    elif event in ("tied", "busy"):
        return None
    return f"{_step(step)}  {event:<11}  {who}  {message}"


def _step(step: int | None) -> str:
    return f"step {'-' if step is None else step:>8}"


class Progress:
    """Rank 0's bar: steps, bits per byte, bytes/s, mixes; on a terminal only, where a bar can be redrawn."""

    def __init__(self, first_step: int, train_steps: int | None, deadline: float | None) -> None:
        self._deadline = deadline
        self._bar = tqdm(
            total=train_steps, initial=first_step, unit="step", dynamic_ncols=True, mininterval=0.5, file=sys.stderr
        )

    def update(self, step: int, loss: float | None, bytes_per_s: float | None, mixes: dict[str, int]) -> None:
        """Show a step; loss in nats per byte."""
        left = "" if self._deadline is None else f", {max(0.0, self._deadline - time.monotonic()):.0f} s left"
        shown = "..." if loss is None else f"{bits(loss):.3f}"
        rate = "..." if bytes_per_s is None else f"{bytes_per_s / 1000:.1f}"
        try:
            self._bar.set_postfix_str(
                f"{shown} bits/byte, {rate} kB/s, {mixes['won']} won {mixes['lost']} lost{left}", refresh=False
            )
            self._bar.update(step - self._bar.n)
        except OSError:  # the terminal is gone, and with it whoever looked at the bar
            self._bar.disable = True

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()
