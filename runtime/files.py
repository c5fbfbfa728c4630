"""Files that are whole or absent: written beside their place, synced, then renamed into it."""

import contextlib
import os
import socket
import threading
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
    temporary = temporary_name(path)
    with contextlib.ExitStack() as cleaning:
        cleaning.callback(temporary.unlink, missing_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
        cleaning.pop_all()
    if durable:
        sync_folder(path.parent)


def atomic_write(path: Path, content: bytes | str, durable: bool = True) -> None:
    """Write `content` (text as UTF-8) to `path`, whole or not at all; see atomic_writer."""
    with atomic_writer(path, durable) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_once(path: Path, content: bytes | str) -> bool:
    """Write `content` to `path`, whole and durably, unless something is there: False then. Raises OSError."""
    draft = temporary_name(path)
    atomic_write(draft, content)
    try:
        os.link(draft, path)  # unlike a rename, fails where another was first
    except FileExistsError:
        return False
    finally:
        draft.unlink()
    sync_folder(path.parent)
    return True


def temporary_name(path: Path) -> Path:
    """A hidden name beside `path` that no other thread or process uses, on any host that shares the folder."""
    writer = f"{_host_word()}.{os.getpid()}.{threading.get_ident()}"
    return path.with_name(f".{path.name}.{writer}{TEMPORARY_SUFFIX}")


def stale_temporaries(folder: Path) -> list[Path]:
    """What dead processes of this host left half-written in `folder` itself, sorted: nobody will ever rename it.

    A file of another host or container is never listed, nor one whose writer's process id is in use, be it by another
    process. Raises OSError where the folder cannot be read.
    """
    return sorted(path for path in Path(folder).iterdir() if _is_stale(path.name))


def _is_stale(name: str) -> bool:
    words = name.removesuffix(TEMPORARY_SUFFIX).rsplit(".", 3)
    if not (name.startswith(".") and name.endswith(TEMPORARY_SUFFIX) and len(words) == 4):
        return False
    _, host, process_id, thread = words
    return host == _host_word() and process_id.isdecimal() and thread.isdecimal() and not _is_alive(int(process_id))


def _is_alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except (ProcessLookupError, OverflowError):  # overflow: more than any process id
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def _host_word() -> str:
    # Without dots, so that the host `b` never takes the files of the host `a.b` for its own. Containers may share a
    # host's name, but not its process ids.
    return f"{socket.gethostname().replace('.', '+')}+{os.stat('/proc/self/ns/pid').st_ino}"


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
    temporary = temporary_name(link)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    os.symlink(target_name, temporary)
    os.replace(temporary, link)


def set_aside(path: Path) -> None:
    """Rename a file with something in it to the first of <name>.1, <name>.2, ... that is free. Raises OSError."""
    if not path.exists() or path.stat().st_size == 0:
        return
    number = 1
    while (older := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    path.rename(older)
