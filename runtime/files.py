"""Files that are whole or absent: written beside their place, synced, then renamed into it."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

TEMPORARY_SUFFIX = ".tmp"


@contextlib.contextmanager
def atomic_writer(path: Path, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`; when the block ends without an error it becomes `path`.

    durable: sync the file before the rename and its folder after it, so that neither a crash of the
    process nor of the machine leaves a half-written file under the final name. On any error the temporary
    file is removed, an older `path` stays as it was, and the error (OSError: disk full, ...) is raised.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    if durable:
        sync_folder(path.parent)


def atomic_write(path: Path, content: bytes | str, durable: bool = True) -> None:
    """Write `content` (text as UTF-8) to `path`, whole or not at all; see atomic_writer."""
    with atomic_writer(path, durable) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a crash of the machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_symlink(link: Path, target_name: str) -> None:
    """Point `link` at `target_name` (a name in the same folder), atomically, whatever it pointed at before."""
    if link.is_symlink() and os.readlink(link) == target_name:
        return
    temporary = link.with_name(f".{link.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    os.symlink(target_name, temporary)
    os.replace(temporary, link)
