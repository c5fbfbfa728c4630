import errno
import json
import os
import time

import pytest

from bench.injection import Injection
from gossip.filesystem_coordinator import FilesystemCoordinator, RankReplaced, Roster
from gossip.registry import RANK_FILE_LIMIT, rank_file, rank_files, read_entry, read_ranking
from tests.clock import Clock

HEARTBEAT = 2.0
TIMEOUT = 10.0


class Population:
    """Coordinators of several ranks in one folder, each with a clock of its own; a test advances them."""

    def __init__(self, directory, ranks, world_size=None):
        self.directory = directory
        self.world_size = world_size or len(ranks)
        self.clocks, self.members, self.fitness = {}, {}, {}
        for rank in ranks:
            self.start(rank, f"first-{rank}")

    def start(self, rank, incarnation):
        # Monotonic clocks of different hosts count from anywhere: here they are a day apart.
        self.clocks[rank] = Clock(86400.0 * rank)
        self.members[rank] = FilesystemCoordinator(
            self.directory, rank, self.world_size, incarnation, TIMEOUT, self.clocks[rank]
        )

    def record(self, rank):
        return {"address": f"127.0.0.1:{5000 + rank}", "step": 10 + rank, "fitness": self.fitness.get(rank), "won": 7}

    def round(self, ranks=None, times=1):
        """One heartbeat of each of `ranks`, in order; time passes for everybody, dead or alive."""
        rosters = {}
        for _ in range(times):
            for clock in self.clocks.values():
                clock.now += HEARTBEAT
            for rank in self.members if ranks is None else ranks:
                rosters[rank] = self.members[rank].beat(self.record(rank))
        return rosters


def live(roster: Roster):
    return [member.rank for member in roster.members if member.live]


def test_coordinator_alone_leads_and_stands_best(tmp_path):
    coordinator = FilesystemCoordinator(tmp_path / "population", 0, 1, "only", TIMEOUT, Clock())
    roster = coordinator.beat({"address": "127.0.0.1:5000", "step": 3, "fitness": 1.5, "host": "here"})
    assert coordinator.is_leader and roster.leader == 0
    me = roster.member(0)
    assert (me.live, me.step, me.fitness, me.standing, me.address) == (True, 3, 1.5, 0.0, "127.0.0.1:5000")
    assert me.record == {"host": "here"}
    assert roster.peers(0) == () and roster.member(1) is None


def test_coordinator_everybody_sees_everybody_move(tmp_path):
    population = Population(tmp_path, range(4))
    first = population.round()
    assert live(first[0]) == [0]  # nobody was seen to move yet
    rosters = population.round(times=3)
    for rank in range(4):
        assert live(rosters[rank]) == [0, 1, 2, 3]
        assert rosters[rank].leader == 0
        assert [peer.rank for peer in rosters[rank].peers(rank)] == [r for r in range(4) if r != rank]
    assert [population.members[rank].is_leader for rank in range(4)] == [True, False, False, False]
    assert rosters[3].member(1).address == "127.0.0.1:5001"
    assert rosters[3].member(1).record == {"won": 7}


def test_coordinator_followers_read_the_ranking_alone(tmp_path, monkeypatch):
    population = Population(tmp_path, range(3))
    population.round(times=3)
    read = []
    monkeypatch.setattr("gossip.filesystem_coordinator.read_entry", lambda rank, path: read.append(rank))
    population.round([1, 2])
    assert read == [1, 2]  # each its own, to see that it is still its own


def test_coordinator_standing_orders_the_live_with_known_fitness(tmp_path):
    population = Population(tmp_path, range(4))
    population.fitness = {0: 2.0, 1: 1.0, 2: None, 3: 1.5}
    rosters = population.round(times=4)
    for rank in range(4):
        assert [member.standing for member in rosters[rank].members] == [1.0, 0.0, None, 0.5]
    assert read_ranking(tmp_path)["ranking"] == [1, 3, 0]
    rosters = population.round([0, 2, 3], times=8)  # rank 1 is dead: the best of the living is best
    assert [member.standing for member in rosters[3].members] == [1.0, None, None, 0.0]


