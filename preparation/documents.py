"""A file's documents, piece by piece: which kind of file it is, by its name, and how that kind is read.

.jsonl (also .jsonl.gz, .jsonl.zst): one document a line, the text of one field. .parquet: one document a row, the text
of one column. Any other file, .gz and .zst decompressed, is one document as it is.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from preparation import json_lines, parquet
from preparation.streams import PIECE_BYTES, compression, need, open_stream
from runtime.errors import UserError
from runtime.stderr import say

PACKED = (".bz2", ".xz", ".lz4", ".zip", ".7z", ".tar", ".tgz")  # which nothing here unpacks


class Piece(NamedTuple):
    """Bytes of a document.

    ends: they are its last. position: where the file can be read from, to go on after them; None inside a text that can
    only be read from its start. raw: how many bytes of the file itself, compressed or not, are behind them.
    """

    content: bytes
    ends: bool
    position: int | None
    raw: int


def read_pieces(path: Path, text_field: str, position: int = 0) -> Iterator[Piece]:
    """The documents of a file, from a Piece's position on. UserError for a file that is not what its name says."""
    kind = _kind(path)
    if kind == ".parquet":
        for text, row, raw in parquet.texts(path, text_field, position):
            yield Piece(text, True, row, raw)
        return
    with open_stream(path, position) as (stream, file):
        if kind == ".jsonl":
            try:
                for content, after in json_lines.texts(stream, text_field, position):
                    yield Piece(content, after is not None, after, file.tell())
            except json_lines.BadLineError as error:
                raise UserError(f"{error} of {path}: mend it or leave the file out") from None
            return
        while content := stream.read(PIECE_BYTES):
            position += len(content)
            yield Piece(content, False, position, file.tell())
        yield Piece(b"", True, position, file.tell())


def check_files(paths: Sequence[Path]) -> None:
    """What can be known before hours have passed: every file may be read, by packages that are there; UserError. Warns
    of files that are packed in other ways."""
    for path in paths:
        if not os.path.isfile(path) or not os.access(path, os.R_OK):
            raise UserError(f"expected a readable file, got {path}: mend it or leave it out")
        if _kind(path) == ".parquet":
            if compression(path):
                raise UserError(f"expected .parquet files as they are, got {path}: decompress it")
            need("pyarrow", path)
        if compression(path) == ".zst":
            need("zstandard", path)
    if packed := [path for path in paths if _kind(path) in PACKED]:
        say(
            f"warning: {len(packed)} packed files, such as {packed[0]}, stay packed: their bytes are joined as they are"
        )


def _kind(path: Path) -> str:
    return (path.with_suffix("") if compression(path) else path).suffix.lower()
