"""What entries of one rank say beside each other: which is newer, whether its process lives, and whose the rank is.

Of two processes that publish the same rank everybody comes to the same answer without a word.
"""

from collections.abc import Iterable


def claim(entry: dict) -> tuple[int, str]:
    """What decides between two processes of one rank, from an entry of each: the greater has it.

    A life is one more than the newest that was on file when the process began; nonces decide between two that began
    at once.
    """
    return entry["life"], entry["incarnation"]


class Sightings:
    """The newest entry seen of each rank, and when on this process's clock it last moved."""

    def __init__(self, timeout_seconds: float) -> None:
        self.timeout_seconds = timeout_seconds
        self.entries: dict[int, dict] = {}
        self._moved_at: dict[int, float] = {}  # absent: never seen to move, so not known to live
        self._replaced: set[str] = set()  # a cached read may show a process again that another already replaced

    def observe(self, entry: dict, now: float) -> None:
        """Take in a parsed rank entry; one that is older than what is known changes nothing."""
        rank, known = entry["rank"], self.entries.get(entry["rank"])
        if known is None:
            self.entries[rank] = entry
        elif self._is_news(entry, known, now):
            self.entries[rank] = entry
            self._moved_at[rank] = now

    def vouch(self, rank: int, now: float) -> None:
        """Somebody who was seen to live says that `rank` does, which was not known before: it counts as moved."""
        self._moved_at.setdefault(rank, now)

    def _is_news(self, entry: dict, known: dict, now: float) -> bool:
        if entry["incarnation"] == known["incarnation"]:
            return entry["sequence"] > known["sequence"]
        if entry["incarnation"] in self._replaced:
            return False
        if claim(entry) > claim(known):
            self._replaced.add(known["incarnation"])
            return True
        return not self.live(entry["rank"], now)  # the files were lost, and lives count from 1 again

    def live(self, rank: int, now: float) -> bool:
        """True for a rank that moved within the timeout before `now` and has not left."""
        moved_at = self._moved_at.get(rank)
        return moved_at is not None and now - moved_at < self.timeout_seconds and not self.left(rank)

    def left(self, rank: int) -> bool:
        """True for a rank that took its leave."""
        return rank in self.entries and self.entries[rank]["state"] == "left"


class Tenure:
    """One process's hold on its rank.

    predecessors: the entries of that rank that are on file before this process has published any.
    """

    def __init__(self, incarnation: str, predecessors: Iterable[dict]) -> None:
        self.incarnation = incarnation
        self.life = 1 + max((entry["life"] for entry in predecessors), default=0)
        self._rivals: dict[str, int] = {}  # processes with a greater claim, and the first number seen of each

    def ended_by(self, entry: dict) -> bool:
        """Whether another process has the rank now: `entry`, on file under it, has the greater claim, and has moved.

        One that does not move may be a dead process's, shown again by a cache, a backup or a torn registry.
        """
        if entry["incarnation"] == self.incarnation or claim(entry) < (self.life, self.incarnation):
            return False
        return entry["sequence"] > self._rivals.setdefault(entry["incarnation"], entry["sequence"])
