import contextlib
import dataclasses
import json
import math
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.evolution.__main__ import main
from bench.evolution.arms import DEFAULT_ARMS, POLICIES
from bench.evolution.intervals import interval, paired, t_quantile
from bench.evolution.laboratory import read_results, run_tasks, tasks_of
from bench.evolution.policy import DIVERGING, Conditions, parse_arm
from bench.evolution.real import flags_of, run_real
from bench.evolution.replica import Replica
from bench.evolution.report import plot, rows_of
from bench.evolution.rounding import as_sent, sent_bytes
from bench.evolution.trial import Setting, _readers, cosine_decay, rate_factors, run_trial
from gossip.fitness_tracker import FitnessTracker
from mingru.minLM import MinLM
from runtime.errors import UserError
from tests.ranks import PATIENCE, ROOT, eventually
from training.data import Corpus
from training.fitness import Fitness
from training.heredity import Heredity
from training.optimizer import build_optimizer
from training.options import OptimizerOptions, parse_arguments
from training.probe import Probe

CPU = torch.device("cpu")
WHOLE = "payload=full,wire=fp32"  # what travels arrives bit for bit


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text"
    words = random.Random(1).choices(["the ", "cat ", "sat ", "on ", "a ", "mat.\n"], k=4000)
    path.write_text("".join(words))
    return path


@pytest.fixture(scope="module")
def corpus(data):
    return Corpus([data], 0x1E)


def setting(**changes) -> Setting:
    values = {
        "fingerprint": "", "val_fraction": 0.2, "probe_windows": 4, "replicas": 2, "steps": 4, "dim": 16, "depth": 1,
        "ff_mult": 2.0, "batch_size": 2, "chunk_size": 16, "lr": 0.01, "weight_decay": 0.01, "warmup_steps": 2,
    }  # fmt: skip
    return Setting(**values | changes)


def trial(corpus, text, seed=1, **changes) -> dict:
    return run_trial(setting(**changes), parse_arm(text, POLICIES), seed, corpus, CPU)


def untimed(result: dict) -> dict:
    return {name: value for name, value in result.items() if name not in ("wall_s", "cpu_s")}


def replicas_of(corpus, count, lr=0.01, seeds=True, schedulefree=True) -> list[Replica]:
    """Replicas that differ, none of which has trained."""
    made = []
    for rank in range(count):
        torch.manual_seed(rank if seeds else 0)
        model = MinLM(setting().model)
        options = OptimizerOptions(lr=lr, schedulefree=schedulefree)
        weights = build_optimizer(model, options)
        fitness = Fitness("probe", FitnessTracker(0.9), Probe(model, weights, corpus.split(0.2)[1], 4, 1024, CPU), 1)
        heredity = Heredity(("lr",), options, 1.0, 0.1, 0, 1)
        made.append(Replica(rank, model, weights, [], fitness, heredity, options, 2, CPU))
    return made


def policy_on(text, replicas):
    policy = parse_arm(text, POLICIES).policy()
    policy.begin(replicas, random.Random(1))
    return policy


def test_evolution_ddp_of_one_replica_is_solo(corpus):
    ddp, solo = trial(corpus, "ddp", replicas=1), trial(corpus, "solo", replicas=1)
    assert ddp["losses"] == solo["losses"]
    assert ddp["bytes_over_ddp"] == solo["bytes_over_ddp"] == 0


def test_evolution_ddp_of_two_learns_from_both(corpus):
    ddp, solo = trial(corpus, "ddp"), trial(corpus, "solo")
    assert len(ddp["losses"]) == 1 and len(solo["losses"]) == 2
    assert ddp["losses"][0] not in solo["losses"]


def test_evolution_pair_mean_keeps_the_pairs_sum(corpus):
    first, second = replicas_of(corpus, 2)
    before = {name: first.live[name].double() + second.live[name].double() for name in first.live}
    policy_on(f"pair_mean:{WHOLE}", [first, second]).meet(first, second)
    for name, total in before.items():
        torch.testing.assert_close(first.live[name].double() + second.live[name].double(), total, rtol=0, atol=1e-6)
        torch.testing.assert_close(first.live[name], second.live[name])


