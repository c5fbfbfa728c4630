"""Join any files into one byte corpus for train.py, with byte 0x1e between documents.

    python prepare_data.py books/ 'notes/**/*.txt' --output corpus/mine.txt
    python prepare_data.py --python_stdlib --output corpus/python_stdlib.txt

Each file is one document. The documents come in a random order of the seed's choosing, so that the end of the corpus,
which train.py holds out, is like the rest. A byte 0x1e inside a file already is what it means here, a boundary between
documents, so it stays (corpora can be joined); documents without bytes are left out. Files are streamed, so memory
does not grow with them.
"""

import random
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from runtime.arguments import ArgumentParser, normalise_flags, run_main
from runtime.errors import UserError
from runtime.files import atomic_writer
from training.data import find_files
from training.options import parse_size

DELIMITER = b"\x1e"
PIECE_BYTES = 1 << 20


class CorpusWriter:
    """Writes documents to `sink` with one delimiter between any two, and at most `max_bytes` in all."""

    def __init__(self, sink: BinaryIO, max_bytes: int | None) -> None:
        self._sink = sink
        self._max_bytes = max_bytes
        self._in_document = False
        self.written = 0
        self.documents = 0

    @property
    def full(self) -> bool:
        """True when nothing more fits."""
        return self.written == self._max_bytes

    def write(self, piece: bytes) -> None:
        """Add bytes to the document at hand; each delimiter in them ends it."""
        for index, part in enumerate(piece.split(DELIMITER)):
            if index > 0:
                self.end_document()
            if part and not self._in_document:
                if self.documents:
                    part = DELIMITER + part
                self._in_document = True
                self.documents += 1
            self._put(part)

    def end_document(self) -> None:
        """What is written next belongs to another document."""
        self._in_document = False

    def _put(self, content: bytes) -> None:
        if self._max_bytes is not None:
            content = content[: self._max_bytes - self.written]
        self._sink.write(content)
        self.written += len(content)


def main(arguments: list[str]) -> None:
    """The command line."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("inputs", nargs="*", metavar="INPUT", help="files, folders (all files in them) or quoted globs")
    parser.add_argument("--output", required=True, type=Path, help="the corpus to write; it must not exist")
    parser.add_argument(
        "--python_stdlib", action="store_true", help="add the source files of the running Python's standard library"
    )
    parser.add_argument("--max_bytes", metavar="SIZE", help="cut the corpus after so many bytes (10m; default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the documents (default: 0)")
    options = parser.parse_args(normalise_flags(arguments))

    max_bytes = None if options.max_bytes is None else parse_size(options.max_bytes)
    if not options.inputs and not options.python_stdlib:
        raise UserError("expected files, folders or globs to join, got none: name some, or use --python_stdlib")
    if options.output.exists():
        raise UserError(
            f"expected a new file, got {options.output}, which exists: remove it or choose another --output"
        )
    files = find_files(options.inputs) + (python_stdlib_files() if options.python_stdlib else [])
    files = list(dict.fromkeys(files))
    random.Random(options.seed).shuffle(files)
    try:
        written, documents = join(files, options.output, max_bytes)
    except OSError as error:
        raise UserError(f"expected to write {options.output}, got {error.strerror}: choose another --output") from None
    print(f"{options.output}: {documents:,} documents, {written:,} bytes", file=sys.stderr)


def join(files: list[Path], output: Path, max_bytes: int | None = None) -> tuple[int, int]:
    """Write the documents of `files`, in this order, to `output`, whole or not at all.

    Returns the numbers of bytes and documents. Raises UserError for a file that cannot be read, and if there are no
    bytes; OSError if `output` cannot be written.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    total = sum(path.stat().st_size for path in files)
    bar = tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, disable=None)  # None: only on a terminal
    with atomic_writer(output) as sink, bar:
        writer = CorpusWriter(sink, max_bytes)
        for path in files:
            for piece in read_pieces(path):
                writer.write(piece)
                bar.update(len(piece))
                if writer.full:
                    return writer.written, writer.documents
            writer.end_document()
        if writer.written == 0:
            raise UserError(f"expected bytes to join, got {len(files)} files without any: name others")
    return writer.written, writer.documents


def read_pieces(path: Path) -> Iterator[bytes]:
    """A file's bytes in pieces of at most 1 MiB. Raises UserError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            while piece := file.read(PIECE_BYTES):
                yield piece
    except OSError as error:
        raise UserError(f"expected a readable file, got {path}: {error.strerror}") from None


def python_stdlib_files() -> list[Path]:
    """The .py files of the running Python's standard library, its tests too, sorted; nothing that pip installed.

    A few of its tests are written in odd encodings on purpose; as bytes that are no UTF-8 they are left out.
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths = (path.relative_to(root) for path in root.rglob("*.py") if path.is_file())
    ours = (path for path in paths if not {"site-packages", "dist-packages"} & set(path.parts))
    return [root / path for path in sorted(ours) if _is_utf8(root / path)]


def _is_utf8(path: Path) -> bool:
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False
    return True


if __name__ == "__main__":
    run_main(main)
