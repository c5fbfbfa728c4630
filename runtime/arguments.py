"""Command lines: flags in either spelling, and a user's mistake as one line and an exit status."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from runtime.errors import UserError
from runtime.stderr import say, settle
from runtime.stdout import ReaderGone


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


def normalise_flags(argv: Sequence[str]) -> list[str]:
    """The same arguments with the hyphens inside flag names as underscores; values, and all after "--", stay."""
    flags = list(argv)
    end = flags.index("--") if "--" in flags else len(flags)
    for position, token in enumerate(flags[:end]):
        if token.startswith("--"):
            name, equals, value = token[2:].partition("=")
            flags[position] = f"--{name.replace('-', '_')}{equals}{value}"
    return flags


def run_main(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Exit with the status that `main(arguments)` returns (None: 0).

    A UserError becomes one line "error: ..." on standard error and its status; Ctrl-C where main does not handle it,
    130; a reader of standard output who has gone, 141.
    """
    try:
        status = main(sys.argv[1:])
    except UserError as error:
        say(f"error: {error}")
        status = error.status
    except ReaderGone as gone:
        status = gone.status
    except KeyboardInterrupt:
        status = 130
    settle()
    sys.exit(status or 0)
