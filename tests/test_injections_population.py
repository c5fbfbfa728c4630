"""Faults of whole ranks, brought about in a population of real train.py processes that lives through all of them."""

import os
import re
import select
import shutil
import signal
import subprocess
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
import torch

from bench.injection import Injection
from gossip.faults import Fault
from gossip.filesystem_coordinator import FilesystemCoordinator
from runtime.files import replace_symlink
from tests.population import TALKS, Population, launched, poisoned, slowed
from tests.ranks import HEARTBEAT_SECONDS, LIVENESS_SECONDS, PATIENCE, World, eventually
from tests.strace import attached, strace_prefix

# Checkpoints at SIGUSR1 alone, and at the end: then a test knows what there is. A peer that stands still is given up
# soon, and one that trains on does so beside what is being started.
FLAGS_HERE = ["--save_every", "1g", "--no_fitness_weighted_checkpointing", "--gossip_mixing_rate", "0.1",
              "--gossip_timeout", "5", "--keep_checkpoints", "2", "--keep_elite", "1"]  # fmt: skip
CROWDED_SECONDS = 3.0  # what a machine may add that has other things to do


@pytest.mark.injects(Injection.KILL)
def test_a_killed_rank_is_restarted_by_the_launcher_and_goes_on_from_its_own_checkpoint(text, tmp_path):
    world = World(tmp_path, text, 2, *FLAGS_HERE)
    with launched(world) as launcher:
        eventually(lambda: world.live() == [0, 1])
        saved = world.save(1)
        world.goes_on(1)
        killed = world.pid(1)
        os.kill(killed, signal.SIGKILL)
        world.goes_on(0, steps=100)
        eventually(lambda: world.pid(1) != killed and world.live() == [0, 1])
        assert f"resumed {saved.name}" in world.log(1)
        world.goes_on(1)
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(timeout=PATIENCE) == 0  # the last process of every rank ended well
        assert "rank 1 was killed by SIGKILL" in (world.cwd / "errors").read_text()


@pytest.mark.injects(Injection.LAUNCHER_DEATH)
def test_ranks_save_and_leave_when_their_launcher_is_killed(text, tmp_path):
    world = World(tmp_path, text, 2, *FLAGS_HERE)
    with launched(world) as launcher:
        eventually(lambda: world.live() == [0, 1])
        processes = [os.pidfd_open(world.pid(rank)) for rank in range(2)]
        launcher.kill()
        for rank, process in enumerate(processes):
            ended, _, _ = select.select([process], [], [], PATIENCE)  # readable once it has ended
            os.close(process)
            assert ended and "(stopped by a signal)" in world.log(rank)


@pytest.mark.injects(Injection.DIVERGING)
def test_a_rank_whose_rate_is_far_too_high_is_mixed_with_nobody(text, tmp_path):
    """Whatever it and its peer say of their losses: none is significant here, so that any two would take the mean."""
    world = World(tmp_path, text, 2, *FLAGS_HERE, "--gossip_significance", "0", "--gossip_rollback", "none")
    try:
        world.start(0)
        world.start(1, "--lr", "1")
        told = world.eventually(lambda: refusals(world))
        assert "trains at a rate of 1, where 0.003" in told[0]["message"]
        assert "no weights from this process for 60 s" in told[0]["message"]
        world.goes_on(0, steps=100)
        assert not world.events(0, "averaged", "merged") and refusals(world) == told
    finally:
        world.close()


def refusals(world: World) -> list[dict[str, str]]:
    """Rank 0's events of weights that it did not take because their rank diverges."""
    return [row for row in world.events(0, "failed") if row["message"].startswith(Fault.DIVERGED.value)]


@pytest.fixture(scope="module")
def population(text, tmp_path_factory):
    """Ranks 0 and 1 of three, in a run directory where an earlier rank 2, which led, has left its traces."""
    cwd = tmp_path_factory.mktemp("population")
    population = Population(cwd, text, 3, *FLAGS_HERE)
    ghost = FilesystemCoordinator(population.run / "population", 2, 3, "gone", 1.0, clock=iter(range(100)).__next__)
    for _ in range(5):
        ghost.beat({"address": "127.0.0.1:9", "step": 9, "fitness": 0.1, "pid": 1})
    assert population.ranking()["leader"] == 2
    try:
        population.start(0)
        population.start(1)
        population.gather(0, 1)
        yield population
    finally:
        population.close()


def others_go_on(population: Population) -> None:
    """Ranks 0 and 1 train on, and mix."""
    for rank in (0, 1):
        population.goes_on(rank)
        population.mixes(rank)


@pytest.mark.injects(Injection.GHOST)
def test_processes_that_are_gone_are_listed_but_never_called(population):
    population.gather(0, 1)
    others_go_on(population)
    assert population.live() == [0, 1] and population.ranking()["leader"] == 0
    assert population.entry(2)["incarnation"] == "gone"
    failures = [row["message"] for rank in (0, 1) for row in population.events(rank, "failed")]
    assert not failures


