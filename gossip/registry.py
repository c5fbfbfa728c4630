"""The registry's files in the shared folder: their names, and reading them without trust in what they hold.

rank_0000.json is one rank's own entry: a JSON object with rank, incarnation (a nonce of the process), life (how many
processes this rank has had), sequence (of this process's beats), world_size, state ("running" or "left") and what else
the rank publishes, among it address, step and fitness. ranking.json is the leader's fold of all entries. Nothing here
writes.
"""

import json
import math
import os
import re
import stat
from pathlib import Path

RANKING_NAME = "ranking.json"
RANK_FILE_LIMIT = 64 * 1024  # bytes; a longer file is malformed
RANKING_LIMIT = 1024 * RANK_FILE_LIMIT
ADDRESS_LIMIT = 300  # characters: a host's name has at most 253
STATES = ("running", "left")


def rank_file(directory: Path, rank: int) -> Path:
    """Where rank `rank` publishes itself."""
    return directory / f"rank_{rank:04d}.json"


def rank_files(directory: Path) -> list[tuple[int, Path]]:
    """(rank, path) of every rank file there is, lowest rank first."""
    matches = (re.fullmatch(r"rank_([0-9]{4,})\.json", name) for name in os.listdir(directory))
    found = ((int(match[1]), directory / match[0]) for match in matches if match)
    return sorted((rank, path) for rank, path in found if path == rank_file(directory, rank))


def read_entry(rank: int, path: Path) -> dict:
    """The checked entry that rank `rank` published at `path`.

    Raises OSError for a file that cannot be read, ValueError for one that is torn, too long, mistyped, not finite
    or another rank's.
    """
    entry = _checked_entry(_load(_read_bounded(path, RANK_FILE_LIMIT)))
    _expect(entry["rank"] == rank, f"rank {rank}")
    return entry


def read_ranking(directory: Path) -> dict:
    """The leader's newest fold: leader, incarnation, sequence and state of the leader; live: ranks; ranking: the live
    ranks with a known fitness, best first; members: entries. Raises as read_entry.
    """
    ranking = _load(_read_bounded(directory / RANKING_NAME, RANKING_LIMIT))
    _expect(_is_count(ranking.get("leader")) and _is_count(ranking.get("sequence")), "counts")
    _expect(isinstance(ranking.get("incarnation"), str) and ranking.get("state") in STATES, "a leader")
    for name in ("live", "ranking"):
        _expect(isinstance(ranking.get(name), list) and all(map(_is_count, ranking[name])), f"ranks in {name}")
    _expect(isinstance(ranking.get("members"), list), "members")
    for entry in ranking["members"]:
        _checked_entry(entry)
    return ranking


def _checked_entry(entry: object) -> dict:
    _expect(isinstance(entry, dict), "an object")
    _expect(all(_is_count(entry.get(name)) for name in ("rank", "life", "sequence", "world_size")), "counts")
    _expect(isinstance(entry.get("incarnation"), str) and entry.get("state") in STATES, "a process")
    address = entry.get("address")
    _expect(address is None or (isinstance(address, str) and len(address) <= ADDRESS_LIMIT), "an address or null")
    _expect(entry.get("step") is None or _is_count(entry["step"]), "a step or null")
    fitness = entry.get("fitness")
    _expect(fitness is None or (type(fitness) in (int, float) and math.isfinite(fitness)), "a loss or null")
    return entry


def _load(content: bytes) -> dict:
    try:
        value = json.loads(content, parse_constant=_finite_number, parse_float=_finite_number, parse_int=_whole_number)
    except RecursionError:
        raise ValueError("expected an object, got brackets without end") from None
    _expect(isinstance(value, dict), "an object")
    return value


def _finite_number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):  # called for every number of a thousand ranks: a call within it would be felt
        raise ValueError("expected finite numbers")
    return value


def _whole_number(text: str) -> int:
    value = int(text)
    if not -(2**63) < value < 2**63:
        raise ValueError("expected whole numbers of 64 bits")
    return value


def _read_bounded(path: Path, limit: int) -> bytes:
    with open(path, "rb", opener=_open_at_once) as file:
        _expect(stat.S_ISREG(os.fstat(file.fileno()).st_mode), "a plain file")
        content = file.read(limit + 1)
    _expect(len(content) <= limit, f"at most {limit} bytes")
    return content


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe in a file's place is not waited for


def _expect(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(f"expected {what}")


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0