def test_coordinator_calls_a_member_dead_when_its_number_stands_still(tmp_path):
    population = Population(tmp_path, range(3))
    population.round(times=4)
    rosters = population.round([0, 2], times=4)
    assert live(rosters[0]) == live(rosters[2]) == [0, 1, 2]  # 8 of 10 seconds
    rosters = population.round([0, 2], times=3)
    assert live(rosters[0]) == live(rosters[2]) == [0, 2]
    assert not rosters[0].member(1).live and rosters[0].member(1).state == "running"
    rosters = population.round(times=2)  # it was only stopped
    assert live(rosters[0]) == live(rosters[2]) == [0, 1, 2]


@pytest.mark.injects(Injection.LEADER_DEATH)
def test_coordinator_elects_the_lowest_within_timeout_and_heartbeat(tmp_path):
    population = Population(tmp_path, range(4))
    population.round(times=4)
    rounds = int(TIMEOUT / HEARTBEAT)
    rosters = population.round([1, 2, 3], times=rounds - 1)
    assert [population.members[rank].is_leader for rank in (1, 2, 3)] == [False] * 3
    rosters = population.round([1, 2, 3])
    assert [population.members[rank].is_leader for rank in (1, 2, 3)] == [True, False, False]
    assert rosters[3].leader == 1
    rosters = population.round([1, 2, 3], times=2)
    for rank in (1, 2, 3):
        assert live(rosters[rank]) == [1, 2, 3]
        assert rosters[rank].leader == 1


def test_coordinator_followers_find_the_lowest_that_moves_before_it_leads(tmp_path):
    population = Population(tmp_path, range(4))
    population.round(times=4)
    population.round([3, 2, 1], times=int(TIMEOUT / HEARTBEAT) - 1)
    rosters = population.round([3, 2])  # the leader's time is over, and rank 1 has not noticed yet
    assert rosters[2].leader == rosters[3].leader == 1
    assert not population.members[2].is_leader and not population.members[3].is_leader
    # Nobody told them of anybody's death: they keep their peers until the new leader's ranking comes.
    assert live(rosters[3]) == [0, 1, 2, 3]
    population.round([1])
    assert live(population.round([3, 2], times=2)[3]) == [1, 2, 3]


def test_coordinator_elects_at_once_when_the_leader_leaves(tmp_path):
    population = Population(tmp_path, range(3))
    population.round(times=4)
    left = population.members[0].leave(population.record(0))
    assert live(left) == [1, 2]
    rosters = population.round([1, 2])
    assert rosters[1].leader == rosters[2].leader == 1
    assert population.members[1].is_leader
    assert live(rosters[2]) == [1, 2] and rosters[2].member(0).state == "left"


@pytest.mark.injects(Injection.LEADER_DEATH)
def test_coordinator_lower_rank_takes_over_when_it_returns(tmp_path):
    population = Population(tmp_path, range(3))
    population.round(times=4)
    population.round([1, 2], times=7)
    assert population.members[1].is_leader
    population.start(0, "second-0")
    rosters = population.round(times=2)
    assert [population.members[rank].is_leader for rank in range(3)] == [True, False, False]
    assert {roster.leader for roster in rosters.values()} == {0}
    assert live(rosters[2]) == [0, 1, 2]
    assert rosters[2].member(0).incarnation == "second-0"


def test_coordinator_lower_rank_takes_over_from_a_higher_leader(tmp_path):
    population = Population(tmp_path, [2, 3], world_size=4)
    population.round(times=8)
    assert population.members[2].is_leader  # ranks 0 and 1 never came
    population.start(1, "first-1")
    population.round(times=3)
    assert [population.members[rank].is_leader for rank in (1, 2, 3)] == [True, False, False]


@pytest.mark.injects(Injection.TWO_LEADERS)
def test_coordinator_stopped_leader_yields_to_nobody_lower_and_two_leaders_do_no_harm(tmp_path):
    population = Population(tmp_path, range(4))
    population.round(times=4)
    population.round([1, 2, 3], times=7)
    assert population.members[0].is_leader and population.members[1].is_leader  # 0 was stopped and knows nothing
    rosters = population.round([1, 0, 3, 2])
    assert live(rosters[3]) == live(rosters[2]) == [0, 1, 2, 3]
    population.round([3, 2, 1, 0], times=2)
    rosters = population.round()
    assert [population.members[rank].is_leader for rank in range(4)] == [True, False, False, False]
    assert {roster.leader for roster in rosters.values()} == {0}


