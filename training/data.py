"""Bytes on disk become chunks: a memory-mapped corpus, read by lanes that never lose their place.

Shape letters: B lanes, T bytes of a chunk.
"""

import errno
import glob
import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtime.errors import UserError

_SPLIT_SEARCH_BYTES = 1 << 20


def find_files(patterns: Sequence[str]) -> list[Path]:
    """The files named by files, folders (searched recursively) and globs, each once, sorted within a pattern.

    Raises UserError for a pattern that names no file, and where a folder cannot be listed or a link leads to nothing:
    what is in it would be missing, and nobody would know.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        try:
            _check_reachable(pattern)
            matches = sorted(glob.glob(pattern, recursive=True)) or [pattern]
            files = [file for match in matches for file in (_files_under(match) if os.path.isdir(match) else [match])]
            files = [Path(file).resolve() for file in files if _is_file(file)]
        except _DanglingLink as link:
            raise UserError(
                f"expected files at {pattern!r}, got a link to nothing, {link}: bring back what it names, or remove it"
            ) from None
        except OSError as error:
            raise UserError(
                f"expected data at {pattern!r} that may be read, got {error.filename} ({error.strerror}): mend its "
                "permissions, or leave it out"
            ) from None
        if not files:
            raise UserError(f"expected data at {pattern!r}, got no file there: check the path")
        found.update(dict.fromkeys(files))
    return list(found)


def _check_reachable(pattern: str) -> None:
    """Raise OSError where a folder that a glob looks into cannot be listed, and _DanglingLink where a link that may be
    meant for one leads to nothing: glob itself would pass over them."""
    parts = Path(pattern).parts
    for place, part in enumerate(parts):
        if glob.has_magic(part):
            seen = [] if part == "**" else glob.glob(str(Path(*parts[: place + 1])))
            for folder in filter(os.path.isdir, glob.glob(str(Path(*parts[:place])))):
                if part == "**":
                    seen += [path for path in _files_under(folder, hidden=False) if not path.name.startswith(".")]
                else:
                    os.scandir(folder).close()
            for link in filter(os.path.islink, seen):
                _is_file(link)
        if part == "**":
            return


def _files_under(folder: str, hidden: bool = True) -> list[Path]:
    """What is in `folder` and in those below it, links to folders followed, but folders, sorted; a folder that can be
    reached in several ways counts once. hidden: names that begin with a dot, too. Raises OSError where one cannot be
    listed, but for a filesystem's own lost+found."""

    def refuse(error: OSError) -> None:
        if os.path.basename(error.filename) != "lost+found":
            raise error

    files, seen = [], set()
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if hidden or not name.startswith("."))
        files += [Path(place) / name for name in names]
    return sorted(files)


class _DanglingLink(Exception):
    """A symbolic link that leads to nothing; its path."""


