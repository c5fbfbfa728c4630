"""Mounts of a test's own, which end with it."""

import contextlib
import subprocess
import time
from collections.abc import Iterator

import pytest

BUSY_SECONDS = 20.0  # in which a rank closes the file that it is writing


def mount(*arguments: str) -> None:
    """Mount as mount(8) does, again while somebody writes there, which keeps a mount from being made read-only; skips
    the test where it is not permitted."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
        if "busy" not in done.stderr or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    if done.returncode != 0:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")


@contextlib.contextmanager
def mounted(*arguments: str) -> Iterator[None]:
    """A mount as long as the block lasts; the last argument is its place."""
    mount(*arguments)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", arguments[-1]], check=True)