def test_evolution_a_share_of_the_coordinates_is_averaged_in_both_sequences(corpus):
    first, second = replicas_of(corpus, 2)
    before = [{name: tensor.clone() for name, tensor in replica.live.items()} for replica in (first, second)]
    policy_on(f"pair_mean:share=0.25,{WHOLE}", [first, second]).meet(first, second)
    mean = {name: (before[0][name] + before[1][name]) / 2 for name in first.live}
    for replica, old in zip((first, second), before, strict=True):
        for name, now in replica.live.items():
            moved = now != old[name]
            torch.testing.assert_close(now[moved], mean[name][moved])
    name = "token_emb.weight"
    moved = [first.live[f"{kind}.{name}"] != before[0][f"{kind}.{name}"] for kind in "yz"]
    assert torch.equal(*moved) and 0.2 < float(moved[0].float().mean()) < 0.3


def test_evolution_nobody_meets_who_is_shunned(corpus):
    alone = trial(corpus, "solo:corrupt=1", replicas=3)
    shunned = trial(corpus, "pair_mean:corrupt=1,p=1,shun=1", replicas=3)
    assert shunned["losses"][2] == alone["losses"][2] and shunned["losses"][0] != alone["losses"][0]
    assert shunned["counts"]["averaged"] > 0 == shunned["replicas"][2]["merges"]


def test_evolution_one_way_moves_the_loser_alone(corpus):
    winner, loser = replicas_of(corpus, 2)
    before = {name: tensor.clone() for name, tensor in winner.live.items()}
    expected = {name: tensor.lerp(before[name], 0.25) for name, tensor in loser.live.items()}
    policy_on(f"one_way:alpha=0.25,{WHOLE}", [winner, loser]).win(winner, loser)
    for name in before:
        assert torch.equal(winner.live[name], before[name])
        torch.testing.assert_close(loser.live[name], expected[name])


def test_evolution_clonal_takes_the_optimizers_counters_along(corpus):
    winner, loser = replicas_of(corpus, 2)
    winner.weights.load_scalars({"k": 7, "weight_sum": 2.0, "lr_max": 0.01})
    policy_on(f"one_way:method=clonal,{WHOLE}", [winner, loser]).win(winner, loser)
    assert loser.weights.scalars() == winner.weights.scalars()
    assert all(torch.equal(loser.live[name], tensor) for name, tensor in winner.live.items())


def test_evolution_one_way_by_the_probe_prefers_the_lower_loss(corpus):
    replicas = replicas_of(corpus, 2)
    better = min(replicas, key=lambda replica: replica.fitness.judge()[0])
    before = {name: tensor.clone() for name, tensor in better.live.items()}
    for caller, called in (replicas, replicas[::-1]):
        policy_on("one_way:winner=probe,alpha=0.1", replicas).meet(caller, called)
    assert all(torch.equal(better.live[name], tensor) for name, tensor in before.items())


def test_evolution_a_loser_inherits_the_rate_only_if_asked(corpus):
    winner, loser = replicas_of(corpus, 2)
    winner.lr = 0.04
    policy_on("one_way", [winner, loser]).win(winner, loser)
    assert loser.lr == 0.01
    policy_on("one_way:evolve=lr", [winner, loser]).win(winner, loser)
    assert 0.03 < loser.lr < 0.06 and loser.lr != 0.04  # log-normal, of standard deviation 0.1


def test_evolution_harm_is_rolled_back(corpus):
    winner, loser = replicas_of(corpus, 2)
    for tensor in winner.live.values():
        tensor.mul_(30)
    before = {name: tensor.clone() for name, tensor in loser.live.items()}
    policy_on("one_way:rollback=0.1,evolve=lr", [winner, loser]).win(winner, loser)
    assert (loser.rolled_back, loser.merges, loser.lr) == (1, 0, 0.01)
    assert all(torch.equal(loser.live[name], tensor) for name, tensor in before.items())


def test_evolution_ours_without_significance_only_averages(corpus):
    result = trial(corpus, "ours:p=1,significance=0,probe_every=1")
    assert set(result["counts"]) == {"averaged"}


def test_evolution_ours_that_neither_wins_nor_averages_is_solo(corpus):
    still = trial(corpus, "ours:p=1,significance=0,tie=none,probe_every=1")
    assert still["losses"] == trial(corpus, "solo")["losses"]
    assert still["bytes_sent"] == 0 and set(still["counts"]) == {"no clear winner"}


def test_evolution_ours_lets_the_clear_winner_flow_into_the_loser(corpus):
    good, bad = replicas_of(corpus, 2)
    for tensor in bad.live.values():
        tensor.mul_(30)
    before = {name: tensor.clone() for name, tensor in good.live.items()}
    policy = policy_on("ours:p=0,significance=0.5", [bad, good])
    policy.after_step(1)  # measures
    policy.meet(bad, good)
    assert policy.counts == {"won": 1} and (good.sent > 0, bad.sent) == (True, 0)
    assert all(torch.equal(good.live[name], tensor) for name, tensor in before.items())


