"""What the tests of the launcher share: scripts to launch, and a launcher on them that outlives no test."""

import contextlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

# A rank that says each signal it gets, and leaves with status 0 after as many of them as its argument says.
LISTENER = """
import os, signal, sys
signal.alarm(20)  # no orphan outlives a failed test
numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
say = lambda line: os.write(1, f"{line}\\n".encode())  # whole lines: rank 0 shares its pipe with the launcher
say("ready")
for _ in range(int(sys.argv[1])):
    say(signal.Signals(signal.sigwait(numbers)).name)
say(f"pending {len(signal.sigpending() & set(numbers))}")
"""


@contextlib.contextmanager
def launcher(folder):
    """Gives a function that starts the launcher on a script (its source), and returns its process with its streams."""
    started = []

    def start(source, *arguments, ranks=2, options=(), stdin=subprocess.DEVNULL, **extra):
        script = folder / "script.py"
        script.write_text(source)
        command = [sys.executable, "-m", "runtime.launch", "--ranks", str(ranks), *options, "--", str(script)]
        streams = {"stdin": stdin, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **extra}
        process = subprocess.Popen([*command, *map(str, arguments)], cwd=ROOT, text=True, **streams)
        started.append(process)
        return process

    try:
        yield start
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
            process.communicate()


def expect_lines(process, *lines):
    """Read as many lines of standard output, in any order; they must be these."""
    assert sorted(process.stdout.readline().rstrip("\n") for _ in lines) == sorted(lines)
