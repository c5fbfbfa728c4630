"""The last place to say something: standard error, which may itself be full, closed or gone."""

import sys

from tqdm import tqdm


def say(text: str) -> None:
    """Print one line to standard error, above a progress bar if there is one. Any thread; never raises OSError.

    Where even that cannot be written (a full disk, a dead reader, a closed terminal) nobody is left to be told, and
    training must not end for it.
    """
    try:
        tqdm.write(text, file=sys.stderr)
    except (OSError, ValueError):  # ValueError: the stream is closed
        return