def _is_file(path: str | Path) -> bool:
    """Not a folder, a device or nothing at all. Raises OSError where that cannot be told, and _DanglingLink."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise
        if os.path.islink(path):
            raise _DanglingLink(path) from None
        return False


def check_length(region: "Region", chunk_size: int) -> None:
    """Raise UserError where there is less to train on than a chunk and its target."""
    if len(region) < chunk_size + 1:
        raise UserError(
            f"expected at least {chunk_size + 1} bytes of training data (a chunk and its target), got {len(region)}: "
            "give more data or a smaller --chunk_size"
        )


class Corpus:
    """Files as one byte sequence, memory-mapped; each file that does not end with the delimiter gets one.

    So `len(corpus)` and positions count those added delimiters. delimiter: 0 ... 255, or None for files joined as
    they are. Opening costs a few system calls a file, whatever its size. Raises UserError if there are no bytes.
    fingerprint: 16 hex digits of the delimiter and each file's size and first and last 4 KiB; corpora that differ
    elsewhere alone have the same.
    """

    def __init__(self, files: Sequence[Path], delimiter: int | None) -> None:
        self.delimiter = delimiter
        self._segments: list[np.ndarray] = []
        digest = hashlib.sha256(repr(delimiter).encode())
        for path in files:
            try:
                size = path.stat().st_size
                if size == 0:
                    continue
                mapped = np.memmap(path, dtype=np.uint8, mode="r")
            except OSError as error:
                raise UserError(f"expected a readable file, got {path}: {error.strerror}") from None
            self._segments.append(mapped)
            if delimiter is not None and mapped[-1] != delimiter:
                self._segments.append(np.array([delimiter], dtype=np.uint8))
            digest.update(size.to_bytes(8, "little") + bytes(mapped[:4096]) + bytes(mapped[-4096:]))
        if not self._segments:
            raise UserError(
                f"expected bytes to train on, got only empty files ({', '.join(map(str, files[:3]))}): name others"
            )
        self._starts = np.cumsum([0] + [len(segment) for segment in self._segments])
        self.fingerprint = digest.hexdigest()[:16]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, begin: int, end: int) -> np.ndarray:
        """Bytes [begin, end) as a new uint8 array; 0 <= begin <= end <= len."""
        assert 0 <= begin <= end <= len(self), (begin, end, len(self))
        out = np.empty(end - begin, dtype=np.uint8)
        index = int(np.searchsorted(self._starts, begin, side="right")) - 1
        done = 0
        while done < len(out):
            offset = begin + done - int(self._starts[index])
            piece = self._segments[index][offset : offset + len(out) - done]
            out[done : done + len(piece)] = piece
            done += len(piece)
            index += 1
        return out

    def split(self, val_fraction: float) -> tuple["Region", "Region | None"]:
        """The training and the held-out part; the cut is moved to the next document within 1 MiB, if there is one that
        leaves at least half of what was to be held out."""
        if val_fraction == 0:
            return Region(self, 0, len(self)), None
        cut = int(len(self) * (1 - val_fraction))
        if self.delimiter is not None:
            window = self.read(cut, cut + min(_SPLIT_SEARCH_BYTES, (len(self) - cut) // 2))
            ends = np.flatnonzero(window == self.delimiter)
            if len(ends):
                cut += int(ends[0]) + 1
        return Region(self, 0, cut), Region(self, cut, len(self))


@dataclass(frozen=True)
class Region:
    """Bytes [begin, end) of a corpus."""

    corpus: Corpus
    begin: int
    end: int

    def __len__(self) -> int:
        return self.end - self.begin

    def overlaps(self, other: "Region") -> bool:
        """Whether the two have bytes in common."""
        return self.corpus is other.corpus and self.begin < other.end and other.begin < self.end

    def read(self, begin: int, end: int) -> np.ndarray:
        """Bytes [begin, end), counted from the region's start."""
        return self.corpus.read(self.begin + begin, self.begin + end)

    def read_around(self, begin: int, length: int) -> np.ndarray:
        """`length` bytes from `begin` on, going on at the region's start after its end."""
        pieces = []
        while length > 0:
            piece = self.read(begin, min(begin + length, len(self)))
            pieces.append(piece)
            length -= len(piece)
            begin = 0
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


@dataclass(frozen=True)
class Chunk:
    """ids_BS: uint8 (B, T+1), inputs [:, :-1] and targets [:, 1:]; reset_BT: bool, True where a lane starts afresh.

    A lane starts afresh at the input that is a delimiter: the last target of one document, the first input of the next.
    """

    ids_BS: np.ndarray
    reset_BT: np.ndarray


def document_starts(ids_BT: np.ndarray, delimiter: int | None) -> np.ndarray:
    """bool, like `ids_BT`: True at the inputs that start a document."""
    return np.zeros(ids_BT.shape, dtype=bool) if delimiter is None else ids_BT == delimiter


