"""A checkpoint's digest: blake3 over the whole file, in the comment that a zip file may end with.

torch.save writes a zip file without a comment. Its last two bytes say so: they are the comment's length. A sealed file
has the digest of all bytes before those two as its comment, and stays a zip file like any other: torch.load reads it.
"""

import os
from typing import BinaryIO

from blake3 import blake3

_TAG = b"gruboros blake3 "  # and 64 hexadecimal digits
_COMMENT_BYTES = len(_TAG) + 64
_LENGTH = _COMMENT_BYTES.to_bytes(2, "little")  # as a zip file writes it
_NO_LENGTH = b"\0\0"
_PIECE_BYTES = 1 << 20


class SealedFile:
    """What torch.save may write to: passes everything on to `file`, and hashes it on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = blake3()
        self._held = b""  # the last two bytes so far

    def write(self, data: bytes | memoryview) -> int:
        """Write all of `data`. Raises OSError."""
        whole = memoryview(data).cast("B")
        if len(whole) < len(_NO_LENGTH):
            whole, self._held = memoryview(self._held + bytes(whole)), b""
        for piece in (self._held, whole[: -len(_NO_LENGTH)]):
            self._file.write(piece)
            self._digest.update(piece)
        self._held = bytes(whole[-len(_NO_LENGTH) :])
        return len(data)

    def flush(self) -> None:
        """torch.save asks for this at its end."""
        self._file.flush()

    def seal(self) -> None:
        """End the zip file with the digest. Raises OSError."""
        assert self._held == _NO_LENGTH, f"expected a zip file without a comment, got {self._held!r} at its end"
        self._file.write(_LENGTH + _TAG + self._digest.hexdigest().encode())


def is_sealed(file: BinaryIO) -> bool:
    """Does an open file carry a digest? Leaves it at its start. Raises OSError, and ValueError if it does not match."""
    end = file.seek(0, os.SEEK_END)
    tail = len(_LENGTH) + _COMMENT_BYTES
    file.seek(max(0, end - tail))
    length, comment = file.read(len(_LENGTH)), file.read(_COMMENT_BYTES)
    file.seek(0)
    if not comment.startswith(_TAG):
        return False
    digest, left, buffer = blake3(), end - tail, memoryview(bytearray(_PIECE_BYTES))
    while left > 0 and (count := file.readinto(buffer[: min(left, _PIECE_BYTES)])):
        digest.update(buffer[:count])
        left -= count
    file.seek(0)
    if (length, comment) != (_LENGTH, _TAG + digest.hexdigest().encode()):
        raise ValueError("its digest does not match")
    return True
