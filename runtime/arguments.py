"""Command lines: flags in either spelling, and a user's mistake as one line and an exit status."""

import argparse
import math
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from runtime.errors import UserError
from runtime.exhaustion import as_memory_error
from runtime.stderr import ensure, say, settle
from runtime.stdout import ReaderGone

_FLAG = re.compile(r"--([A-Za-z][\w-]*)(?=$|=)")  # what argparse, too, takes for one: "--x y" is a value
_SUFFIXES = {"k": 1024, "m": 1024**2, "g": 1024**3}


class ArgumentParser(argparse.ArgumentParser):
    """argparse, but a mistake raises UserError (one line) and a flag must be written out in full."""

    def __init__(self, *arguments, **options) -> None:
        options.setdefault("allow_abbrev", False)
        super().__init__(*arguments, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}: see --help")


def as_argument(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """A parser of values that raises UserError, as argparse wants one: its words then follow the flag's name."""

    def parse_argument(text: str) -> Any:
        try:
            return parse(text)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse_argument


def parse_size(text: str) -> int:
    """ "2k" -> 2048, "350m", "1g", "1.5k" or a plain number: suffixes mean powers of 1024. Raises UserError."""
    number, factor = (text[:-1], _SUFFIXES[text[-1].lower()]) if text[-1:].lower() in _SUFFIXES else (text, 1)
    try:
        size = float(number) * factor
    except ValueError:
        size = math.nan
    if not math.isfinite(size) or size != int(size) or size < 1:
        raise UserError(f"expected a size such as 512, 2k, 350m or 1g, got {text!r}: write it so")
    return int(size)


def whole(minimum: int, maximum: int = 2**53) -> Callable[[str], int]:
    """A parser of whole numbers from minimum to maximum, which raises UserError."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise UserError(f"expected a whole number, got {text!r}: write it so") from None
        if value < minimum:
            raise UserError(f"expected a whole number of at least {minimum}, got {value}: raise it")
        if value > maximum:
            raise UserError(f"expected a whole number of at most {maximum}, got {value}: lower it")
        return value

    return parse


def normalise_flags(argv: Sequence[str]) -> list[str]:
    """The same arguments with the hyphens inside flag names as underscores; values, and all after "--", stay."""
    flags = list(argv)
    end = flags.index("--") if "--" in flags else len(flags)
    for position, token in enumerate(flags[:end]):
        if name := _FLAG.match(token):
            flags[position] = f"--{name[1].replace('-', '_')}{token[name.end() :]}"
    return flags


def run_main(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Exit with the status that `main(arguments)` returns (None: 0).

    A UserError becomes one line "error: ..." on standard error and its status; Ctrl-C where main does not handle it,
    130; a reader of standard output who has gone, 141; memory that is out, one line and 1.
    """
    ensure()
    try:
        with as_memory_error():
            status = main(sys.argv[1:])
    except UserError as error:
        say(f"error: {error}")
        status = error.status
    except MemoryError as error:
        say(f"error: {str(error) or 'memory is out'}: ask for less at once, or end what else takes memory")
        status = 1
    except ReaderGone as gone:
        status = gone.status
    except KeyboardInterrupt:
        status = 130
    settle()
    sys.exit(status or 0)