@pytest.mark.injects(Injection.GHOST)
def test_coordinator_a_rank_that_comes_back_knows_the_living_by_its_second_beat(tmp_path):
    population = Population(tmp_path, range(4))
    population.round(times=3)
    del population.members[1]
    population.round(times=6)  # rank 1 is given up
    population.start(2, "second-2")
    assert live(population.round([0, 2])[2]) == [2]  # the ranking may be a dead run's
    assert live(population.round([0, 2])[2]) == [0, 2, 3]
    assert live(population.round([0, 2, 3], times=6)[2]) == [0, 2, 3]
    assert live(population.round([0, 2], times=6)[2]) == [0, 2]  # and sees itself who falls silent


def test_coordinator_ghosts_of_an_older_run_are_not_alive(tmp_path):
    old = Population(tmp_path, range(4))
    old.round(times=4)
    new = Population(tmp_path, [])
    new.start(0, "second-0")
    new.start(2, "second-2")
    rosters = new.round()
    assert live(rosters[0]) == [0] and live(rosters[2]) == [2]
    rosters = new.round()
    assert live(rosters[0]) == [0, 2]  # a new incarnation is news, not a ghost
    rosters = new.round(times=3)
    assert live(rosters[0]) == live(rosters[2]) == [0, 2]
    assert rosters[0].member(2).incarnation == "second-2"
    assert rosters[2].peers(2) == (rosters[2].member(0),)


@pytest.mark.injects(Injection.STALE_ATTRIBUTES)
def test_coordinator_ignores_a_replaced_incarnation_that_shows_again(tmp_path):
    population = Population(tmp_path, range(3))
    population.round(times=4)
    older = rank_file(tmp_path, 1).read_bytes()
    population.start(1, "second-1")
    population.round(times=2)
    for _ in range(8):  # a cached read of the older file, in place of the newer
        newer = rank_file(tmp_path, 1).read_bytes()
        rank_file(tmp_path, 1).write_bytes(older)
        rosters = population.round([0, 2])
        assert rosters[2].member(1).incarnation == rosters[0].member(1).incarnation == "second-1"
        rank_file(tmp_path, 1).write_bytes(newer)
    assert live(rosters[0]) == [0, 2]


@pytest.mark.injects(Injection.STALE_ATTRIBUTES)
def test_coordinator_a_lower_number_is_no_sign_of_life(tmp_path):
    population = Population(tmp_path, range(2))
    population.round(times=2)
    older = rank_file(tmp_path, 1).read_bytes()
    population.round(times=2)
    newer = rank_file(tmp_path, 1).read_bytes()
    for content in (older, newer) * 4:
        rank_file(tmp_path, 1).write_bytes(content)
        roster = population.round([0])[0]
    assert live(roster) == [0]


# Two processes that are one rank


def twice(population, rank, *incarnations):
    """Start further processes of `rank`; returns the coordinators of all of them, the one that was there first."""
    coordinators = [population.members[rank]]
    for incarnation in incarnations:
        population.start(rank, incarnation)
        coordinators.append(population.members[rank])
    return coordinators


def beats(coordinator, population, rank, times=1):
    """Whether `coordinator` still has its rank after `times` beats."""
    try:
        for _ in range(times):
            coordinator.beat(population.record(rank))
    except RankReplaced:
        return False
    return True


def owner(tmp_path, rank):
    return read_entry(rank, rank_file(tmp_path, rank))["incarnation"]


@pytest.mark.injects(Injection.RANK_TAKEN_TWICE)
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_coordinator_the_older_process_of_a_rank_gives_way(tmp_path, rank):
    population = Population(tmp_path, range(3))
    population.round(times=4)
    older, newer = twice(population, rank, "a-second")  # whose nonce is less than the first's
    survived = []
    for _ in range(6):
        population.round()  # the newer one's
        survived.append(beats(older, population, rank))
    assert survived[0] and not any(survived[2:])  # at the second sight of the newer at the latest
    assert owner(tmp_path, rank) == "a-second"
    rosters = population.round(times=3)
    for seen in rosters.values():
        assert live(seen) == [0, 1, 2] and seen.member(rank).incarnation == "a-second" and seen.leader == 0
    assert population.members[rank] is newer
    with pytest.raises(RankReplaced, match=rf"expected rank {rank} of .* to be this process alone, got another"):
        older.leave(population.record(rank))
    assert read_entry(rank, rank_file(tmp_path, rank))["state"] == "running"  # the leave was not published


