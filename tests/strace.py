"""strace as a test's hand at the system calls of another process: to watch them, to let them fail, to kill at one."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ranks import eventually


def require_strace() -> None:
    """Skip the test on a machine where no process can be traced."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    tried = subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True, text=True)
    if tried.returncode != 0:
        pytest.skip(f"strace may not trace here: {tried.stderr.strip()[:200]}")


def strace_prefix(*options: str, trace: Path) -> list[str]:
    """What to put before a command that is traced from its start, with all its threads, into the file `trace`."""
    require_strace()
    return ["strace", "-f", "-y", "-s", "0", "-o", str(trace), *options]


@contextlib.contextmanager
def attached(pid: int, trace: Path, *options: str) -> Iterator[None]:
    """All threads of a running process are traced into the file `trace`, as long as the block and it last."""
    require_strace()
    command = ["strace", "-f", "-y", "-s", "0", "-o", str(trace), *options, "-p", str(pid)]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        eventually(lambda: tracer.poll() is not None or _tracers(pid) == {tracer.pid}, seconds=20)
        assert tracer.poll() is None, tracer.stderr.read()
        yield
    finally:
        if tracer.poll() is None:
            tracer.send_signal(signal.SIGINT)  # it lets go of the process, which goes on
        tracer.communicate(timeout=20)


def system_calls(trace: Path) -> Iterator[tuple[str, list[Path]]]:
    """Name and paths of every call in a trace that touches a path, in the order of their starts."""
    for line in trace.read_text().splitlines():
        if match := re.match(r"\d+ +(\w+)\((.*)", line):
            arguments = match[2].partition(" = ")[0]
            paths = [Path(one or other) for one, other in re.findall(r'"([^"]+)"|\d<([^>]+)>', arguments)]
            if paths:
                yield match[1], paths


def _tracers(pid: int) -> set[int]:
    """The processes that trace a thread of `pid`, 0 for an untraced one."""
    found = set()
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        with contextlib.suppress(OSError):  # the thread has just ended
            found |= {int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("TracerPid:")}
    return found
