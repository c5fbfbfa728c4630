"""The last place to say something: standard error, which may itself be full, closed or gone."""

import os
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


def ensure() -> None:
    """At the start: a process that was given no standard error gets one that goes nowhere, so that neither what is said
    there, nor a file that is opened next, comes in its place."""
    if sys.stderr is None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        if nowhere != 2:
            os.dup2(nowhere, 2)
            os.close(nowhere)
        sys.stderr = open(2, "w", closefd=False)


def settle() -> None:
    """Before the process ends: what standard error still holds and cannot write goes nowhere.

    The interpreter would try once more at its exit, and turn the failure into an exit status of its own.
    """
    try:
        sys.stderr.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