def test_evolution_ours_takes_nothing_for_a_while_from_who_did_harm(corpus):
    harmful, harmed = replicas_of(corpus, 2)
    for tensor in harmful.live.values():
        tensor.mul_(30)
    policy = policy_on("ours:p=0,significance=0,step_seconds=2", [harmful, harmed])
    for step, counts in (
        (1, {"averaged": 1}),
        (30, {"averaged": 1, "not accepted": 1}),  # 58 s after the harm
        (31, {"averaged": 2, "not accepted": 1}),
        (90, {"averaged": 2, "not accepted": 2}),  # it did harm again: twice as long
    ):
        policy.after_step(step)
        policy.meet(harmful, harmed)
        assert policy.counts == counts, step
    assert harmed.rolled_back == 2


def test_evolution_mean_all_moves_everyone_by_its_share(corpus):
    replicas = replicas_of(corpus, 3)
    name = "y.token_emb.weight"
    before = [replica.live[name].clone() for replica in replicas]
    policy_on("mean_all:every=1,share=0.25", replicas).after_step(1)
    mean = torch.stack(before).mean(0)
    for replica, old in zip(replicas, before, strict=True):
        torch.testing.assert_close(replica.live[name], 0.75 * old + 0.25 * mean)


def test_evolution_diloco_follows_outer_nesterov(corpus):
    replicas = replicas_of(corpus, 2, seeds=False)
    policy = policy_on("diloco:every=1,outer_lr=0.7,momentum=0.9", replicas)
    name = "z.token_emb.weight"
    outer, velocity = replicas[0].live[name].clone(), 0.0
    for step in (1, 2):
        for rank, replica in enumerate(replicas):
            replica.live[name].add_(step + rank)  # what training did
        gradient = outer - torch.stack([replica.live[name] for replica in replicas]).mean(0)
        velocity = 0.9 * velocity + gradient
        outer = outer - 0.7 * (gradient + 0.9 * velocity)
        policy.after_step(step)
        for replica in replicas:
            torch.testing.assert_close(replica.live[name], outer)


def test_evolution_outer_steps_over_plain_adamw_leave_its_moments_where_they_are(corpus):
    replicas = replicas_of(corpus, 2, schedulefree=False)
    for replica in replicas:
        replica.live["m.token_emb.weight"].fill_(1 + replica.rank)
    policy_on("diloco:every=1,outer_lr=1,momentum=0", replicas).after_step(1)
    assert torch.equal(replicas[0].live["w.token_emb.weight"], replicas[1].live["w.token_emb.weight"])
    assert [float(replica.live["m.token_emb.weight"].mean()) for replica in replicas] == [1, 2]


@pytest.mark.parametrize("wire", ["bf16", "int4"])
@pytest.mark.parametrize("arm", ["diloco", "noloco"])
def test_evolution_outer_steps_take_what_was_rounded(corpus, arm, wire):
    found = {}
    for rounded_to in ("fp32", wire):
        replicas = replicas_of(corpus, 2, seeds=False)
        policy = policy_on(f"{arm}:every=1,outer_lr=1,momentum=0,wire={rounded_to}", replicas)
        for replica in replicas:
            replica.live["z.token_emb.weight"].add_(0.001 * (1 + replica.rank))
        policy.after_step(1)
        found[rounded_to] = replicas[0].live["z.token_emb.weight"]
    off = (found["fp32"] - found[wire]).abs().max()
    assert 0 < off < 0.01


def test_evolution_four_bits_of_a_difference_keep_all_but_a_hundredth_of_its_energy():
    generator = torch.Generator().manual_seed(1)
    near = {"weight": torch.randn(300, 100, generator=generator), "bias": torch.randn(7, generator=generator)}
    apart = {name: 0.01 * torch.randn(tensor.shape, generator=generator) for name, tensor in near.items()}
    apart["weight"][3, 4] = 1.0  # one number that is far off spreads over its block
    arrived = as_sent({name: near[name] + apart[name] for name in near}, "int4", near=near)
    off = torch.cat([(arrived[name] - near[name] - apart[name]).flatten() for name in near])
    energy = torch.cat([tensor.flatten() for tensor in apart.values()]).square().sum()
    assert 0.008 < off.square().sum() / energy < 0.015  # 0.0115 for a Gaussian


