"""Documents become a corpus: one delimiter between any two, streamed, and in a way that a killed process can go on."""

import contextlib
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from preparation.documents import check_files, read_pieces
from preparation.partial import PartialCorpus, Place, Tally, refuse_existing
from runtime.errors import UserError
from runtime.stderr import say

DELIMITER = b"\x1e"
MARK_BYTES = 64 << 20  # read and written between two marks: what a kill costs, at most


class CorpusWriter:
    """Writes documents to `sink` with one delimiter between any two, and at most `max_bytes` in all.

    tally: of what was written before, to go on with.
    """

    def __init__(self, sink: BinaryIO, max_bytes: int | None, tally: Tally | None = None) -> None:
        self._sink = sink
        self._max_bytes = max_bytes
        self.tally = tally or Tally()

    @property
    def full(self) -> bool:
        """True when nothing more fits."""
        return self.tally.written == self._max_bytes

    def write(self, piece: bytes) -> None:
        """Add bytes to the document at hand; each delimiter in them ends it."""
        tally = self.tally
        for index, part in enumerate(piece.split(DELIMITER)):
            if self.full:
                return
            if index > 0:
                tally.delimiters += 1
                tally.in_document, tally.touched = False, True
            if part and not tally.in_document:
                if tally.documents:
                    part = DELIMITER + part
                tally.in_document = tally.touched = True
                tally.documents += 1
            self._put(part)

    def end_document(self) -> None:
        """What is written next belongs to another document."""
        if not self.tally.touched:
            self.tally.empty += 1
        self.tally.in_document = self.tally.touched = False

    def _put(self, content: bytes) -> None:
        if self._max_bytes is not None:
            content = content[: self._max_bytes - self.tally.written]
        self._sink.write(content)
        self.tally.written += len(content)


def join(files: Sequence[Path], output: Path, text_field: str = "text", max_bytes: int | None = None) -> Tally:
    """Write the documents of `files`, in this order, to `output`, whole or not at all; go on with what a kill left.

    Raises UserError for an input that is not as it should be, for an output that is there, for a partial file of other
    inputs, and if there are no bytes; OSError if `output` cannot be written. After an error what is marked of it stays.
    """
    refuse_existing(output)
    check_files(files)
    output.parent.mkdir(parents=True, exist_ok=True)
    with PartialCorpus(output, _digest(files, text_field, max_bytes)) as partial:
        if partial.tally.written:
            say(f"going on with {partial.path}: {partial.tally.written:,} bytes are there")
        writer = CorpusWriter(partial.sink, max_bytes, partial.tally)
        with contextlib.ExitStack() as undoing:
            undoing.callback(partial.discard_unmarked)
            _copy(files, text_field, partial, writer)
            if writer.tally.written == 0:
                raise UserError(f"expected bytes to join, got {len(files)} files without any: name others")
            undoing.pop_all()
        partial.finish()
    return writer.tally


def _copy(files: Sequence[Path], text_field: str, partial: PartialCorpus, writer: CorpusWriter) -> None:
    sizes = [path.stat().st_size for path in files]
    start = partial.place
    behind = sum(sizes[: start.file])
    marked = behind + writer.tally.written
    with tqdm(total=sum(sizes), initial=behind, unit="B", unit_scale=True, unit_divisor=1024, disable=None) as bar:
        for number in range(start.file, len(files)):
            position = start.position if number == start.file else 0
            for piece in read_pieces(files[number], text_field, position):
                writer.write(piece.content)
                if piece.ends:
                    writer.end_document()
                if writer.full:
                    return
                bar.update(behind + piece.raw - bar.n)
                handled = behind + piece.raw + writer.tally.written
                if piece.position is not None and handled - marked >= MARK_BYTES:
                    partial.mark(Place(number, piece.position), writer.tally)
                    marked = handled
            behind += sizes[number]


def _digest(files: Sequence[Path], text_field: str, max_bytes: int | None) -> str:
    """Of what decides the corpus: the files in their order, by name, size and time of change, and the options."""
    digest = hashlib.sha256(repr((text_field, max_bytes)).encode())
    for path in files:
        status = path.stat()
        digest.update(repr((str(path), status.st_size, status.st_mtime_ns)).encode())
    return digest.hexdigest()
