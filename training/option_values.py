"""What an option's value may be: parsers of the texts that follow flags."""

import math
import os
from collections.abc import Callable

from runtime.arguments import parse_size, whole
from runtime.errors import UserError


def parse_delimiter(text: str) -> int | None:
    """A byte as two hexadecimal digits ("1e", "0x1e"), or "none" for one unbroken document. Raises UserError."""
    if text.lower() == "none":
        return None
    try:
        value = int(text, 16)
    except ValueError:
        value = -1
    if not 0 <= value <= 255:
        raise UserError(f"expected a byte in hexadecimal such as 1e, or none, got {text!r}: write it so")
    return value


def parse_chunk(text: str) -> int:
    """A size of at most 2g. Raises UserError."""
    size = parse_size(text)
    if size > 2**31:
        raise UserError(f"expected at most 2g, got {text}: lower it")
    return size


def parse_params(text: str) -> int:
    """A size of at most 16384g. Raises UserError."""
    size = parse_size(text)
    if size > 2**44:
        raise UserError(f"expected at most 16384g, got {text}: lower it")
    return size


def parse_val_bytes(text: str) -> int:
    """A size of at least 2: an input and its target. Raises UserError."""
    size = parse_size(text)
    if size < 2:
        raise UserError(f"expected at least 2 bytes, an input and its target, got {text}: raise it")
    return size


def real(minimum: float, maximum: float = math.inf, *, above: bool = False, below: bool = False) -> Callable:
    """A parser of finite numbers in [minimum, maximum], `above` and `below` without an end. It raises UserError."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise UserError(f"expected a number, got {text!r}: write it so") from None
        inside = (value > minimum if above else value >= minimum) and (value < maximum if below else value <= maximum)
        if not inside or not math.isfinite(value):
            interval = f"in {'(' if above else '['}{minimum:g}, {maximum:g}{')' if below else ']'}"
            if math.isinf(maximum):
                interval = f"{'above' if above else 'of at least'} {minimum:g}, and finite"
            raise UserError(f"expected a number {interval}, got {text}: choose another")
        return value

    return parse


FRACTION = real(0, 1)
POSITIVE = real(0, above=True)
NOT_NEGATIVE = real(0)
SECONDS = real(0, 1e6, above=True)
LANES = whole(1, 2**20)


def parse_path(text: str) -> str:
    """A path. Raises UserError for an empty one, as of a variable that is not set: it would mean the current folder."""
    if not text:
        raise UserError("expected a path, got an empty one: name it")
    return text


def parse_absolute(text: str) -> str:
    """A path, absolute. Raises UserError."""
    return os.path.abspath(parse_path(text))


def parse_tolerance(text: str) -> float | None:
    """A number of at least 0, or "none". Raises UserError."""
    return None if text.lower() == "none" else NOT_NEGATIVE(text)


def parse_steps(text: str) -> int | None:
    """A size, or "none". Raises UserError."""
    return None if text.lower() == "none" else parse_size(text)
