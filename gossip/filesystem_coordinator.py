"""The population as files in one shared folder: who lives, how good each is, and who leads.

Every rank writes one small file, population/rank_0000.json, whose sequence number moves with each beat. The leader
folds them all into population/ranking.json, and that one file is all that the others read while it moves. No clock
is ever compared with another host's: a member lives as long as its number moves, on the reader's own clock. Of two
processes that are one rank by mistake the one with the lesser claim finds the other's word in its file, and ends.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gossip.registry import RANK_FILE_LIMIT, RANKING_NAME, rank_file, rank_files, read_entry, read_ranking
from gossip.sightings import Sightings, Tenure
from runtime.errors import UserError
from runtime.files import atomic_write
from runtime.supervise import REPLACED

_OWN_KEYS = ("rank", "incarnation", "life", "sequence", "world_size", "state")
_MEMBER_KEYS = frozenset((*_OWN_KEYS, "address", "step", "fitness"))


class RankReplaced(UserError):
    """Another process is this rank now: this one has no part in the run any more, and nothing to save."""

    status = REPLACED


@dataclass(frozen=True)
class Member:
    """One rank as its reader knows it.

    incarnation: nonce of the process; sequence: its beats so far; state: "running" or "left"; live: its sequence
    was seen to move within the timeout; address: "host:port"; fitness: nats per byte, None if unknown;
    standing: 0 (best) ... 1 (worst) among the live with a known fitness; record: whatever else it published.
    """

    rank: int
    incarnation: str
    sequence: int
    state: str
    live: bool
    address: str | None
    step: int
    fitness: float | None
    standing: float | None
    record: dict


@dataclass(frozen=True)
class Roster:
    """The population at one beat; `leader` is None while nobody was seen to lead. Members are sorted by rank."""

    leader: int | None
    members: tuple[Member, ...]

    def member(self, rank: int) -> Member | None:
        """The member with that rank, if it was ever seen."""
        return next((member for member in self.members if member.rank == rank), None)

    def peers(self, rank: int) -> tuple[Member, ...]:
        """The live members with an address, without `rank` itself."""
        return tuple(member for member in self.members if member.live and member.address and member.rank != rank)


class FilesystemCoordinator:
    """One rank's part in the registry under `directory`. Starts no thread: one caller beats at a time.

    incarnation: a nonce of this process; timeout_seconds: how long a number may stand still before its owner counts
    as dead. An OSError on this rank's own files is raised to the caller, who may simply beat again; files that are
    torn, malformed or too large, and others' that are unreadable, are skipped and counted in `unreadable`.
    """

    def __init__(
        self,
        directory: Path,
        rank: int,
        world_size: int,
        incarnation: str,
        timeout_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.rank = rank
        self.unreadable = 0
        self._world_size = world_size
        self._incarnation = incarnation
        self._timeout_seconds = timeout_seconds
        self._clock = clock
        self._sequence = 0
        self._tenure: Tenure | None = None  # from the first beat on
        self._leader: int | None = None
        self._seen = Sightings(timeout_seconds)
        self._ranking: dict | None = None  # the newest one read or written
        self._ranking_moved_at: float | None = None  # None: not seen to move yet, so perhaps a dead run's
        self._started_at = clock()

    @property
    def is_leader(self) -> bool:
        """Whether this rank led at its last beat."""
        return self._leader == self.rank

    def beat(self, record: dict) -> Roster:
        """Publish `record` (JSON values; "address", "step" and "fitness" are the members' own), read the others.

        A leader folds all rank files into the ranking first. Numbers that are not finite are published as null.
        Raises RankReplaced, and publishes nothing, once another process has this rank.
        """
        return self._publish(record, "running")

    def leave(self, record: dict) -> Roster:
        """The last beat: the others stop counting on this rank at once, and if it led, another leads."""
        return self._publish(record, "left")

    def _publish(self, record: dict, state: str) -> Roster:
        now = self._clock()
        self._read_ranking(now)
        self._hold_rank()
        self._sequence += 1
        own = {
            **{name: _finite(value) for name, value in record.items()},
            "rank": self.rank,
            "incarnation": self._incarnation,
            "life": self._tenure.life,
            "sequence": self._sequence,
            "world_size": self._world_size,
            "state": state,
        }
        self._leader = self._choose_leader(now)
        if self.is_leader:
            for rank, path in rank_files(self.directory):
                if rank != self.rank:  # what this rank says of itself it knows better
                    self._observe_file(rank, path, now)
        # What is not read is not known to be dead: a follower judges by the time of its newest ranking.
        roster = self._roster(own, now if self.is_leader or self._ranking_moved_at is None else self._ranking_moved_at)
        # The ranking goes first: after a leader's death its own file then never shows a number that the ranking
        # has not, and nobody takes it for alive.
        if self.is_leader:
            self._write_ranking(own, roster, now)
        content = json.dumps(own, allow_nan=False)
        assert len(content) <= RANK_FILE_LIMIT, f"a record of {len(content)} bytes, which no other rank would read"
        atomic_write(rank_file(self.directory, self.rank), content, durable=False)
        return roster

    def _hold_rank(self) -> None:
        """Begin this process's tenure of its rank, or see that it has not ended."""
        found = self._read_own()
        if self._tenure is None:
            ranked = self._ranking["members"] if self._ranking is not None else []
            predecessors = [entry for entry in (found, *ranked) if entry is not None and entry["rank"] == self.rank]
            self._tenure = Tenure(self._incarnation, predecessors)
        elif found is not None and self._tenure.ended_by(found):
            raise RankReplaced(
                f"expected rank {self.rank} of {self.directory} to be this process alone, got another that took its "
                f"place, process {found.get('pid')} on {found.get('host')}: start each rank once"
            )

    def _read_own(self) -> dict | None:
        try:
            return read_entry(self.rank, rank_file(self.directory, self.rank))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:  # a stale handle, or torn: the next beat looks again
            self._look_again(error)
            return None

    def _look_again(self, error: Exception) -> None:
        """Count what could not be read. Before there is a tenure, which begins by what is read, raise an OSError, but
        only as long as others would wait for a sign of life."""
        self.unreadable += 1
        if self._tenure is None and isinstance(error, OSError) and self._fresh(self._started_at, self._clock()):
            raise error

    def _read_ranking(self, now: float) -> None:
        try:
            ranking = read_ranking(self.directory)
        except FileNotFoundError:  # nobody has led here yet
            return
        except (OSError, ValueError) as error:
            self._look_again(error)
            return
        if self._ranking is not None and _stamp(ranking) == _stamp(self._ranking):
            return
        first, self._ranking = self._ranking is None, ranking
        if first:
            # Perhaps a dead run's, and its members' last words may be newer than it: they would seem to move.
            return
        self._ranking_moved_at = now
        for entry in ranking["members"]:
            if entry["rank"] != self.rank:
                is_new = entry["rank"] not in self._seen.entries
                self._seen.observe(entry, now)
                if is_new and entry["rank"] in ranking["live"]:  # the leader saw it move, and need not be seen so twice
                    self._seen.vouch(entry["rank"], now)

    def _choose_leader(self, now: float) -> int | None:
        """The lowest live rank leads, as far as this rank can tell; two leaders for a moment do no harm.

        A moving ranking names its leader, to whom only a lower rank does not bow. Without one, rank 0 leads from its
        start, and the others give everybody the timeout to appear before they look for a lower rank that moves.
        """
        leader_left = self._ranking is not None and self._ranking["state"] == "left"
        if not leader_left and self._fresh(self._ranking_moved_at, now):
            return min(self._ranking["leader"], self.rank)
        if self.rank == 0:
            return self.rank
        if not (leader_left and self._ranking_moved_at is not None) and self._fresh(self._started_at, now):
            return None
        for rank, path in rank_files(self.directory):
            if rank >= self.rank:
                break
            self._observe_file(rank, path, now)
            if self._seen.live(rank, now):
                return rank
        return self.rank

    def _fresh(self, moved_at: float | None, now: float) -> bool:
        return moved_at is not None and now - moved_at < self._timeout_seconds

    def _observe_file(self, rank: int, path: Path, now: float) -> None:
        try:
            entry = read_entry(rank, path)
        except (OSError, ValueError):  # what is known of that rank stays, and grows old if this goes on
            self.unreadable += 1
        else:
            self._seen.observe(entry, now)

    def _roster(self, own: dict, known_at: float) -> Roster:
        entries = {**self._seen.entries, self.rank: own}
        live = {rank for rank in self._seen.entries if self._seen.live(rank, known_at)}
        if own["state"] == "running":
            live.add(self.rank)
        return Roster(self._leader, make_members(entries, live))

    def _write_ranking(self, own: dict, roster: Roster, now: float) -> None:
        ranked = sorted((member for member in roster.members if member.standing is not None), key=_standing)
        ranking = {
            "leader": self.rank,
            "incarnation": self._incarnation,
            "sequence": self._sequence,
            "state": own["state"],
            "live": [member.rank for member in roster.members if member.live],
            "ranking": [member.rank for member in ranked],
            "members": [own if m.rank == self.rank else self._seen.entries[m.rank] for m in roster.members],
        }
        atomic_write(self.directory / RANKING_NAME, json.dumps(ranking, allow_nan=False), durable=False)
        self._ranking, self._ranking_moved_at = ranking, now


def make_members(entries: dict[int, dict], live: set[int]) -> tuple[Member, ...]:
    """Members from parsed entries by rank, sorted by rank, with their standings among the live."""
    known = [entry for rank, entry in entries.items() if rank in live and entry.get("fitness") is not None]
    known.sort(key=lambda entry: (entry["fitness"], entry["rank"]))
    standings = {entry["rank"]: place / max(len(known) - 1, 1) for place, entry in enumerate(known)}
    return tuple(
        Member(
            rank=rank,
            incarnation=entry["incarnation"],
            sequence=entry["sequence"],
            state=entry["state"],
            live=rank in live,
            address=entry.get("address"),
            step=entry.get("step") or 0,
            fitness=entry.get("fitness"),
            standing=standings.get(rank),
            record={name: value for name, value in entry.items() if name not in _MEMBER_KEYS},
        )
        for rank, entry in sorted(entries.items())
    )


def _stamp(ranking: dict) -> tuple[int, str, int]:
    return ranking["leader"], ranking["incarnation"], ranking["sequence"]


def _standing(member: Member) -> float:
    return member.standing


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value