@pytest.mark.injects(Injection.RANK_TAKEN_TWICE)
@pytest.mark.parametrize("order", ["ab", "ba"])
def test_coordinator_of_two_that_begin_at_once_one_stays_whoever_is_seen_first(tmp_path, order):
    population = Population(tmp_path, [0, 2], world_size=3)
    population.round(times=3)
    both = {name: FilesystemCoordinator(tmp_path, 1, 3, name, TIMEOUT, Clock()) for name in order}
    for name in order:  # neither finds the other's file
        both[name].beat(population.record(1))
        rank_file(tmp_path, 1).rename(tmp_path / name)
    os.replace(tmp_path / order[-1], rank_file(tmp_path, 1))
    standing = set(order)
    for _ in range(8):
        for name in order:
            if name in standing and not beats(both[name], population, 1):
                standing.remove(name)
            population.round()
    assert standing == {"b"}  # the greater nonce
    rosters = population.round()
    assert owner(tmp_path, 1) == "b"
    assert all(seen.member(1).live and seen.member(1).incarnation == "b" for seen in rosters.values())


@pytest.mark.injects(Injection.RANK_TAKEN_TWICE, Injection.PAUSE)
def test_coordinator_a_stopped_process_finds_that_its_rank_went_on_without_it(tmp_path):
    population = Population(tmp_path, range(2))
    population.round(times=4)
    stopped, *_ = twice(population, 1, "second", "third")
    population.round(times=20)
    assert beats(stopped, population, 1)  # it cannot tell yet whether that one lives
    population.round()
    assert not beats(stopped, population, 1)
    assert live(population.round(times=2)[0]) == [0, 1]


@pytest.mark.injects(Injection.RESTART)
def test_coordinator_counts_the_lives_of_its_rank(tmp_path):
    population = Population(tmp_path, range(2))
    for life in (1, 2, 3):
        population.round(times=2)
        assert read_entry(1, rank_file(tmp_path, 1))["life"] == life
        population.start(1, f"process-{9 - life}")
    rank_file(tmp_path, 1).unlink()  # lost: the ranking still knows
    population.round()
    assert read_entry(1, rank_file(tmp_path, 1))["life"] == 4
    assert live(population.round(times=3)[0]) == [0, 1]


@pytest.mark.parametrize("read", ["read_entry", "read_ranking"])
def test_coordinator_begins_no_life_by_what_it_could_not_read(tmp_path, monkeypatch, read):
    population = Population(tmp_path, range(2))
    population.round(times=2)
    if read == "read_ranking":
        rank_file(tmp_path, 1).unlink()  # so that the ranking alone knows
    population.start(1, "second")
    with monkeypatch.context() as patch:
        patch.setattr(f"gossip.filesystem_coordinator.{read}", raising(OSError(errno.ESTALE, "Stale file handle")))
        with pytest.raises(OSError, match="Stale"):
            population.round([1])
    population.round([1])
    assert read_entry(1, rank_file(tmp_path, 1))["life"] == 2


def raising(error):
    def fail(*_):
        raise error

    return fail


@pytest.mark.injects(Injection.VANISHED)
def test_coordinator_takes_a_rank_in_again_after_all_files_were_lost(tmp_path):
    population = Population(tmp_path, range(2))
    population.round(times=2)
    population.start(1, "second")
    population.round(times=2)
    for name in os.listdir(tmp_path):
        os.unlink(tmp_path / name)
    population.start(1, "another")  # begins at its first life, less than what rank 0 has seen
    population.round([1])
    assert read_entry(1, rank_file(tmp_path, 1))["life"] == 1
    rosters = population.round(times=1 + int(TIMEOUT / HEARTBEAT))
    assert rosters[0].member(1).incarnation == "another" and live(rosters[0]) == [0, 1]


# Files of others that are not what they should be


