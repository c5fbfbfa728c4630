"""A corpus in the making: what is written so far, and a journal of how far it is known to be good.

Beside OUTPUT lie OUTPUT.partial, the bytes, and OUTPUT.partial.json, the journal: from where the inputs are to be read
on, and how many bytes of the partial file come from before that place. The bytes are synced before the journal that
counts them is renamed into place, so that whatever is killed, and whenever, the journal speaks of bytes that are there;
bytes beyond them are cut off and written again.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.errors import UserError
from runtime.files import sync_folder
from runtime.stderr import say

_FORMAT = 1


@dataclass
class Tally:
    """What was written to a corpus: bytes in all, documents, those left out for want of bytes, delimiters found inside.

    in_document: the last byte's document is not at its end. touched: the document at hand has had bytes or delimiters.
    """

    written: int = 0
    documents: int = 0
    empty: int = 0
    delimiters: int = 0
    in_document: bool = False
    touched: bool = False


@dataclass
class Place:
    """Where to read on: the number of the file, and a position in it."""

    file: int = 0
    position: int = 0


class PartialCorpus:
    """Opens, or begins, the partial file of `output` and holds it alone; `digest` tells one set of inputs from another.

    place, tally: where to go on. sink: the file to write to, at its end. Raises UserError for an output that is there,
    a partial file of other inputs or in use, and OSError if it cannot be written. A context manager: closes.
    """

    def __init__(self, output: Path, digest: str) -> None:
        self._output = output
        self._digest = digest
        self.path, self._journal, self._next_journal = partial_paths(output)
        self.place, self.tally = Place(), Tally()
        self.sink = open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        with contextlib.ExitStack() as undoing:
            undoing.callback(self.sink.close)
            self._hold()
            self._go_on()
            undoing.pop_all()

    def __enter__(self) -> "PartialCorpus":
        return self

    def __exit__(self, *_) -> None:
        self.sink.close()

    def mark(self, place: Place, tally: Tally) -> None:
        """What is written now stays, whatever comes. Raises OSError."""
        self.sink.flush()
        os.fsync(self.sink.fileno())
        content = {
            "format": _FORMAT,
            "inputs": self._digest,
            "place": dataclasses.asdict(place),
            "tally": dataclasses.asdict(tally),
        }
        with open(self._next_journal, "w") as file:  # a name that does not change: a kill leaves one such file at most
            file.write(json.dumps(content) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(self._next_journal, self._journal)
        sync_folder(self._journal.parent)
        self._marked = tally.written

    def finish(self) -> None:
        """The partial file becomes the output. Raises OSError, and UserError if there is one by now."""
        self.sink.flush()
        os.fsync(self.sink.fileno())
        refuse_existing(self._output)
        os.rename(self.path, self._output)
        sync_folder(self._output.parent)
        self._journal.unlink()

    def discard_unmarked(self) -> None:
        """Leave nothing behind, if nothing would be lost."""
        if not self._marked:
            for path in partial_paths(self._output):
                path.unlink(missing_ok=True)

    def _hold(self) -> None:
        try:
            fcntl.flock(self.sink, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"expected {self.path} to be free, got a process writing it: end that first") from None
        except OSError as error:
            say(f"warning: {self.path.parent} has no file locks ({error.strerror}): let one process write there")
        if self._output.exists():  # whoever held it has just finished
            if self.path.exists() and self.path.stat().st_size == 0:
                self.path.unlink()
            refuse_existing(self._output)

    def _go_on(self) -> None:
        size = self.sink.seek(0, os.SEEK_END)
        again = f"remove {self.path} and {self._journal.name} beside it to begin again"
        if size > 0:
            journal = self._read_journal(again)
            if journal["inputs"] != self._digest:
                raise UserError(
                    f"expected the files, unchanged, and the options that {self.path} was begun with, got others: "
                    f"give those, or {again}"
                )
            self.place, self.tally = Place(**journal["place"]), Tally(**journal["tally"])
            if size < self.tally.written:
                raise UserError(f"expected {self.tally.written:,} bytes in {self.path}, got {size:,}: {again}")
            self.sink.truncate(self.tally.written)
            self.sink.seek(self.tally.written)
        self.mark(self.place, self.tally)

    def _read_journal(self, again: str) -> dict[str, Any]:
        try:
            journal = json.loads(self._journal.read_text())
            if journal["format"] != _FORMAT:
                raise ValueError(f"format {journal['format']}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"expected the journal {self._journal}, got none that fits ({error}): {again}") from None
        return journal


def partial_paths(output: Path) -> tuple[Path, Path, Path]:
    """The partial file of an output, its journal, and the journal while it is written."""
    journal = output.with_name(f"{output.name}.partial.json")
    return output.with_name(f"{output.name}.partial"), journal, journal.with_name(f"{journal.name}.new")


def refuse_existing(output: Path) -> None:
    """Raise UserError if the output is there."""
    if os.path.exists(output):
        partial, journal, _ = partial_paths(output)
        if not partial.exists():
            journal.unlink(missing_ok=True)  # of a process that was killed just after its last rename
        raise UserError(f"expected a new file, got {output}, which exists: remove it or choose another --output")