class LaneReader:
    """Lanes that each read a region contiguously, from their own place, round and round.

    Chunk k of a lane that began at p holds inputs [p+kT, p+kT+T) and targets one further: no byte is lost between
    chunks. The lanes are G groups of B that take turns: a chunk is of one group, and the lanes of the others wait
    where they are. Lane i of group g of rank r of W ranks begins in the ((iG+g)W+r)-th of WGB equal parts, at a place
    drawn from the seed: each group of each rank reads all over the region, between the others' lanes.

    positions: of lane i of group g at gB+i.
    """

    def __init__(
        self, region: Region, batch_size: int, chunk_size: int, *, rank: int, world_size: int, seed: int,
        groups: int = 1,
    ) -> None:  # fmt: skip
        check_length(region, chunk_size)
        self.region = region
        self.chunk_size = chunk_size
        self._batch_size, self._groups, self._turn = batch_size, groups, 0
        lanes = groups * batch_size
        place_in_part = np.random.default_rng((seed, rank)).random(lanes)
        self._ahead: tuple[np.ndarray, Chunk] | None = None  # a chunk read ahead, and the positions it was read at
        parts = np.arange(lanes).reshape(batch_size, groups).T.ravel() * world_size + rank
        self.positions = ((parts + place_in_part) / (lanes * world_size) * len(region)).astype(np.int64) % len(region)
        # A region that ends inside a document: its start must not continue that document.
        self._fresh_start = region.corpus.delimiter is None or int(region.read(len(region) - 1, len(region))[0]) != (
            region.corpus.delimiter
        )

    @property
    def turn(self) -> slice:
        """The lanes that next_chunk will read."""
        return slice(self._turn * self._batch_size, (self._turn + 1) * self._batch_size)

    def next_chunk(self) -> Chunk:
        """The next chunk of the group whose turn it is; `positions` then counts it as consumed."""
        self.prefetch()
        _, chunk = self._ahead
        self._ahead = None
        self.positions[self.turn] = (self.positions[self.turn] + self.chunk_size) % len(self.region)
        self._turn = (self._turn + 1) % self._groups
        return chunk

    def prefetch(self) -> None:
        """Read the chunk that next_chunk will return, if that is not done; `positions` stays."""
        positions = self.positions[self.turn]
        if self._ahead is None or not np.array_equal(self._ahead[0], positions):
            self._ahead = positions.copy(), self._read(positions)

    def _read(self, positions: np.ndarray) -> Chunk:
        ids_BS = np.stack([self.region.read_around(int(p), self.chunk_size + 1) for p in positions])
        reset_BT = document_starts(ids_BS[:, :-1], self.region.corpus.delimiter)
        if self._fresh_start:
            to_start = (-positions) % len(self.region)
            for lane in np.flatnonzero(to_start < self.chunk_size):
                reset_BT[lane, to_start[lane] :: len(self.region)] = True
        return Chunk(ids_BS, reset_BT)

    def state_dict(self) -> dict[str, Any]:
        """Where every lane will read next, and whose turn it is."""
        return {"positions": self.positions.tolist(), "turn": self._turn, "region_bytes": len(self.region)}

    def check(self, state: dict[str, Any]) -> None:
        """Raise UserError where the data is not what the places in `state` were counted in."""
        if state["region_bytes"] != len(self.region):
            raise UserError(
                f"expected the {state['region_bytes']} training bytes of the checkpoint, got {len(self.region)}: "
                "resume with the same --data"
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the stored lanes' places; with more lanes than stored, the further ones keep their own.

        Raises UserError as check() does.
        """
        self.check(state)
        kept = min(len(state["positions"]), len(self.positions))
        self.positions[:kept] = state["positions"][:kept]
        self._turn = state["turn"] % self._groups


def validation_chunks(region: Region, batch_size: int, chunk_size: int, max_bytes: int) -> Iterator[Chunk]:
    """The region's first `max_bytes` as up to `batch_size` equal lanes, chunk by chunk, the last one shorter.

    Every byte is a target once, but the first and fewer than `batch_size` at the end.
    """
    targets = min(len(region), max_bytes) - 1
    lanes = min(batch_size, targets)
    lane_bytes = targets // lanes
    for offset in range(0, lane_bytes, chunk_size):
        length = min(chunk_size, lane_bytes - offset)
        starts = [lane * lane_bytes + offset for lane in range(lanes)]
        ids_BS = np.stack([region.read(start, start + length + 1) for start in starts])
        yield Chunk(ids_BS, document_starts(ids_BS[:, :-1], region.corpus.delimiter))
