"""Mounts of a test's own, which end with it."""

import contextlib
import subprocess
from collections.abc import Iterator

import pytest


def mount(*arguments: str) -> None:
    """Mount as mount(8) does; skips the test where that is not permitted."""
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
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
