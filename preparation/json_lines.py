"""Texts out of JSON lines: one object a line, its text in one field. A line of any length takes bounded memory."""

import codecs
import json
import re
from collections.abc import Iterator
from typing import BinaryIO

from preparation.streams import PIECE_BYTES

LINE_BYTES = 8 << 20  # longer lines are read in pieces
REST_BYTES = 8 << 20  # how long may be, together, what such a line holds beside its text
_STRING_INSIDE = re.compile(rb'[^"\\\n]*(?:\\.[^"\\\n]*)*')
# An escape, or the first of a pair of surrogates, that may go on in the next piece; the backslash itself not escaped.
_UNFINISHED = re.compile(
    rb"(?<!\\)(?:\\\\)*(\\u[0-9a-fA-F]{0,3}|\\u[dD][89abAB][0-9a-fA-F]{2}(?:\\u[0-9a-fA-F]{0,3})?)\Z"
)
_UNFINISHED_BYTES = 12


class BadLineError(ValueError):
    """A line that is no JSON object with a text in the field."""


def texts(stream: BinaryIO, field: str, position: int) -> Iterator[tuple[bytes, int | None]]:
    """The texts of all lines as UTF-8 in pieces, each with the position in the stream after it, None within a text.

    position: of the stream's next byte, at the start of a line. An escaped surrogate without its other half becomes the
    three bytes that it would have in UTF-8. A field that is null is a text without bytes; blank lines are passed over.
    Raises BadLineError.
    """
    while line := stream.readline(LINE_BYTES):
        start = position
        position += len(line)
        try:
            if len(line) < LINE_BYTES or line.endswith(b"\n"):
                if line.strip():
                    yield _encoded(_text_of(_parsed(line), field)), position
                continue
            long_line = _LongLine(line, stream, field)
            for piece in long_line.pieces():
                yield piece, None
            position = start + long_line.bytes_read
        except BadLineError as error:
            raise BadLineError(f"{error} in the line at byte {start:,}") from None
        yield b"", position


class _LongLine:
    """A line in pieces: the field's string goes out as it comes in, all else is kept and parsed at the end."""

    def __init__(self, head: bytes, stream: BinaryIO, field: str) -> None:
        self._buffer = head
        self._at = 0  # what is before is done with
        self._stream = stream
        self._field = field
        self._key = json.dumps(field, ensure_ascii=False).encode()
        self._rest = bytearray()  # the line, but with "" for the field's string
        self._depth = 0
        self.bytes_read = len(head)

    def pieces(self) -> Iterator[bytes]:
        strings = 0
        while True:
            quote = self._buffer.find(b'"', self._at)
            structure = self._buffer[self._at : quote if quote >= 0 else None]
            self._at += len(structure) + 1
            self._depth += sum(map(structure.count, (b"{", b"["))) - sum(map(structure.count, (b"}", b"]")))
            self._keep(structure)
            if quote < 0:
                if not self._refill():
                    break
            elif self._is_text_next():
                strings += 1
                yield from self._text_pieces()
                self._keep(b'""')
            else:
                self._keep(b'"')
                for content, _ in self._string():
                    self._keep(content)
                self._keep(b'"')
        text = _text_of(_parsed(bytes(self._rest)), self._field)
        if strings > 1 or (strings and text):
            raise BadLineError(f"expected {self._field!r} once, got it twice")
        if not strings:
            yield _encoded(text)

    def _is_text_next(self) -> bool:
        if self._depth != 1:
            return False
        before = bytes(self._rest[-len(self._key) - 256 :]).rstrip()  # whoever writes more space is found at the end
        before, colon = before[:-1].rstrip(), before[-1:]
        return colon == b":" and before.endswith(self._key) and before[: -len(self._key)].rstrip()[-1:] in (b"{", b",")

    def _text_pieces(self) -> Iterator[bytes]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        for content, last in self._string():
            try:
                yield _encoded(json.loads(f'"{decoder.decode(content, last)}"'))
            except ValueError as error:
                raise BadLineError(f"expected JSON in UTF-8, got {_short(error)}") from None

    def _string(self) -> Iterator[tuple[bytes, bool]]:
        """What is left of the string at hand, cut only between characters' escapes; True with its last piece."""
        while True:
            end = _STRING_INSIDE.match(self._buffer, self._at).end()
            last = self._buffer[end : end + 1] == b'"'
            end -= 0 if last else self._unfinished_bytes(end)
            content = self._buffer[self._at : end]
            self._at = end + last
            yield content, last
            if last:
                return
            if not self._refill():
                raise BadLineError("expected JSON, got a string without an end")

    def _unfinished_bytes(self, end: int) -> int:
        """How many bytes before `end` belong to an escape that may go on after it."""
        begin = max(self._at, end - _UNFINISHED_BYTES)
        while begin > self._at and self._buffer[begin - 1 : begin] == b"\\":  # which of a row of them escapes which
            begin -= 1
        unfinished = _UNFINISHED.search(self._buffer, begin, end)
        return end - unfinished.start(1) if unfinished else 0

    def _keep(self, content: bytes) -> None:
        self._rest += content
        if len(self._rest) > REST_BYTES:
            raise BadLineError(f"expected fields beside {self._field!r} of at most {REST_BYTES:,} bytes, got more")

    def _refill(self) -> bool:
        if self._buffer.endswith(b"\n"):
            return False
        more = self._stream.readline(PIECE_BYTES)
        self.bytes_read += len(more)
        self._buffer, self._at = self._buffer[self._at :] + more, 0
        return bool(more)


def _parsed(line: bytes) -> object:
    try:
        return json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise BadLineError(f"expected JSON in UTF-8, got {_short(error)}") from None


def _text_of(parsed: object, field: str) -> str:
    if not isinstance(parsed, dict):
        raise BadLineError(f"expected an object with the field {field!r}, got a {type(parsed).__name__}")
    if field not in parsed:
        raise BadLineError(f"expected the field {field!r} (--text_field), got {', '.join(map(repr, parsed))[:80]}")
    text = parsed[field]
    if not isinstance(text, str | None):
        raise BadLineError(f"expected a text in {field!r}, got a {type(text).__name__}")
    return text or ""


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:100]