@pytest.mark.injects(Injection.STALE_ATTRIBUTES)
def test_coordinator_keeps_its_rank_when_a_cache_shows_its_predecessor_again(tmp_path):
    population = Population(tmp_path, range(2))
    population.round(times=3)
    predecessors = rank_file(tmp_path, 1).read_bytes()
    population.start(1, "a-second")
    rank_file(tmp_path, 1).unlink()
    (tmp_path / "ranking.json").unlink()
    population.round([1])  # with the same life, and a lesser nonce: the dead process has the greater claim
    assert read_entry(1, rank_file(tmp_path, 1))["life"] == 1
    for _ in range(5):
        rank_file(tmp_path, 1).write_bytes(predecessors)
        population.round([1])
    assert owner(tmp_path, 1) == "a-second"


@pytest.mark.injects(Injection.STALE_ATTRIBUTES)
def test_coordinator_goes_on_over_an_older_ranking_from_a_cache(tmp_path):
    population = Population(tmp_path, range(3))
    population.round(times=2)
    older = (tmp_path / "ranking.json").read_bytes()
    population.round(times=2)
    steps = []
    for content in (older, None) * 6:
        newer = (tmp_path / "ranking.json").read_bytes()
        (tmp_path / "ranking.json").write_bytes(content or newer)
        seen = population.round([1, 2])[2]
        steps.append(seen.member(0).sequence)
        (tmp_path / "ranking.json").write_bytes(newer)
        population.round([0])
        assert live(seen) == [0, 1, 2] and seen.leader == 0
    assert steps == sorted(steps)  # what is known is never forgotten for something older


