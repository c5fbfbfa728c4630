"""Standard output, which may be full or closed, or whose reader may have had enough."""

import contextlib
import os
import sys
from collections.abc import Iterator

from runtime.errors import UserError


class ReaderGone(Exception):
    """Nobody reads standard output any more: no mistake, and nothing to say."""

    status = 141  # 128 + SIGPIPE, as shells report it


@contextlib.contextmanager
def writing_to_stdout() -> Iterator[None]:
    """Around what writes to standard output, and does nothing else that raises OSError; flushes it at the end. What of
    a text it cannot encode (a file's name may be any bytes) is written as an escape.

    Raises UserError where it cannot be written, ReaderGone where its reader has gone.
    """
    if sys.stdout is None:
        raise UserError("expected to write to standard output, got it closed: send it somewhere")
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        # What is left in the buffer would fail once more at exit, loudly: it goes nowhere instead.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise ReaderGone from None
        raise UserError(f"expected to write to standard output, got {error.strerror}: send it elsewhere") from None
