"""What a corpus is like: documents, lengths, bytes. Streamed, and in memory that does not grow with it."""

import codecs
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from preparation.joining import DELIMITER
from preparation.streams import PIECE_BYTES, open_stream

QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)
_EXACT_BITS = 10


@dataclass
class Statistics:
    """bytes, documents, empty (documents without bytes, left out of all else); byte_counts: int64 (256,).

    non_utf8, non_utf8_bytes: documents that are no UTF-8, and the bytes in them. lengths: documents by rounded_length.
    """

    bytes: int = 0
    documents: int = 0
    empty: int = 0
    shortest: int = 0
    longest: int = 0
    non_utf8: int = 0
    non_utf8_bytes: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    byte_counts: np.ndarray = field(default_factory=lambda: np.zeros(256, dtype=np.int64))

    def add_document(self, length: int, utf8: bool) -> None:
        """Count one document of `length` bytes."""
        if length == 0:
            self.empty += 1
            return
        self.documents += 1
        self.shortest = min(self.shortest or length, length)
        self.longest = max(self.longest, length)
        self.lengths[rounded_length(length)] += 1
        if not utf8:
            self.non_utf8 += 1
            self.non_utf8_bytes += length

    def quantile(self, share: float) -> int:
        """The length that at least this share of the documents does not exceed; above 1,023 bytes within 0.2 %."""
        left = share * self.documents
        for length in sorted(self.lengths):
            left -= self.lengths[length]
            if left <= 0:
                return min(max(length, self.shortest), self.longest)
        return self.longest

    def entropy(self) -> float:
        """Bits per byte of a guess by how often each byte occurs."""
        shares = self.byte_counts[self.byte_counts > 0] / self.bytes
        return float((shares * np.log2(1 / shares)).sum())


def rounded_length(length: int) -> int:
    """Its ten leading bits, the others zero: so few different values that memory stays small."""
    shift = max(0, length.bit_length() - _EXACT_BITS)
    return length >> shift << shift


def measure(path: Path) -> Statistics:
    """Read a corpus (plain, .gz or .zst) once. Raises UserError if it cannot be read."""
    statistics = Statistics()
    document = _OpenDocument()
    with (
        open_stream(path) as (stream, file),
        tqdm(total=path.stat().st_size, unit="B", unit_scale=True, unit_divisor=1024, disable=None) as bar,
    ):
        while piece := stream.read(PIECE_BYTES):
            statistics.bytes += len(piece)
            statistics.byte_counts += np.bincount(np.frombuffer(piece, dtype=np.uint8), minlength=256)
            head, *others = piece.split(DELIMITER)
            document.add(head)
            for part in others:
                statistics.add_document(document.length, document.is_utf8())
                document = _OpenDocument()
                document.add(part)
            bar.update(file.tell() - bar.n)
    if document.length:  # a delimiter at the very end begins nothing
        statistics.add_document(document.length, document.is_utf8())
    return statistics


class _OpenDocument:
    """A document of which pieces come in."""

    def __init__(self) -> None:
        self.length = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._utf8 = True

    def add(self, part: bytes) -> None:
        self.length += len(part)
        self._decode(part, final=False)

    def is_utf8(self) -> bool:
        """Are all the bytes together UTF-8?"""
        self._decode(b"", final=True)
        return self._utf8

    def _decode(self, part: bytes, final: bool) -> None:
        if self._utf8:
            try:
                self._decoder.decode(part, final)
            except UnicodeDecodeError:
                self._utf8 = False


def report(statistics: Statistics) -> str:
    """The statistics as a person reads them."""
    s = statistics
    lengths = [("shortest", s.shortest)]
    lengths += [(f"{share * 100:.0f} %", s.quantile(share)) for share in QUANTILES]
    lengths += [("longest", s.longest), ("mean", round((s.bytes - int(s.byte_counts[0x1E])) / max(1, s.documents)))]
    ascii_share = _percent(int(s.byte_counts[:128].sum()), s.bytes)
    rows = [
        ("bytes", f"{s.bytes:,}"),
        ("documents", f"{s.documents:,}" + (f", and {s.empty:,} without bytes" if s.empty else "")),
        ("bytes of one", ", ".join(f"{name} {value:,}" for name, value in lengths)),
        ("no UTF-8", f"{s.non_utf8:,} documents ({_percent(s.non_utf8, s.documents)}), "
                     f"{s.non_utf8_bytes:,} bytes ({_percent(s.non_utf8_bytes, s.bytes)})"),
        ("values", f"{int((s.byte_counts > 0).sum())} of 256, {ascii_share} ASCII"),
        ("entropy", f"{s.entropy():.4f} bits per byte by the values' shares alone"),
    ]  # fmt: skip
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _percent(part: int, whole: int) -> str:
    """ "0 %" and "100 %" only where they are exact."""
    share = 100 * part / max(1, whole)
    if share == 0 or part == whole:
        return f"{share:.0f} %"
    digits = max(2, 1 - math.floor(math.log10(min(share, 100 - share))))
    return f"{share:.{digits}f} %"
