"""What a rank's place in the ranking changes in its training: how often it saves, and whether an elite may renew it."""

from dataclasses import dataclass

from gossip.filesystem_coordinator import Roster


@dataclass(frozen=True)
class Standing:
    """A rank's place among the ranked: 0 is the best, `ranked` - 1 the last; at least two are ranked."""

    place: int
    ranked: int

    @property
    def share(self) -> float:
        """0 for the best ... 1 for the last."""
        return self.place / (self.ranked - 1)


def standing_of(roster: Roster | None, rank: int) -> Standing | None:
    """The rank's place among the live ranks of known fitness; None if it has none, or is alone there."""
    if roster is None:
        return None
    ranked = sum(member.standing is not None for member in roster.members)
    member = roster.member(rank)
    if member is None or member.standing is None or ranked < 2:
        return None
    return Standing(round(member.standing * (ranked - 1)), ranked)


def save_chance(standing: Standing | None, save_every: int, multiplier: float) -> float:
    """Chance of a checkpoint at this step.

    The best rank saves `multiplier` times as often as the last, linearly in between. Standings are spread evenly, so
    their mean weight is (multiplier + 1) / 2; over that, the population's mean distance between saves is `save_every`.
    """
    if standing is None:
        return 1 / save_every
    weight = multiplier + standing.share * (1 - multiplier)
    return weight / ((multiplier + 1) / 2) / save_every


def is_among_worst(standing: Standing | None, threshold: float) -> bool:
    """Is a rank in the last `threshold` (0 ... 1) of the ranking? Above 0 the last always is, and the best never."""
    if standing is None or threshold == 0:
        return False
    worst = min(max(1, int(standing.ranked * threshold)), standing.ranked - 1)
    return standing.place >= standing.ranked - worst
