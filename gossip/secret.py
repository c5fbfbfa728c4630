"""The run's secret: from the environment, or a file in the run directory that the first rank to come creates."""

import contextlib
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path

from runtime.errors import UserError

SECRET_BYTES = 32
VARIABLE = "GRUBOROS_SECRET"
FILE_NAME = "secret"


def run_secret(population_dir: Path | None, environment: Mapping[str, str]) -> bytes:
    """The secret that all ranks of a run share, at least 32 bytes.

    GRUBOROS_SECRET (hex) when it is set, else the file `secret` in `population_dir`, which is created if absent.
    Raises UserError for a secret that is malformed or too short, and for a file that cannot be made or read, that
    others can read, or that someone else owns.
    """
    text = environment.get(VARIABLE)
    if text is not None:
        return _parse(text, VARIABLE)
    if population_dir is None:
        raise UserError(f"expected {VARIABLE} where ranks share no folder, got none: set it to the same hex everywhere")
    path = Path(population_dir) / FILE_NAME
    if not os.path.exists(path):
        _create(path)
    return _read(path)


def _create(path: Path) -> None:
    """Give `path` a fresh secret unless another rank was first: linking shows the file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(SECRET_BYTES))
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
    except OSError as error:
        raise UserError(
            f"expected to make the run's secret in {path.parent}, got {error.strerror}: set {VARIABLE} instead"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def _read(path: Path) -> bytes:
    # No link is followed, no pipe waited for, and the checks are on the open file: what is judged is what is read.
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise UserError(
            f"expected to read the run's secret in {path}, got {error.strerror}: mend or remove it"
        ) from None
    with os.fdopen(descriptor, encoding="ascii", errors="replace") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"expected the run's secret in a plain file, got something else at {path}: remove it")
        if status.st_uid != os.geteuid():
            raise UserError(f"expected {path} to be yours, got owner {status.st_uid}: remove it, or set {VARIABLE}")
        if status.st_mode & 0o077:
            mode = stat.S_IMODE(status.st_mode)
            raise UserError(
                f"expected {path} with mode 600, got {mode:o}: others may know the secret, so remove it, "
                f"or set {VARIABLE} where files have no modes"
            )
        return _parse(file.read(4096), str(path))


def _parse(text: str, source: str) -> bytes:
    try:
        secret = bytes.fromhex(text.strip())
    except ValueError:
        raise UserError(
            f"expected at least {SECRET_BYTES} bytes in hex in {source}, got what is not hex: "
            f"make one with `openssl rand -hex {SECRET_BYTES}`"
        ) from None
    if len(secret) < SECRET_BYTES:
        raise UserError(
            f"expected at least {SECRET_BYTES} bytes in hex in {source}, got {len(secret)}: "
            f"make one with `openssl rand -hex {SECRET_BYTES}`"
        )
    return secret