@pytest.mark.injects(Injection.LATE_JOIN)
def test_a_rank_that_comes_late_adopts_the_weights_of_an_elder(population):
    population.eventually(lambda: min(map(population.lineage, (0, 1))) > 400)
    population.begin(2)
    population.eventually(lambda: population.adoptions(2))
    population.eventually(lambda: population.lineage(2) > population.step(2) + 200)
    # Nobody took anything from the newcomer before: the first that it did with anybody was to adopt.
    assert "adopts" in population.events(2, *TALKS)[0]["message"]
    assert not any(row["peer"] == "2" for rank in (0, 1) for row in population.adoptions(rank))
    population.gather(0, 1, 2)


@pytest.mark.injects(Injection.RESTART)
def test_a_rank_that_is_ended_and_started_again_goes_on_where_it_was(population):
    population.gather(0, 1, 2)
    population.save(0)
    population.stop(2)
    saved = population.checkpoints(2)[-1]
    population.eventually(lambda: population.live() == [0, 1])
    others_go_on(population)
    population.begin(2)
    assert f"resumed {saved.path.name}" in population.log(2)
    population.mixes(2)
    steps = [int(row["step"]) for row in population.metrics(2)]
    assert steps == sorted(set(steps))


@pytest.mark.injects(Injection.PAUSE)
def test_a_rank_that_is_stopped_for_a_while_holds_up_nobody_and_takes_part_again(population):
    population.gather(0, 1, 2)
    population.signal(1, signal.SIGSTOP)
    population.eventually(lambda: population.live() == [0, 2])
    for rank in (0, 2):
        population.goes_on(rank)
        population.mixes(rank)
    population.signal(1, signal.SIGCONT)
    population.gather(0, 1, 2)
    population.goes_on(1)
    population.mixes(1)


@pytest.mark.injects(Injection.STRAGGLER)
def test_a_rank_at_a_tenth_of_the_speed_stays_a_member(population):
    population.gather(0, 1, 2)
    with slowed(population, 1):
        before = [population.step(rank) for rank in (0, 1, 2)]
        population.mixes(1, times=3, live=[0, 1, 2])
        population.goes_on(0)
        population.goes_on(2)
        fast, slow, fast_too = (population.step(rank) - step for rank, step in zip((0, 1, 2), before, strict=True))
    assert slow < min(fast, fast_too) / 2


@pytest.mark.injects(Injection.TWO_LEADERS)
def test_two_leaders_at_once_do_no_harm(population):
    population.gather(0, 1, 2)
    folder = population.run / "population"
    unseen = [f"-P{folder / name}" for name in ("ranking.json", "rank_0000.json", "rank_0001.json")]
    inject = ["-e", "trace=openat", "-e", "inject=openat:error=ESTALE"]
    leaders = set()

    def both_lead() -> bool:
        leaders.add(population.ranking()["leader"])
        return {0, 2} <= leaders

    with attached(population.pid(2), population.cwd / "trace", *inject, *unseen):
        population.eventually(both_lead)
        newest = {rank: [population.save(rank) for _ in range(3)] for rank in (0, 1, 2)}
        leaders.clear()
        population.eventually(both_lead)
    population.eventually(lambda: is_tidy(population, newest))
    beats: list[int] = []

    def rank_0_leads_alone() -> bool:
        ranking = population.ranking()
        if ranking["leader"] != 0:
            beats.clear()
            return False
        beats.append(ranking["sequence"])
        return beats[-1] >= beats[0] + 10

    population.eventually(rank_0_leads_alone)
    population.gather(0, 1, 2)
    others_go_on(population)


def is_tidy(population: Population, saved: dict[int, list[Path]]) -> bool:
    """Each rank that saved has its newest two checkpoints, one best at most lies beside, and links lead to what is."""
    kept = {file.path for file in population.checkpoints()}
    for paths in saved.values():
        assert set(paths[-2:]) <= kept
    links = {link.name: link.resolve() for link in population.run.glob("*.pt") if link.is_symlink()}
    newest = max(population.checkpoints(), key=lambda file: (file.step, -file.rank))
    return (
        len(kept) <= 2 * 3 + 1
        and links.keys() == {"latest.pt", "best.pt", "elite_01.pt"}
        and links["latest.pt"] == newest.path
        and set(links.values()) <= kept
        and not population.temporaries()
    )


@pytest.mark.injects(Injection.RANK_TAKEN_TWICE)
def test_a_second_process_of_a_rank_is_turned_away_by_the_lock(population):
    population.gather(0, 1, 2)
    first = population.processes[1]
    second = population.start(1, resume=True)
    assert population.ended(1) == 2
    population.processes[1] = first
    (line,) = population.said(second).splitlines()
    assert "expected rank 1 of" in line and "to be free, got a process that is running it" in line
    population.goes_on(1)