ENTRY = {"rank": 1, "incarnation": "a", "life": 1, "sequence": 9, "world_size": 2, "state": "running", "address": None}
BROKEN = {
    "empty": b"",
    "torn": json.dumps(ENTRY).encode()[:20],
    "not-utf8": b"\xff\xfe",
    "no-object": b"[1]",
    "deep": b"[" * 60000,
    "nan": json.dumps({**ENTRY, "fitness": float("nan")}).encode(),
    "infinite": json.dumps(ENTRY).encode().replace(b"null", b"1e999"),
    "endless-integer": json.dumps(ENTRY).encode().replace(b"null", b"1" * 400),
    "too-long": json.dumps({**ENTRY, "note": "x" * RANK_FILE_LIMIT}).encode(),
    "another-rank": json.dumps({**ENTRY, "rank": 0}).encode(),
    "text-sequence": json.dumps({**ENTRY, "sequence": "9"}).encode(),
    "true-sequence": json.dumps({**ENTRY, "sequence": True}).encode(),
    "negative-step": json.dumps({**ENTRY, "step": -1}).encode(),
    "odd-state": json.dumps({**ENTRY, "state": "asleep"}).encode(),
    "number-address": json.dumps({**ENTRY, "address": 5000}).encode(),
    "endless-address": json.dumps({**ENTRY, "address": "x" * 400 + ":1"}).encode(),
    "no-life": json.dumps({k: v for k, v in ENTRY.items() if k != "life"}).encode(),
    "no-incarnation": json.dumps({k: v for k, v in ENTRY.items() if k != "incarnation"}).encode(),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_coordinator_skips_and_counts_a_broken_rank_file(tmp_path, content):
    population = Population(tmp_path, range(3))
    population.round(times=3)
    rank_file(tmp_path, 1).write_bytes(content)
    roster = population.round([0, 2])[0]
    assert population.members[0].unreadable == 1
    assert live(roster) == [0, 1, 2]  # one torn read kills nobody
    assert roster.member(1).step == 11
    assert live(population.round([0, 2], times=6)[2]) == [0, 2]


@pytest.mark.parametrize(
    "content", [b"", b'{"leader": 0', b'{"members": []}', b"[]"], ids=["empty", "torn", "bare", "list"]
)
def test_coordinator_goes_on_over_a_broken_ranking(tmp_path, content):
    population = Population(tmp_path, range(3))
    population.round(times=3)
    (tmp_path / "ranking.json").write_bytes(content)
    rosters = population.round([1, 2])
    assert rosters[2].leader == 0 and live(rosters[2]) == [0, 1, 2]
    assert population.members[2].unreadable == 1
    assert live(population.round()[2]) == [0, 1, 2]


def test_coordinator_waits_for_no_pipe(tmp_path):
    population = Population(tmp_path, range(2))
    population.round(times=3)
    rank_file(tmp_path, 1).unlink()
    os.mkfifo(rank_file(tmp_path, 1))
    assert live(population.round([0])[0]) == [0, 1]
    assert population.members[0].unreadable == 1


def test_coordinator_unreadable_member_is_passed_over(tmp_path):
    population = Population(tmp_path, range(3))
    population.round(times=3)
    rank_file(tmp_path, 1).unlink()
    rank_file(tmp_path, 1).mkdir()  # reading it is an OSError, for root too
    assert live(population.round([0, 2])[2]) == [0, 1, 2]
    assert population.members[0].unreadable == 1


def test_coordinator_raises_when_its_own_file_cannot_be_written_and_goes_on_after(tmp_path):
    population = Population(tmp_path / "population", range(2))
    population.round(times=3)
    os.rename(tmp_path / "population", tmp_path / "away")
    for rank in (0, 1):
        with pytest.raises(OSError):
            population.round([rank])
    os.rename(tmp_path / "away", tmp_path / "population")
    assert live(population.round(times=2)[1]) == [0, 1]


def test_coordinator_publishes_numbers_that_are_not_finite_as_unknown(tmp_path):
    population = Population(tmp_path, range(2))
    population.fitness = {0: float("nan"), 1: float("inf")}
    rosters = population.round(times=3)
    assert live(rosters[0]) == [0, 1] and rosters[0].member(1).fitness is None
    assert read_entry(1, rank_file(tmp_path, 1))["fitness"] is None


def test_coordinator_leaves_nothing_but_its_files(tmp_path):
    population = Population(tmp_path, range(2))
    population.round(times=3)
    assert sorted(os.listdir(tmp_path)) == ["rank_0000.json", "rank_0001.json", "ranking.json"]


def test_rank_files_takes_exact_names_only(tmp_path):
    for name in (
        "rank_0002.json",
        "rank_12345.json",
        "rank_00003.json",
        "rank_1.json",
        ".rank_0000.json.7.tmp",
        "0004",
    ):
        (tmp_path / name).touch()
    assert [rank for rank, _ in rank_files(tmp_path)] == [2, 12345]


def test_coordinator_folds_and_reads_1024_members(tmp_path):
    entry = {
        "incarnation": "x" * 16,
        "life": 1,
        "world_size": 1024,
        "state": "running",
        "address": "10.0.0.1:40000",
        "won": 3,
    }
    clock = Clock()
    leader = FilesystemCoordinator(tmp_path, 0, 1024, "leader", TIMEOUT, clock)
    follower = FilesystemCoordinator(tmp_path, 1, 1024, "x" * 16, TIMEOUT, clock)
    for sequence in (1, 2, 3):
        for rank in range(1, 1024):
            content = {**entry, "rank": rank, "sequence": sequence, "step": sequence, "fitness": 1.0 + rank / 1024}
            rank_file(tmp_path, rank).write_text(json.dumps(content))
        clock.now += HEARTBEAT
        began = time.perf_counter()
        roster = leader.beat({"step": sequence, "fitness": 1.0})
        folded = time.perf_counter()
        seen = follower.beat({"step": sequence, "fitness": 1.0 + 1 / 1024})
        read = time.perf_counter()
    assert len(live(roster)) == len(live(seen)) == 1024
    assert seen.member(1023).standing == 1.0 and len(seen.peers(1)) == 1022
    print(f"1024 members: fold {1e3 * (folded - began):.0f} ms, read {1e3 * (read - folded):.0f} ms")


@pytest.mark.injects(Injection.STALE_ATTRIBUTES)
def test_coordinator_beats_on_where_its_own_file_is_stale(tmp_path, monkeypatch):
    coordinator = FilesystemCoordinator(tmp_path, 0, 2, "ab" * 16, timeout_seconds=10.0)
    coordinator.beat({"step": 1})

    def stale(rank, path):
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patched:
        patched.setattr("gossip.filesystem_coordinator.read_entry", stale)
        coordinator.beat({"step": 2})
    assert coordinator.unreadable == 1
    assert read_ranking(tmp_path)["members"][0]["step"] == 2
