"""The benches of faults in their short form: what faults may never cost, and that the benches would see it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.evidence import is_whole, judge_merges, newest_whole, torn
from bench.faults import Fault
from bench.injection import Injection
from bench.population import Population
from bench.witness import lines_of
from training.checkpoint import list_checkpoints

ROOT = Path(__file__).parents[1]
# Seed 10 deals the faults that the mark of the first test names.
CHAOS = ["--ranks", "3", "--minutes", "0.4", "--faults_per_hour", "750", "--interval", "8", "--seed", "10"]
DEALT = ("LEADER_DEATH", "KILL", "FLIPPED_CHECKPOINT", "FLOOD", "STALE_ATTRIBUTES")


def bench(name: str, output: Path, *flags: str) -> tuple[int, dict]:
    """Run a bench: its status and its figures."""
    command = [sys.executable, "-m", f"bench.{name}", *flags, "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)
    assert output.exists(), done.stdout
    return done.returncode, json.loads(output.read_text())


@pytest.fixture(scope="module")
def chaos(text, tmp_path_factory) -> tuple[int, dict, Path]:
    """Status, figures and folder of one run of chaos."""
    folder = tmp_path_factory.mktemp("chaos")
    flags = [*CHAOS, "--data", str(text), "--workdir", str(folder / "runs")]
    return *bench("chaos", folder / "chaos.json", *flags), folder / "runs"


def unstarted(folder: Path) -> Population:
    """A population whose processes have ended, to be judged by its files."""
    return Population("chaos", folder / "chaos", 3, ROOT / "train.py", [])


@pytest.mark.injects(
    Injection.LEADER_DEATH, Injection.KILL, Injection.FLIPPED_CHECKPOINT, Injection.FLOOD, Injection.STALE_ATTRIBUTES
)
def test_chaos_tears_no_merge_loses_no_checkpoint_and_mixes_on(chaos):
    status, figures, _ = chaos
    shown = figures["shown"]
    assert sorted(fault["injection"] for fault in figures["log"]) == sorted(DEALT)
    assert shown["kills"] == 3 and shown["resume_not_seen"] == 0
    assert shown["lost_checkpoints"] == shown["torn_merges"] == shown["deaths_that_were_no_kill"] == 0
    assert shown["ranks_that_mixed_after_the_last_fault"] >= 1
    assert figures["chaos"]["integrity"]["merges_witnessed"] > 0
    assert figures["chaos"]["integrity"]["boundaries_looked_at"] > 0
    assert figures["chaos"]["launcher_status"] == figures["calm"]["launcher_status"] == 0
    assert status == 0


def test_chaos_measures_both_populations_alike(chaos):
    _, figures, _ = chaos
    for name in ("calm", "chaos"):
        assert len(figures[name]["intervals"]) == 3
        assert figures[name]["bytes_per_cpu_s"] > figures[name]["goodput"] > 0
        assert 0 < figures[name]["living"] <= 3
        assert 0 < figures[name]["held_out"]["mean"] < 6
    assert figures["calm"]["deaths"] == 0 and figures["calm"]["living"] == 3


def test_chaos_leaves_no_process_behind(chaos):
    folder = str(chaos[2])
    for process in Path("/proc").glob("[0-9]*"):
        try:
            assert not os.readlink(process / "cwd").startswith(folder), (process / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):  # it has just ended, or is not ours to see
            continue


def test_judge_merges_sees_a_state_that_nobody_held_and_weights_that_changed(chaos):
    population = unstarted(chaos[2])
    assert torn(judge_merges(population)) == 0
    with open(lines_of(population.cwd, 1), "a") as file:
        file.write(f"merge\t{'00' * 32}\nchanged\t7\n")
    judged = judge_merges(population)
    assert judged["merges_of_a_state_nobody_held"] == judged["boundaries_changed_without_a_merge"] == 1
    assert torn(judged) == 2


def test_judge_merges_sees_a_merge_of_fewer_bytes_than_were_sent(chaos):
    population = unstarted(chaos[2])
    before = judge_merges(population)
    merge = next(row for row in population.events() if row["event"] == "merged")
    path = population.cwd / "gossip_logs" / f"run_rank_{int(merge['rank']):04d}.tsv"
    path.write_text(path.read_text().replace(f"\t{merge['bytes']}\t", "\t1000\t", 1))
    after = judge_merges(population)
    assert after["fewer_bytes_than_a_state"] == before["fewer_bytes_than_a_state"] + 1
    assert torn(after) > torn(before)


def test_newest_whole_passes_over_what_was_cut_or_flipped(chaos):
    run_dir = unstarted(chaos[2]).run_dir
    rank = next(file.rank for file in list_checkpoints(run_dir))
    older, newest = [file for file in list_checkpoints(run_dir) if file.rank == rank][-2:]
    assert is_whole(older.path) and newest_whole(run_dir, rank) == newest
    content = newest.path.read_bytes()
    for spoilt in (content[:-1], content[:1000], b"", content[:500] + bytes([content[500] ^ 1]) + content[501:]):
        newest.path.write_bytes(spoilt)
        assert not is_whole(newest.path) and newest_whole(run_dir, rank) == older


def test_fault_that_went_on_from_another_checkpoint_is_lost():
    assert Fault(0.0, Injection.KILL, expected="b.pt", resumed="a.pt").lost
    assert Fault(0.0, Injection.KILL, expected="b.pt", resumed="").lost
    assert not Fault(0.0, Injection.KILL, expected="b.pt", resumed="b.pt").lost
    assert not Fault(0.0, Injection.FRESH_RESTART, expected="", resumed="other.pt").lost
    assert not Fault(0.0, Injection.PAUSE).lost


@pytest.mark.injects(Injection.KILL)
def test_killing_in_the_middle_of_phases_costs_no_whole_checkpoint(tmp_path):
    flags = ["--kills", "4", "--populations", "1", "--ranks", "3"]
    status, figures = bench("killing", tmp_path / "killing.json", *flags)
    assert figures["shown"]["kills"] == figures["shown"]["resumed_from_the_newest_whole"] == 4
    assert any(blow["hit"] for blow in figures["log"])
    assert figures["shown"]["half_written_files_left"] == 0
    assert status == 0
