"""Files as streams of their content: plain, or decompressed on the way (.gz, .zst)."""

import contextlib
import gzip
import importlib
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

from runtime.errors import UserError

PIECE_BYTES = 1 << 20
# A compressed block of 4 bytes may hold 128 KiB, and all of what is fed at once comes out at once: at most 32 MiB.
_ZSTD_FED_BYTES = 1024
_ZSTD_WINDOW_BYTES = 1 << 31  # what `zstd --long=31` needs, as some large corpora were made


def need(package: str, purpose: str) -> ModuleType:
    """Import a package of requirements-data.txt. Raises UserError if it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError:
        name = package.partition(".")[0]
        raise UserError(
            f"expected the package {name} to read {purpose}, got none: run pip install -r requirements-data.txt"
        ) from None


def compression(path: Path) -> str | None:
    """ ".gz", ".zst" or None, by the name."""
    suffix = path.suffix.lower()
    return suffix if suffix in (".gz", ".zst") else None


@contextlib.contextmanager
def open_stream(path: Path, start: int = 0) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """A file's content from its byte `start` on, and the file itself, whose tell() says how much of it is behind.

    A compressed file is decompressed up to `start` once more. Raises UserError, from within the block too, for a file
    that cannot be read, is damaged, or was cut.
    """
    try:
        with open(path, "rb") as file:
            if compression(path) is None:
                file.seek(start)
                yield file, file
                return
            gzipped = compression(path) == ".gz"
            content = gzip.GzipFile(fileobj=file) if gzipped else io.BufferedReader(_ZstdContent(file), PIECE_BYTES)
            while start > 0 and (skipped := len(content.read(min(start, PIECE_BYTES)))):
                start -= skipped
            yield content, file
    except (OSError, EOFError, zlib.error, _DamageError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"expected a readable, whole file, got {path} ({reason}): mend it or leave it out") from None


class _DamageError(ValueError):
    """A compressed file that is damaged or was cut."""


class _ZstdContent(io.RawIOBase):
    """What the frames of a .zst file hold. Reading raises _DamageError, at a frame that was cut as well."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._zstandard = need("zstandard", ".zst files")
        self._file = file
        self._frame = None  # the decompressor of the frame at hand; None between frames
        self._content = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self._content:
            fed = self._file.read(_ZSTD_FED_BYTES)
            if not fed:
                if self._frame is not None:
                    raise _DamageError("it ends inside a frame")
                return 0
            self._content = memoryview(b"".join(self._decompressed(fed)))
        count = min(len(buffer), len(self._content))
        buffer[:count] = self._content[:count]
        self._content = self._content[count:]
        return count

    def _decompressed(self, fed: bytes) -> Iterator[bytes]:
        while fed:
            if self._frame is None:
                decompressor = self._zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES)
                self._frame = decompressor.decompressobj()
            try:
                yield self._frame.decompress(fed)
            except self._zstandard.ZstdError as error:
                raise _DamageError(str(error)) from None
            fed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