def test_evolution_four_bits_are_counted_with_each_blocks_spacing():
    assert [sent_bytes({"weight": torch.zeros(count)}, "int4") for count in (8192, 8193)] == [4100, 8200]


def test_evolution_four_bits_from_each_other_keep_the_sum_of_two():
    ends = [{"weight": torch.randn(9000, generator=torch.Generator().manual_seed(seed))} for seed in (1, 2)]
    arrived = [as_sent(end, "int4", near=other)["weight"] for end, other in (ends, reversed(ends))]
    torch.testing.assert_close(sum(arrived), sum(end["weight"] for end in ends), atol=1e-5, rtol=0)


def test_evolution_a_cosine_ends_at_a_tenth_of_the_rate():
    assert [cosine_decay(step, 100, 300) for step in (1, 100, 200, 300)] == pytest.approx([1, 1, 0.55, 0.1])
    assert cosine_decay(5, 5, 5) == 1


def test_evolution_a_cosine_is_of_plain_adamw(corpus):
    cosine, schedulefree = trial(corpus, "solo:optimizer=cosine", steps=8), trial(corpus, "solo", steps=8)
    assert cosine["loss"] != schedulefree["loss"] and cosine["replicas"][0]["lr"] == schedulefree["replicas"][0]["lr"]


def test_evolution_whose_base_iterate_is_far_off_is_not_merged(corpus):
    first, second = replicas_of(corpus, 2, seeds=False)
    for replica, apart in ((first, 0.001), (second, 0.1)):
        replica.weights.load_scalars({"k": 9, "weight_sum": 1.0, "lr_max": 0.01})
        for name, tensor in replica.live.items():
            if name[0] == "z":
                tensor.add_(apart)
    policy = policy_on("ours:p=0,significance=0,rollback=inf", [first, second])
    policy.after_step(1)
    policy.meet(first, second)
    assert (first.merges, second.merges) == (0, 1) and policy.counts == {"diverged": 1, "averaged": 1}
    policy.after_step(2)  # measures again
    policy.meet(first, second)
    assert policy.counts["not accepted"] == 1  # the first distrusts the second


def test_evolution_noloco_follows_its_formula(corpus):
    replicas = replicas_of(corpus, 2)
    policy = policy_on("noloco:every=1,momentum=0.5,outer_lr=0.7,pull=0.6", replicas)
    name = "y.token_emb.weight"
    slow = [replica.live[name].clone() for replica in replicas]
    velocity = [torch.zeros_like(slow[0]) for _ in replicas]
    for step in (1, 2):
        for rank, replica in enumerate(replicas):
            replica.live[name].add_(step + rank)
        moved = sum(replica.live[name] - phi for replica, phi in zip(replicas, slow, strict=True)) / 2
        middle = (slow[0] + slow[1]) / 2
        velocity = [0.5 * v + 0.7 * moved + 0.6 * (middle - phi) for v, phi in zip(velocity, slow, strict=True)]
        slow = [phi + v for phi, v in zip(slow, velocity, strict=True)]
        policy.after_step(step)
        for replica, phi in zip(replicas, slow, strict=True):
            torch.testing.assert_close(replica.live[name], phi)


# With 2 ranks a ring all-reduce sends each rank's 4 P bytes of gradients once; a whole state is 12 P, y and z are 8 P.
BY_HAND = {
    "solo": 0,
    "ddp": 1,
    "pair_mean:p=1": 2 * 4 / 4,  # both call, and at each of these meetings both send
    "pair_mean:p=1,share=0.25": 2 * 4 / 4 / 4,
    "pair_mean:p=1,wire=fp32": 2 * 8 / 4,
    "pair_mean:p=1,payload=full,wire=fp32": 2 * 12 / 4,
    "one_way:p=1,winner=random": 2 * 4 / 4 / 2,  # one of the two sends
    "mean_all:every=1": 12 / 4,
    "diloco:every=2": 8 / 4 / 2,
    "diloco:every=2,wire=bf16": 4 / 4 / 2,
    "diloco:every=2,optimizer=cosine": 4 / 4 / 2,  # one sequence
    "noloco:every=1": 2 * 8 / 4,  # phi and its displacement
    "noloco:every=1,wire=bf16": 2 * 4 / 4,
}


@pytest.mark.parametrize("arm", BY_HAND)
def test_evolution_bytes_are_those_counted_by_hand(corpus, arm):
    assert trial(corpus, arm)["bytes_over_ddp"] == pytest.approx(BY_HAND[arm])


