"""Following a tab-separated file that others append to, reading each of its bytes once."""

import os
from pathlib import Path

TAIL_BYTES = 64 * 1024


class TableTail:
    """The rows at the end of a table with a header, and then what is added to it.

    A line counts once its end is there; one with another number of cells is passed over. A file that was replaced, as a
    resumed run replaces its metrics, is met anew, and is_anew after the read() that met it. tail_bytes: of a file that
    is met.
    """

    def __init__(self, path: Path, tail_bytes: int = TAIL_BYTES) -> None:
        self.path = path
        self.is_anew = False
        self._tail_bytes = tail_bytes
        self._names: list[str] = []
        self._inode: int | None = None
        self._position = 0

    def read(self) -> list[dict[str, str]]:
        """The new rows, by column; none where the file is missing. Raises OSError for any other trouble."""
        try:
            file = open(self.path, "rb")
        except FileNotFoundError:
            return []
        with file:
            status = os.fstat(file.fileno())
            self.is_anew = status.st_ino != self._inode or status.st_size < self._position
            if self.is_anew:
                header = file.readline()
                if not header.endswith(b"\n"):
                    return []
                self._inode, self._names = status.st_ino, header.decode(errors="replace").rstrip("\n").split("\t")
                self._position = max(file.tell(), status.st_size - self._tail_bytes)
            file.seek(self._position)
            whole, end, _ = file.read().rpartition(b"\n")
        self._position += len(whole) + len(end)
        rows = (line.split("\t") for line in whole.decode(errors="replace").split("\n"))
        return [dict(zip(self._names, cells, strict=True)) for cells in rows if len(cells) == len(self._names)]
