"""prepare_data.py killed by SIGKILL at chosen calls: a process of its own, which forks each attempt.

Standard input: one attempt a line, the number of the call before which it dies (0: it lives) and its --output. Standard
output: one line each, its exit status (-9: killed) and how many of the calls were counted. Arguments: the inputs.
"""

import os
import signal
import sys

import prepare_data
from preparation import documents, joining, json_lines
from runtime.errors import UserError

CALLS = ("fsync", "replace", "rename", "unlink")  # what makes a state of the files lasting, or takes one away


def attempt(arguments: list[str], deadly: int, report: int) -> None:
    """Run in a forked child; never returns."""
    count = 0

    def counted(call):
        def wrapper(*positional, **named):
            nonlocal count
            count += 1
            if count == deadly:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*positional, **named)

        return wrapper

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    status = 1
    try:
        prepare_data.main(arguments)
        status = 0
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        status = 2
    finally:
        os.write(report, b"%d" % count)
        os._exit(status)


def main() -> None:
    joining.MARK_BYTES, documents.PIECE_BYTES = 300, 97  # many marks in little data
    json_lines.LINE_BYTES, json_lines.PIECE_BYTES = 150, 50
    for line in sys.stdin:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            deadly, output = line.split()
            attempt([*sys.argv[1:], "--output", output], int(deadly), writer)
        os.close(writer)
        count = os.read(reader, 20).decode() or "-"
        os.close(reader)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), count, flush=True)


if __name__ == "__main__":
    main()