@pytest.mark.parametrize("arm", ["pair_mean:p=1,wire=int4", "one_way:p=1,winner=random,wire=int4"])
def test_evolution_remainders_are_counted_and_arrive(corpus, arm):
    found, rounded = trial(corpus, arm, steps=8), trial(corpus, arm.replace("int4", "bf16"), steps=8)
    assert found["loss"] == pytest.approx(rounded["loss"], abs=0.02)
    blocks = -(-2 * found["parameters"] // 8192)
    sketch, packed = blocks * 64 * 4, blocks * (4096 + 4)
    meetings = 2 * 8
    expected = meetings * (2 * sketch + packed * (2 if "pair" in arm else 1)) / 2
    assert found["bytes_sent"] == pytest.approx(expected)
    assert found["counts"]["blocks left out"] == 0 < found["counts"]["blocks"]


@pytest.mark.parametrize("arm", ["ours:evolve=lr,p=0.7,spread=8,probe_every=2", "noloco:every=2", "solo:corrupt=1"])
def test_evolution_trials_repeat_and_seeds_differ(corpus, arm):
    first = trial(corpus, arm)
    assert untimed(trial(corpus, arm)) == untimed(first)
    assert trial(corpus, arm, seed=2)["losses"] != first["losses"]


def test_evolution_trials_leave_the_global_generator_alone(corpus):
    before = torch.random.get_rng_state()
    trial(corpus, "solo")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_evolution_corrupted_data_reach_the_last_replicas_alone(corpus):
    clean, corrupted = trial(corpus, "solo", steps=8)["losses"], trial(corpus, "solo:corrupt=1", steps=8)["losses"]
    assert corrupted[0] == clean[0] and corrupted[1] > clean[1]


def test_evolution_parted_lanes_begin_in_a_part_of_the_data_for_each_rank(corpus):
    training = corpus.split(0.2)[0]
    begun = {}
    for parted in (0, 1):
        readers = _readers(setting(), Conditions(parted=parted), 2, 1, training)
        begun[parted] = [[int(place * 4 / len(training)) for place in reader.positions] for reader in readers]
    assert begun == {0: [[0, 2], [1, 3]], 1: [[0, 1], [2, 3]]}


def test_evolution_rates_are_spread_and_scaled():
    assert rate_factors(Conditions(spread=8), 4) == pytest.approx([0.25, 0.5, 1, 2])
    assert rate_factors(Conditions(lr=2, diverging=1), 3) == [2, 2, 2 * DIVERGING]
    assert rate_factors(Conditions(spread=8), 1) == [1]


def test_evolution_conditions_change_the_population(corpus):
    result = trial(corpus, "solo:replicas=3,lr=2")
    assert len(result["losses"]) == result["ranks"] == 3
    assert {replica["lr"] for replica in result["replicas"]} == {0.02}


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("nobody", "expected an arm among"),
        ("solo:p=1", "an option of solo"),
        ("pair_mean:p", "option=value"),
        ("pair_mean:p=often", "of type float"),
        ("pair_mean:p=2", "a chance from 0 to 1"),
        ("one_way:winner=taller", "probe, ema or random"),
        ("ours:tie=both", "tie"),
        ("diloco:every=0", "at least 1 step"),
        ("diloco:wire=int8", "fp32 or bf16 or int4"),
        ("ours:limit=0", "a factor above 0"),
        ("solo:optimizer=sgd", "schedulefree or cosine"),
    ],
)
def test_evolution_arms_that_make_no_sense_are_refused(text, complaint):
    with pytest.raises(UserError, match=complaint):
        parse_arm(text, POLICIES)


def test_evolution_arms_have_one_label_and_all_options():
    arm = parse_arm("pair_mean:payload=full,p=0.050", POLICIES)
    assert arm.label == "pair_mean:p=0.05,payload=full"
    assert arm.in_full() == {
        "policy": "pair_mean", "p": "0.05", "payload": "full", "wire": "bf16", "rollback": "inf", "shun": "0",
        "share": "1", "replicas": "0", "lr": "1", "sf_beta": "0.9", "optimizer": "schedulefree", "spread": "1",
        "corrupt": "0", "diverging": "0", "parted": "0", "minutes": "0",
    }  # fmt: skip
    assert [parse_arm(text, POLICIES).label for text in DEFAULT_ARMS] == list(DEFAULT_ARMS)