@pytest.mark.injects(Injection.RANK_TAKEN_TWICE)
def test_without_locks_the_older_process_of_a_rank_gives_way(population):
    population.gather(0, 1, 2)
    population.save(1)
    before, life = {file.path for file in population.checkpoints(1)}, population.entry(1)["life"]
    older = population.processes.pop(1)
    no_locks = strace_prefix("--seccomp-bpf", "-e", "inject=flock:error=ENOLCK", trace=population.cwd / "trace")
    newer = population.start(1, prefix=no_locks, resume=True)
    assert older.wait(timeout=PATIENCE) == 4
    assert "expected rank 1 of" in (last := population.said(older).splitlines()[-1]) and "took its place" in last
    assert "Traceback" not in population.said(older)
    assert {file.path for file in population.checkpoints(1)} <= before  # it saved nothing when it left
    assert "has no file locks" in population.said(newer)
    population.gather(0, 1, 2)
    assert population.entry(1)["life"] == life + 1
    population.goes_on(1)
    population.mixes(1)


@pytest.mark.injects(Injection.LEADER_DEATH)
def test_another_rank_leads_after_the_leaders_death_and_until_its_return(population):
    population.gather(0, 1, 2)
    assert population.ranking()["leader"] == 0
    population.kill(0)
    died = time.monotonic()
    population.eventually(lambda: population.ranking()["leader"] == 1)
    assert time.monotonic() - died < LIVENESS_SECONDS + HEARTBEAT_SECONDS + CROWDED_SECONDS
    population.eventually(lambda: population.live() == [1, 2])
    newest = {rank: [population.save(rank) for _ in range(3)] for rank in (1, 2)}
    population.eventually(lambda: is_tidy(population, newest))
    population.begin(0)
    population.eventually(lambda: population.ranking()["leader"] == 0)
    population.gather(0, 1, 2)
    others_go_on(population)


@pytest.mark.injects(Injection.CLOCK_SKEW)
def test_clocks_that_are_hours_apart_keep_nobody_from_mixing(population):
    for tool in ("faketime", "unshare"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    if subprocess.run(["unshare", "-T", "true"], capture_output=True).returncode != 0:
        pytest.skip("the monotonic clock cannot be shifted here: unshare -T is not permitted")
    population.gather(0, 1)
    ahead = ("unshare", "-T", "--monotonic", "20000", "--fork",
             "env", "FAKETIME_DONT_FAKE_MONOTONIC=1", "faketime", "-f", "+5h")  # fmt: skip
    population.begin(2, prefix=ahead)
    population.mixes(2, times=5, live=[0, 1, 2])
    written = datetime.fromisoformat(population.events(2)[-1]["timestamp"].replace("Z", "+00:00"))
    assert written - datetime.now(timezone.utc) > timedelta(hours=4)
    others_go_on(population)


@pytest.mark.injects(Injection.POISONED_ELITE, Injection.DANGLING_SYMLINK)
def test_an_elite_that_does_harm_is_rolled_back_and_one_that_is_broken_refused(population):
    population.gather(0, 1)
    good = population.save(0)
    population.begin(2, "--rejuvenation_probability", "1", "--rejuvenation_threshold", "1")
    with poisoned(population, good, 1, lambda weights: weights.neg_()):
        message = population.eventually(lambda: message_about(population, "rolled_back", "elite_01.pt"))
        losses = re.search(r"(\S+) and (\S+) before, (\S+) and (\S+) nats/byte after", message).groups()
        averaged, held, averaged_after, held_after = map(float, losses)
        assert averaged_after > averaged + 0.1 or held_after > held + 0.1
    with poisoned(population, good, 2, lambda weights: weights.view(-1)[:1].fill_(torch.nan)):
        population.eventually(lambda: message_about(population, "rejuvenation_failed", "expected finite weights"))
    link = population.run / "elite_01.pt"

    def refuses_what_is_not_there() -> bool:
        replace_symlink(link, "checkpoint_rank_0000_step_000000_loss_0.0001.pt")  # again: the leader mends it
        return message_about(population, "rejuvenation_failed", "no such file")

    population.eventually(refuses_what_is_not_there)
    population.eventually(link.exists)
    others_go_on(population)
    population.goes_on(2)
    assert float(population.metrics(2)[-1]["ema_loss"]) < 2 * float(population.metrics(0)[-1]["ema_loss"])


def message_about(population: Population, event: str, what: str) -> str | None:
    """What rank 2 said first of such an event that was about `what`."""
    return next((row["message"] for row in population.events(2, event) if what in row["message"]), None)


@pytest.mark.injects(Injection.FRESH_RESTART)
def test_a_rank_that_comes_back_without_a_checkpoint_adopts_a_live_peers_weights(population):
    population.gather(0, 1, 2)
    population.kill(2)
    for path in population.run.glob("*.pt"):
        path.unlink()
    before = len(population.adoptions(2))
    process = population.begin(2)
    assert "resumed" not in population.said(process)
    population.eventually(lambda: len(population.adoptions(2)) > before)
    population.eventually(lambda: population.lineage(2) > population.step(2) + 200)
    population.gather(0, 1, 2)