def test_evolution_finished_trials_are_never_run_again(data, tmp_path):
    arms = [parse_arm(text, POLICIES) for text in ("solo", "pair_mean:p=0.5")]
    tasks, said = tasks_of(setting(), arms, [1, 2], tmp_path), []
    assert [(task.arm.label, task.seed) for task in tasks[:2]] == [("solo", 1), ("pair_mean:p=0.5", 1)]
    assert run_tasks(tasks, data, CPU, 1, said.append) == 0 and said[0] == "4 trials to run"
    written = {task.path: task.path.stat().st_mtime_ns for task in tasks}
    tasks[1].path.unlink()
    said.clear()
    assert run_tasks(tasks, data, CPU, 1, said.append) == 0 and said[0] == "1 trials to run"
    assert {task.path for task in tasks if task.path.stat().st_mtime_ns != written[task.path]} == {tasks[1].path}


@pytest.fixture(params=[[], ["--real"]], ids=["simulated", "real"])
def busy(request, data, tmp_path):
    """A laboratory with two trials of two ranks that do not end by themselves, and its processes."""
    words = ["--cpu", "--data", str(data), "--output", str(tmp_path / "out"), "--jobs", "2", "--arms", "solo",
             "pair_mean", "solo:lr=2", "--replicas", "2", "--steps", "1000000", "--dim", "8", "--depth", "1",
             *request.param]  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-m", "bench.evolution", *words], cwd=ROOT, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as laboratory:  # fmt: skip
        try:
            ranks = 2 * 2 if request.param else 0
            of_trials = (("spawn_main", 2), ("runtime.launch", ranks // 2), ("train.py", ranks + ranks // 2))
            eventually(lambda: all(len(named(word, laboratory.pid)) == number for word, number in of_trials))
            yield laboratory, watched(laboratory.pid)
        finally:
            laboratory.kill()


def all_end(family):
    deadline = time.monotonic() + PATIENCE
    for handle, line in family:
        ended, _, _ = select.select([handle], [], [], max(0, deadline - time.monotonic()))
        os.close(handle)
        assert ended, f"still there: {line}"


@pytest.mark.parametrize("kill", [os.kill, os.killpg], ids=["it", "its workers too"])
def test_evolution_leaves_no_process_behind_when_it_is_killed(busy, kill):
    laboratory, family = busy
    kill(laboratory.pid, signal.SIGKILL)
    all_end(family)


def test_evolution_ends_with_all_its_processes_at_ctrl_c(busy):
    laboratory, family = busy
    os.killpg(laboratory.pid, signal.SIGINT)  # as a terminal does
    assert laboratory.wait(PATIENCE) == 130
    all_end(family)
    assert "Traceback" not in laboratory.stderr.read()


def test_evolution_in_one_process_ends_at_ctrl_c_with_what_a_trial_started(data, tmp_path):
    words = ["--cpu", "--real", "--data", str(data), "--output", str(tmp_path), "--arms", "solo", "pair_mean",
             "--replicas", "2", "--steps", "1000000", "--dim", "8", "--depth", "1"]  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-m", "bench.evolution", *words], cwd=ROOT, stderr=subprocess.PIPE, text=True
    ) as laboratory:
        try:
            eventually(lambda: len(named("train.py", laboratory.pid)) == 3)
            family = watched(laboratory.pid)
            laboratory.send_signal(signal.SIGINT)
            assert laboratory.wait(PATIENCE) == 130
            all_end(family)
            assert "Traceback" not in laboratory.stderr.read()
        finally:
            laboratory.kill()


def watched(pid):
    """A handle and the command line of each process that a process started, and of theirs."""
    family = []
    for member, line in family_of(pid).items():
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            family.append((os.pidfd_open(member), line))
    return family


def named(word, pid):
    return [line for line in family_of(pid).values() if word in line]


def family_of(pid):
    """The command lines of the processes that a process started, and of theirs."""
    lines = {}
    for descendant in descendants(pid):
        with contextlib.suppress(OSError):  # it has just ended
            lines[descendant] = Path(f"/proc/{descendant}/cmdline").read_text().replace("\0", " ")
    return lines


def descendants(pid: int) -> set[int]:
    """The processes that a process started, theirs too."""
    children = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # its thread has just ended
            children |= {int(word) for word in task.read_text().split()}
    return children.union(*map(descendants, children))


def test_evolution_other_settings_and_options_are_other_trials(tmp_path):
    paths = set()
    for steps, text in ((4, "ours"), (5, "ours"), (4, "ours:least_effect=0.02"), (4, "ours:p=0.04")):
        paths |= {task.path for task in tasks_of(setting(steps=steps), [parse_arm(text, POLICIES)], [1], tmp_path)}
    with_another_default = dataclasses.replace(parse_arm("ours", POLICIES), options=(("p", 0.03),))
    paths |= {task.path for task in tasks_of(setting(), [with_another_default], [1], tmp_path)}
    assert len(paths) == 5


def test_evolution_a_failed_trial_is_told_and_the_others_go_on(data, tmp_path):
    arms = [parse_arm("solo:replicas=1", POLICIES), parse_arm("solo", POLICIES)]
    tasks, said = tasks_of(setting(), arms, [1], tmp_path), []
    tasks[0] = dataclasses.replace(tasks[0], path=tmp_path / "nowhere" / "file.json")
    assert run_tasks(tasks, data, CPU, 1, said.append) == 1
    assert any("failed: FileNotFoundError" in line for line in said) and tasks[1].path.exists()


@pytest.mark.parametrize("freedom, t", [(1, 12.706205), (2, 4.302653), (4, 2.776445), (9, 2.262157), (30, 2.042272)])
def test_evolution_t_quantiles_are_those_of_the_tables(freedom, t):
    assert t_quantile(freedom, 0.95) == pytest.approx(t, abs=1e-6)


def test_evolution_intervals_are_students():
    told = interval([1.0, 2.0, 3.0])
    assert (told.mean, told.count) == (2.0, 3) and told.half == pytest.approx(4.302653 / math.sqrt(3), abs=1e-6)
    assert math.isnan(interval([1.0]).half) and str(interval([1.0])) == "1.0000"


def test_evolution_pairs_are_of_common_seeds():
    assert paired({1: 1.0, 2: 2.0, 3: 9.0}, {1: 0.5, 2: 1.5, 4: 0.0}).mean == 0.5
    assert paired({1: 1.0}, {2: 1.0}) is None


def result_of(arm, seed, losses, relative, ranks=4):
    return {
        "arm": arm, "seed": seed, "ranks": ranks, "loss": sum(losses) / len(losses), "best": min(losses),
        "loss_of_mean": min(losses) - 0.1, "bytes_over_ddp": relative, "cpu_s": 60.0, "setting": {}, "options": {},
    }  # fmt: skip


def test_evolution_rows_compare_with_mean_and_best_at_the_same_seeds():
    results = [
        result_of("solo", 1, [1.6, 1.8], 0), result_of("solo", 2, [1.7, 1.9], 0),
        result_of("ours", 1, [1.5], 0.04), result_of("ours", 2, [1.6], 0.06),
    ]  # fmt: skip
    ours, solo = rows_of(results, "solo")
    assert (ours.arm, solo.arm, ours.bytes) == ("ours", "solo", 0.05)
    assert ours.soup.mean == pytest.approx(1.45) and solo.soup.mean == pytest.approx(1.55)
    assert ours.over_mean.mean == pytest.approx(-0.2) and ours.over_best.mean == pytest.approx(-0.1)
    assert ours.over_mean.half == pytest.approx(0, abs=1e-9) and solo.over_mean.mean == 0


def test_evolution_rows_keep_an_arm_apart_from_itself_with_other_defaults():
    old, new = ({"p": "0.1", "limit": limit} for limit in ("2", "4"))
    results = [
        result_of("ours", 1, [1.5], 0.04) | {"options": old}, result_of("ours", 2, [1.7], 0.04) | {"options": old},
        result_of("ours", 1, [1.4], 0.04) | {"options": new}, result_of("solo", 1, [1.8], 0),
    ]  # fmt: skip
    assert [(row.arm, row.loss.mean) for row in rows_of(results, "solo")] == [
        ("ours (limit=4)", 1.4), ("ours (limit=2)", 1.6), ("solo", 1.8),
    ]  # fmt: skip
    assert [row.over_mean for row in rows_of(results, "ours")] == [None] * 3
    before = [result | {"options": {"p": "0.1"}} for result in results[:1]]  # when there was no such option
    assert [(row.arm, row.loss.count) for row in rows_of([*before, results[1]], "solo")] == [("ours", 2)]


def test_evolution_plot_is_drawn(tmp_path):
    if shutil.which("Rscript") is None:
        pytest.skip("no Rscript")
    results = [result_of(arm, seed, [1.5 + seed / 50], size) for arm, size in (("solo", 0), ("ours", 0.05), ("ddp", 1))
               for seed in (1, 2)]  # fmt: skip
    wrong = plot(rows_of(results, "solo"), tmp_path / "plot.pdf")
    if wrong is not None and "ggplot2" in wrong:
        pytest.skip(wrong)
    assert wrong is None and (tmp_path / "plot.pdf").read_bytes().startswith(b"%PDF")


def test_evolution_command_runs_resumes_and_shows(data, tmp_path, capsys):
    flags = ["--data", str(data), "--output", str(tmp_path / "out"), "--cpu", "--arms", "solo", "ddp",
             "--replicas", "2", "--steps", "2", "--dim", "16", "--depth", "1", "--batch_size", "2",
             "--chunk-size", "16", "--combined", str(tmp_path / "all.json")]  # fmt: skip
    assert main(flags) == 0
    assert "2 trials to run" in capsys.readouterr().err
    assert main(flags) == 0
    shown = capsys.readouterr()
    assert "0 trials to run" in shown.err and "ddp" in shown.out and "solo" in shown.out
    assert {result["arm"] for result in read_results(tmp_path / "all.json")} == {"solo", "ddp"}
    assert json.loads((tmp_path / "all.json").read_text())["bench"] == "evolution"
    assert main(["--table", "--markdown", "--output", str(tmp_path / "all.json")]) == 0
    assert "| solo, 2 ranks | 1 |" in capsys.readouterr().out


def test_evolution_real_ranks_are_measured_as_simulated_ones_are(data, corpus):
    arm, timed = (parse_arm(f"pair_mean:p=0.5{minutes}", POLICIES) for minutes in ("", ",minutes=0.1"))
    result = run_real(setting(steps=1_000_000), timed, 1, data, corpus)  # by the clock, so that the ranks meet
    simulated = run_trial(setting(steps=int(result["steps"])), arm, 1, corpus, CPU)
    assert result.keys() <= simulated.keys() and result["parameters"] == simulated["parameters"]
    assert len(result["losses"]) == 2 and result["loss"] == pytest.approx(simulated["loss"], abs=0.1)
    assert result["bytes_sent"] > 0 and result["cpu_s"] > 0


def test_evolution_real_flags_say_the_arm():
    flags = flags_of(setting(), parse_arm("ours:p=0.05,wire=bf16,rollback=inf,lr=2,sf_beta=0.95", POLICIES), 3)
    given = dict(zip(flags[2::2], flags[3::2], strict=True))
    assert flags[:2] == ["--cpu", "--no_enable_conv"] and given["--lr"] == "0.02" and given["--seed"] == "3"
    assert given["--sf_beta"] == "0.95"
    assert given["--gossip_mixing_rate"] == "0.05" and given["--gossip_wire_dtype"] == "bf16"
    assert given["--gossip_rollback"] == "none" and given["--gossip_fitness"] == "probe"
    known = parse_arguments(["--data", "x", *flags], "")
    assert known["train_steps"] == 4 and known["gossip_least_effect"] == 0.01


def test_evolution_real_trains_by_the_clock(data, corpus):
    arm = parse_arm("pair_mean:p=0.5,minutes=0.05", POLICIES)
    flags = flags_of(setting(), arm, 1)
    assert flags[flags.index("--max_minutes") + 1] == "0.05" and "--train_steps" not in flags
    result = run_real(setting(steps=1_000_000), arm, 1, data, corpus)
    assert 4 < result["steps"] < 1_000_000 and result["bytes_over_ddp"] > 0


def test_evolution_takes_minutes_of_real_ranks_alone(data):
    with pytest.raises(UserError, match="beside --real alone, got solo:minutes=1"):
        main(["--data", str(data), "--cpu", "--arms", "solo:minutes=1"])


@pytest.mark.parametrize(
    "arm", ["ours:limit=inf", "ours:shun=1", "ddp", "one_way", "solo:spread=8", "ours:corrupt=1", "pair_mean:share=0.5"]
)
def test_evolution_real_refuses_what_has_no_flags(arm):
    with pytest.raises(UserError, match="expected with --real"):
        flags_of(setting(), parse_arm(arm, POLICIES), 1)


def test_evolution_command_says_what_is_missing(tmp_path):
    with pytest.raises(UserError, match="--data"):
        main(["--output", str(tmp_path)])
    with pytest.raises(UserError, match="expected results"):
        main(["--table", "--output", str(tmp_path / "none.json")])
